from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_route import (
    TENSORS,
    assert_counters,
    assert_same,
    assert_schedule,
    empty_routing,
    run_kernel,
)
from torch import Tensor

from tml_kernels._routing import choose_blocking
from tml_kernels.ops.route import Routing, moe_route
from tml_kernels.ops.route.cases import BENCH, EDGE, MODEL, Case, assert_routes, split_inputs
from tml_kernels.ops.route.reference import SCORINGS, moe_route_ref
from tml_kernels.testing import assert_bitwise, assert_matches, randn


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_public(case: Case) -> None:
    inputs = case.make_inputs("cpu")
    result = moe_route(**inputs)
    assert_routes(result, inputs)
    assert result.num_experts == case.num_experts
    assert result.schedule is None and result.scratch is None


@pytest.mark.parametrize("case", EDGE[1:] + MODEL, ids=str)
def test_kernel(case: Case, device: str) -> None:
    inputs = case.make_inputs(device)
    out = run_kernel(inputs, empty_routing(case, device))
    assert_routes(out, inputs)
    assert out.schedule is not None
    assert_schedule(out.schedule, out.expert_T_K, case.num_experts)
    assert_counters(out)


@pytest.mark.gpu
@pytest.mark.parametrize("case", EDGE + MODEL + BENCH, ids=str)
def test_gpu(case: Case) -> None:
    inputs = case.make_inputs("cuda")
    result = moe_route(**inputs)
    assert_routes(result, inputs)
    blocking = choose_blocking(case.num_tokens, case.top_k, case.num_experts)
    assert (result.schedule is not None) == blocking.scheduled
    if result.schedule is not None:
        assert_schedule(result.schedule, result.expert_T_K, case.num_experts)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_rows_are_routed_in_float32(scoring: str, gate_dtype: torch.dtype) -> None:
    case = Case(17, 96, 16, 4, 2, scoring, dtype=torch.bfloat16, gate_dtype=gate_dtype)
    inputs = case.make_inputs("cpu")
    assert_routes(moe_route(**inputs), inputs)


def test_sums_of_weights() -> None:
    """Of the chosen and the shared experts with sinks, of the chosen alone otherwise."""
    for scoring in SCORINGS:
        result = moe_route(**Case(9, 32, 12, 3, 2, scoring).make_inputs("cpu"))
        total = result.weight_T_K.sum(1)
        if scoring == "sink_sigmoid":
            total += result.shared_weight_T_Z.sum(1)
        else:
            assert_bitwise(result.shared_weight_T_Z, torch.ones(9, 2))
        torch.testing.assert_close(total, torch.full_like(total, 8.0 * 1.25))


def test_example_of_routing() -> None:
    """The numbers in its docstring: two tokens, two experts each, one shared expert."""
    expert, shared = torch.tensor([[5, 0], [2, 5]]), torch.tensor([[2.2], [3.5]])
    weight = torch.tensor([[3.1, 2.7], [4.0, 0.5]])
    torch.testing.assert_close(weight.sum(1) + shared[:, 0], torch.full((2,), 8.0))
    logit = torch.full((2, 9), -20.0)
    for t in range(2):  # sigmoids that are the weights over 10
        logit[t, expert[t]] = torch.logit(weight[t] / 10)
        logit[t, 8] = torch.logit(shared[t, 0] / 10)
    result = moe_route(
        logits_T_A=logit, top_k=2, scoring="sink_sigmoid", num_shared=1, scale=2.0,
        global_scale_1=torch.full((1,), 4.0),
    )  # fmt: skip
    assert_bitwise(result.expert_T_K, expert.int())
    assert_matches(result.weight_T_K, weight)
    assert_matches(result.shared_weight_T_Z, shared)


PLACES = ["public", pytest.param("kernel", id="kernel")]


def route_logits(place: str, device: str, logits: Tensor, **options) -> Routing:
    """By the public function, or by the kernel."""
    if place == "public":
        return moe_route(logits_T_A=logits, **options)
    tokens, num_logits = logits.shape
    num_shared = options.get("num_shared", 0)
    sinks = num_shared if options.get("scoring") == "sink_sigmoid" else 0
    case = Case(tokens, 0, num_logits - sinks, options["top_k"], num_shared)
    names = ("bias_E", "logit_bias_A", "global_scale_1")
    tensors = {name: options.get(name) for name in names}
    inputs = {"logits_T_A": logits} | options | tensors
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return run_kernel(inputs, empty_routing(case, device))


@pytest.mark.parametrize("place", PLACES)
def test_ties_go_to_the_lowest_id_and_bias_chooses_without_weighing(place, device: str) -> None:
    bias = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0, 0.5])
    result = route_logits(
        place, device, torch.zeros(1, 7), scoring="sink_sigmoid", bias_E=bias, top_k=4,
        num_shared=1, scale=5.0,
    )  # fmt: skip
    assert result.expert_T_K.tolist() == [[1, 3, 5, 0]]
    torch.testing.assert_close(result.weight_T_K.cpu(), torch.ones(1, 4))
    torch.testing.assert_close(result.shared_weight_T_Z.cpu(), torch.ones(1, 1))


@pytest.mark.parametrize("place", PLACES)
def test_negative_choice_scores_are_ordered(place, device: str) -> None:
    bias = torch.tensor([-2.0, -1.0, -3.0, -1.0, -9.0])
    result = route_logits(place, device, torch.zeros(1, 5), scoring="sigmoid", bias_E=bias, top_k=4)
    assert result.expert_T_K.tolist() == [[1, 3, 0, 2]]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("bias", "ids"),
    [
        (None, [[4, 5, 0]]),  # by their best, group 2 and then group 0, which ties with 1
        ([0.0] * 6, [[4, 5, 2]]),  # by their best two, group 1 before group 0
    ],
)
def test_groups(place, device: str, bias: list[float] | None, ids: list) -> None:
    logits = torch.tensor([[1.0, -9.0, 1.0, 0.0, 3.0, 2.0]])
    result = route_logits(
        place, device, logits, scoring="sigmoid", top_k=3, num_groups=3, top_groups=2,
        bias_E=None if bias is None else torch.tensor(bias),
    )  # fmt: skip
    assert result.expert_T_K.tolist() == ids


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scoring", SCORINGS)
def test_extreme_logits_stay_finite(place, scoring: str, device: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 30.0, 0.0], [-300.0, -200.0, -250.0, -260.0]])
    num_shared = 1 if scoring == "sink_sigmoid" else 0
    result = route_logits(
        place, device, logits, scoring=scoring, top_k=3, num_shared=num_shared, scale=8.0
    )
    assert result.weight_T_K.isfinite().all() and result.shared_weight_T_Z.isfinite().all()
    # softmax is zero for all but one, which then tie.
    first = {"softmax": [0, 1, 2], "sink_sigmoid": [0, 2, 1]}.get(scoring, [0, 2, 3])
    assert result.expert_T_K[0].tolist() == first


@pytest.mark.parametrize("place", PLACES)
def test_small_scores_keep_their_digits(place, device: str) -> None:
    """softplus of -20 is 2.06e-9, which 1 + exp(-20) would round away."""
    logits = torch.linspace(-40.0, 20.0, 61)[None]
    result = route_logits(
        place, device, logits, scoring="sqrtsoftplus", top_k=61, renormalize=False
    )
    expected = torch.nn.functional.softplus(logits.double(), threshold=100.0).sqrt().flip(1)
    relative = (result.weight_T_K.cpu().double() - expected).abs() / expected
    assert float(relative.max()) < 1e-5


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("scoring", "renormalize"),
    [*((name, True) for name in SCORINGS), *((name, False) for name in SCORINGS[:3])],
)
def test_nan_row_gets_valid_ids_and_stays_in_its_row(
    place, scoring: str, renormalize: bool, device: str
) -> None:
    """One NaN logit, of an expert or of a group that would not be chosen."""
    sinks = 2 if scoring == "sink_sigmoid" else 0
    logits = randn(11, 12 + sinks)
    logits[:, 5] = -30.0
    options = {"scoring": scoring, "top_k": 3, "num_groups": 4, "top_groups": 2}
    options |= {"num_shared": sinks, "renormalize": renormalize}
    expected = route_logits(place, device, logits, **options)
    logits[4, 5] = float("nan")
    result = route_logits(place, device, logits, **options)
    assert result.weight_T_K[4].isnan().all() and result.shared_weight_T_Z[4].isnan().all()
    ids = result.expert_T_K[4].tolist()
    assert len(set(ids)) == 3 and set(ids) <= set(range(12))
    others = [t for t in range(11) if t != 4]
    assert_same(result, expected, others)


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "case",
    [
        Case(29, 128, 8, 2, 2),
        Case(29, 600, 8, 2, 2, late_norm=True),
        Case(29, 77, 60, 4, scoring="softmax", bias=False),
        Case(29, 96, 60, 7, scoring="sqrtsoftplus", groups=(5, 2)),
        Case(29, 0, 13, 3, scoring="sigmoid"),
    ],
    ids=str,
)
def test_row_does_not_depend_on_neighbours(case: Case, place: str) -> None:
    inputs = case.make_inputs(place)
    together = moe_route(**inputs)
    alone = [moe_route(**rows_of(inputs, slice(t, t + 1))) for t in range(29)]
    for field in (*TENSORS, "inv_rms_T") if case.late_norm else TENSORS:
        assert_bitwise(getattr(together, field), torch.cat([getattr(r, field) for r in alone]))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [BENCH[0], BENCH[8], BENCH[-1]], ids=str)
def test_gpu_row_has_the_same_bits_in_every_batch(case: Case) -> None:
    """Every configuration, with and without a schedule, any place."""
    inputs = replace(case, num_tokens=1024).make_inputs("cuda")
    whole = moe_route(**inputs)
    for tokens in (1, 3, 4, 5, 8, 9, 16, 17, 40, 64, 65, 200, 1023):
        for first in (0, 1, 1024 - tokens):
            rows = slice(first, first + tokens)
            assert_same(moe_route(**rows_of(inputs, rows)), replace_rows(whole, rows))


def replace_rows(routing: Routing, rows: slice) -> Routing:
    names = TENSORS if routing.inv_rms_T is None else (*TENSORS, "inv_rms_T")
    return replace(routing, **{name: getattr(routing, name)[rows] for name in names})


def rows_of(inputs: dict, rows: slice) -> dict:
    """The same call for some of the tokens."""
    names = [name for name in ("x_T_D", "logits_T_A", "residual_T_D") if name in inputs]
    return inputs | {name: inputs[name][rows].clone() for name in names}


def by_id(expert_T_K: Tensor, weight_T_K: Tensor) -> tuple[Tensor, Tensor]:
    """transformers leaves the order of the chosen experts open: compare by ascending id."""
    ids, order = expert_T_K.long().sort(dim=1)
    return ids, weight_T_K.gather(1, order)


def moe_config(**changed: object):
    """What the routers of transformers read of their configurations."""
    from types import SimpleNamespace

    config = {
        "hidden_size": 48, "num_experts": 24, "num_local_experts": 24, "num_experts_per_tok": 5,
        "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
        "router_jitter_noise": 0.0, "scoring_func": "sqrtsoftplus", "topk_method": "greedy",
    }  # fmt: skip
    return SimpleNamespace(**(config | changed))


GROUPED = {"n_group": 6, "topk_group": 3, "routed_scaling_factor": 2.5}
THEIR_GROUPS = {"num_groups": 6, "top_groups": 3, "scale": 2.5}
ROUTERS = {
    "mixtral": ("mixtral", "MixtralTopKRouter", {}, {}),
    "qwen3": ("qwen3_moe", "Qwen3MoeTopKRouter", {}, {}),
    "qwen3-plain": (
        "qwen3_moe", "Qwen3MoeTopKRouter", {"norm_topk_prob": False}, {"renormalize": False},
    ),
    "deepseek-v2": (
        "deepseek_v2", "DeepseekV2TopkRouter", GROUPED | {"topk_method": "group_limited_greedy"},
        THEIR_GROUPS | {"renormalize": False},
    ),
    "deepseek-v3": (
        "deepseek_v3", "DeepseekV3TopkRouter", GROUPED, THEIR_GROUPS | {"scoring": "sigmoid"},
    ),
    "glm4": ("glm4_moe", "Glm4MoeTopkRouter", GROUPED, THEIR_GROUPS | {"scoring": "sigmoid"}),
    "deepseek-v4": ("deepseek_v4", "DeepseekV4TopKRouter", {}, {"scoring": "sqrtsoftplus"}),
    "gpt-oss": ("gpt_oss", "GptOssTopKRouter", {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
def test_is_the_router_of(name: str) -> None:
    pytest.importorskip("transformers")
    from importlib import import_module

    module, kind, changed, options = ROUTERS[name]
    modeling = import_module(f"transformers.models.{module}.modeling_{module}")
    router = getattr(modeling, kind)(moe_config(**changed))
    x = randn(37, 48)
    bias = logit_bias = None
    with torch.no_grad():
        router.weight.copy_(randn(24, 48, scale=0.2))
        if hasattr(router, "e_score_correction_bias"):
            bias = router.e_score_correction_bias.copy_(randn(24, scale=0.1))
        if hasattr(router, "bias"):
            logit_bias = router.bias.copy_(randn(24)).detach()
        _, weight, expert = router(x)
        result = moe_route(
            x, router.weight, top_k=5, bias_E=bias, logit_bias_A=logit_bias, **options
        )
    ids, weights = by_id(result.expert_T_K, result.weight_T_K)
    their_ids, their_weights = by_id(expert, weight)
    assert_bitwise(ids, their_ids)
    assert_matches(weights, their_weights)


def test_is_the_router_of_inkling() -> None:
    pytest.importorskip("transformers")
    from transformers.models.inkling.configuration_inkling import InklingTextConfig
    from transformers.models.inkling.modeling_inkling import InklingTopkRouter

    config = InklingTextConfig(
        hidden_size=48, n_routed_experts=12, n_shared_experts=2, num_experts_per_tok=3
    )
    router = InklingTopkRouter(config).double()
    with torch.no_grad():
        router.weight.copy_(randn(14, 48, scale=0.2))
        router.global_scale.fill_(0.7)
        router.e_score_correction_bias.copy_(randn(12, scale=0.3))
        x = randn(31, 48).double()
        _, weight, index, shared = router(x)
        given, rule = split_inputs({"scoring": "sink_sigmoid", "scale": config.route_scale})
        result = moe_route_ref(
            x, router.weight, top_k=3, num_shared=2, bias_E=router.e_score_correction_bias,
            global_scale_1=router.global_scale, rule=rule, **given,
        )  # fmt: skip
    close = {
        "rtol": 2e-6,
        "atol": 2e-6,
    }  # transformers 5.23 weighs in float32, whatever it is given
    for ours, theirs in zip(
        by_id(result.expert_T_K, result.weight_T_K), by_id(index, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **close)
    torch.testing.assert_close(result.shared_weight_T_Z, shared, **close)
