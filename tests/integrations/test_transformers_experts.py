"""transformers' experts modules, one at a time, on `experts_forward`."""

from __future__ import annotations

import copy
import subprocess
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    SMALL,
    experts_f64,
    experts_modules,
    implementation,
    randomise,
    swiglu_oai,
)
from torch import Tensor
from transformers import MixtralConfig, NemotronHConfig, OpenAIPrivacyFilterConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import (
    OpenAIPrivacyFilterExperts,
)

from tml_kernels.integrations.transformers import register
from tml_kernels.moe import prepare_moe_weights
from tml_kernels.testing import assert_bitwise, assert_matches, randn, relative_l2

Call = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register()
    with torch.no_grad():
        yield


def mixtral(**given: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_local_experts": 6}
    return randomise(MixtralExperts(MixtralConfig(**{**sizes, **given})))


def gpt_oss() -> Any:
    return experts_modules(SMALL["gpt_oss"].make())[0]


def call_of(num_experts: int = 6, num_tokens: int = 11, top_k: int = 3) -> Call:
    ids = torch.rand(num_tokens, num_experts).argsort(1)[:, :top_k]
    return randn(num_tokens, 64), ids, torch.rand(num_tokens, top_k)


def run(module: Any, name: str, call: Call) -> Tensor:
    with implementation(module, name):
        return module(*call)


# What a module looks like


@pytest.mark.parametrize(
    "act", ["silu", "swish", "gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"]
)
def test_activation(act: str) -> None:
    module, call = mixtral(hidden_act=act), call_of()
    module.gate_up_proj *= 4.0  # where exact and approximate gelu differ by more than the limit
    assert_matches(run(module, "tml", call), run(module, "eager", call), limit=1e-6)


@pytest.mark.parametrize("act", ["relu", "quick_gelu", "gelu_10", "relu2", "sigmoid"])
def test_other_activation_is_refused_by_name(act: str) -> None:
    module = mixtral(hidden_act=act)
    name = type(module.act_fn).__name__
    with pytest.raises(NotImplementedError, match=rf'MixtralExperts: .*{name}.*="grouped_mm"'):
        run(module, "tml", call_of())


@pytest.mark.parametrize(("limit", "alpha"), [(6.0, 1.702), (7.0, 1.5), (100.0, 1.702)])
def test_other_constants_of_a_gate_are_refused(limit: float, alpha: float) -> None:
    module = gpt_oss()
    module.limit, module.alpha = limit, alpha
    with pytest.raises(NotImplementedError, match=r"GptOssExperts\._apply_gate, is none of silu"):
        run(module, "tml", call_of())


def test_gate_with_halves_and_clamps() -> None:
    """gpt-oss's activation and storage, but rows of gate and up concatenated."""
    config = OpenAIPrivacyFilterConfig(
        hidden_size=64, intermediate_size=24, num_local_experts=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    module, call = randomise(OpenAIPrivacyFilterExperts(config)), call_of()
    module.gate_up_proj *= 8.0  # clamped here and there
    assert_matches(run(module, "tml", call), run(module, "eager", call), limit=1e-6)


def test_experts_without_a_gate_are_refused() -> None:
    config = NemotronHConfig(hidden_size=64, moe_intermediate_size=24, n_routed_experts=4)
    with pytest.raises(NotImplementedError, match="NemotronHExperts: has experts without a gate"):
        run(randomise(NemotronHExperts(config)), "tml", call_of(4))


def test_norm_behind_an_expert_is_refused() -> None:
    """transformers 5.23 has experts whose outputs are normalised before they are weighed."""
    module = mixtral()
    module.has_post_expert_norm = True
    with pytest.raises(NotImplementedError, match="MixtralExperts: normalises each expert's"):
        run(module, "tml", call_of())


def test_other_dtype_is_refused() -> None:
    module = mixtral().double()
    with pytest.raises(NotImplementedError, match=r"gate_up_proj: has dtype torch.float64"):
        run(module, "tml", call_of())


# What it is called with


def mixtral_f64(module: Any, x: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    return experts_f64(
        x, lambda e: module.gate_up_proj[e].chunk(2), lambda e: module.down_proj[e], ids, weight,
        lambda gate, up: F.silu(gate) * up,
    )  # fmt: skip


def gpt_oss_f64(module: Any, x: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    def gate_up(e: int) -> tuple[Tensor, Tensor]:
        w = module.gate_up_proj[e].T
        return w[0::2], w[1::2]

    def bias(e: int) -> tuple[Tensor, Tensor, Tensor]:
        b = module.gate_up_proj_bias[e]
        return b[0::2], b[1::2], module.down_proj_bias[e]

    return experts_f64(x, gate_up, lambda e: module.down_proj[e].T, ids, weight, swiglu_oai, bias)


@pytest.mark.parametrize(("make", "maths"), [(mixtral, mixtral_f64), (gpt_oss, gpt_oss_f64)])
def test_sentinels_are_skipped(make: Callable[[], Any], maths: Callable[..., Tensor]) -> None:
    """Ids of experts elsewhere: nothing is computed for them, whatever their weight."""
    module, (x, ids, weight) = make(), call_of(num_tokens=5, top_k=3)
    ids[0, 1], ids[2, :], ids[3, 0] = 6, 6, -1
    skipped = (ids < 0) | (ids >= 6)
    actual = run(module, "tml", (x, ids, weight.masked_fill(skipped, float("nan"))))
    assert_matches(actual, maths(module, x, ids.masked_fill(skipped, -1), weight))
    assert_bitwise(actual[2], torch.zeros(64))


def test_no_tokens() -> None:
    x, ids, weight = call_of(num_tokens=0)
    assert run(mixtral(), "tml", (x, ids, weight)).shape == (0, 64)


def test_strided_input_and_weights_in_bfloat16() -> None:
    module, (x, ids, weight) = mixtral().bfloat16(), call_of()
    wide = torch.cat([x, x], 1).bfloat16()
    weight = weight.bfloat16()
    call = (wide[:, :64], ids.T.contiguous().T, weight)
    exact = mixtral().float()
    exact.load_state_dict(module.state_dict())
    expected = run(exact, "eager", (wide[:, :64].float(), ids, weight.float()))
    assert_matches(run(module, "tml", call), expected)


def test_training_is_refused() -> None:
    module, (x, ids, weight) = mixtral(), call_of()
    frozen = mixtral().requires_grad_(False)
    with torch.enable_grad():
        with pytest.raises(RuntimeError, match=r"MixtralExperts.*no_grad.*\"grouped_mm\""):
            run(module, "tml", (x, ids, weight))
        with pytest.raises(RuntimeError, match="no backward"):
            run(frozen, "tml", (x.clone().requires_grad_(), ids, weight))
        out = run(frozen, "tml", (x, ids, weight))
    assert not out.requires_grad
    assert_matches(out, run(frozen, "eager", (x, ids, weight)), limit=1e-6)


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_inference_mode(make: Callable[[], Any]) -> None:
    """Weights made and prepared under it, which have no version counter; and called outside."""
    with torch.inference_mode():
        module, call = make(), call_of()
        first = run(module, "tml", call)
        assert_matches(first, run(module, "eager", call), limit=1e-6)
    assert_bitwise(run(module, "tml", call), first)


def test_compiled() -> None:
    module, call = gpt_oss(), call_of()
    module.config._experts_implementation = "tml"
    compiled = torch.compile(lambda *inputs: module(*inputs) * 2.0, backend="eager")
    assert_bitwise(compiled(*call), module(*call) * 2.0)
    module.down_proj *= 2.0
    assert_bitwise(compiled(*call), module(*call) * 2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_gpu_captured_after_one_call(make: Callable[[], Any]) -> None:
    module, call = make().cuda(), [tensor.cuda() for tensor in call_of()]
    with implementation(module, "tml"):
        module(*call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(*call)
        call[0].copy_(torch.randn_like(call[0]))
        graph.replay()
        replayed = out.clone()
        assert_bitwise(replayed, module(*call))


# What is kept on a module


def rewritten(module: Any) -> None:
    module.down_proj.mul_(3.0)


def rewritten_bias(module: Any) -> None:
    biases = [p for name, p in module.named_parameters() if name.endswith("bias")]
    (biases or [module.gate_up_proj])[0].add_(1.0)


def replaced(module: Any) -> None:
    module.gate_up_proj = torch.nn.Parameter(module.gate_up_proj * 2.0)


def reloaded(module: Any) -> None:
    module.load_state_dict({name: 0.5 * tensor for name, tensor in module.state_dict().items()})


def assigned(module: Any) -> None:
    state = {name: 0.5 * tensor for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


def swapped(module: Any) -> None:
    module.down_proj.data = module.down_proj.data * 3.0


CHANGES = [rewritten, rewritten_bias, replaced, reloaded, assigned, swapped]


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
@pytest.mark.parametrize("change", CHANGES)
def test_change_is_noticed(make: Callable[[], Any], change: Callable[[Any], None]) -> None:
    module, call = make(), call_of()
    before = run(module, "tml", call)
    kept = weakref.ref(module._tml_prepared)
    change(module)
    after = run(module, "tml", call)
    assert relative_l2(after, before) > 1e-2
    assert_matches(after, run(module, "eager", call), limit=1e-6)
    assert kept() is None, "what was kept is still held"


def test_stale_copy_is_gone_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be no room for both."""
    module, call, seen = gpt_oss(), call_of(), []
    run(module, "tml", call)
    kept = weakref.ref(module._tml_prepared)

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kept())
        return prepare_moe_weights(*args, **kwargs)

    monkeypatch.setattr("tml_kernels.integrations.transformers.experts.prepare_moe_weights", spy)
    module.down_proj.mul_(2.0)
    run(module, "tml", call)
    assert seen == [None]


def test_change_of_dtype_is_noticed() -> None:
    module, (x, ids, weight) = gpt_oss(), call_of()
    before = run(module, "tml", (x, ids, weight))
    module.bfloat16()
    after = run(module, "tml", (x.bfloat16(), ids, weight))
    assert after.dtype == torch.bfloat16
    # Weights and tokens are rounded as well, hence not the limit of one op.
    assert_matches(after, before, limit=2e-2)


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_prepared_once_and_parameters_left_alone(make: Callable[[], Any]) -> None:
    module, call = make(), call_of()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    first = run(module, "tml", call)
    kept = module._tml_prepared
    for _ in range(2):
        assert_bitwise(run(module, "tml", call), first)
    assert module._tml_prepared is kept
    assert module.state_dict().keys() == state.keys()
    for name, tensor in module.state_dict().items():
        assert_bitwise(tensor, state[name])
    shared = kept.weights.w2.data.data_ptr() == module.down_proj.data_ptr()
    assert shared == (make is mixtral), "[E, J, D] is used as it lies, [E, K, N] copied"


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_copy_of_a_module_is_its_own(make: Callable[[], Any]) -> None:
    module, call = make(), call_of()
    before = run(module, "tml", call)
    other = copy.deepcopy(module)
    other.down_proj.mul_(2.0)
    assert_matches(run(other, "tml", call), run(other, "eager", call), limit=1e-6)
    assert_bitwise(run(module, "tml", call), before)


# Where transformers is another, or none


def test_missing_interface_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "transformers.integrations.moe"
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    match = r"transformers 4\.57\.1 has no transformers\.integrations\.moe\.ALL_EXPERTS_FUNCTIONS"
    with pytest.raises(ImportError, match=match):
        register()
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=match):
        register()


def test_nothing_is_registered_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.moe import ExpertsInterface

    monkeypatch.setattr(ExpertsInterface, "_global_mapping", {})
    monkeypatch.setitem(sys.modules, "transformers.integrations.finegrained_fp8", None)
    with pytest.raises(ImportError, match=r"finegrained_fp8\.ALL_FP8_EXPERTS_FUNCTIONS"):
        register()
    assert ExpertsInterface._global_mapping == {}


def test_missing_transformers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="transformers is not installed: pip install"):
        register()


def test_adapters_import_no_library() -> None:
    code = (
        "import sys, tml_kernels.integrations.transformers\n"
        "import tml_kernels.integrations.vllm, tml_kernels.integrations.flashinfer\n"
        "print([m for m in ('transformers', 'vllm', 'flashinfer') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
