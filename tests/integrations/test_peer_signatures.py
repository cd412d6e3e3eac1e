"""vLLM's and FlashInfer's arguments against float64 maths. Neither library is needed."""

from __future__ import annotations

import enum
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import experts_f64, swiglu_oai
from torch import Tensor

from tml_kernels.integrations.flashinfer import cutlass_fused_moe
from tml_kernels.integrations.vllm import fused_experts
from tml_kernels.precision import ACTIVATIONS
from tml_kernels.testing import assert_bitwise, assert_matches, randn

T, K, D, F_, E = 9, 3, 40, 24, 5
NAN = float("nan")


def silu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def gelu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


def gelu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


class Inputs:
    """Tokens, routing and experts; gate and up apart, put together as a library wants them."""

    def __init__(self, *, dtype: torch.dtype = torch.float32, top_k: int = K, tokens: int = T):
        self.x = randn(tokens, D, dtype=dtype)
        self.ids = torch.rand(tokens, E).argsort(1)[:, :top_k].int()
        self.weight = torch.rand(tokens, top_k)
        # Wide enough that clamps of 7 and the two forms of gelu matter.
        self.gate, self.up = (randn(E, F_, D, dtype=dtype, scale=0.6) for _ in range(2))
        self.down = randn(E, D, F_, dtype=dtype, scale=0.2)
        self.bias = (randn(E, F_, dtype=dtype), randn(E, F_, dtype=dtype), randn(E, D, dtype=dtype))

    @property
    def gate_up(self) -> Tensor:
        return torch.cat([self.gate, self.up], 1)

    @property
    def up_gate(self) -> Tensor:
        return torch.cat([self.up, self.gate], 1)

    @property
    def interleaved(self) -> Tensor:
        return torch.stack([self.gate, self.up], 2).flatten(1, 2)

    def vllm(self) -> dict[str, Any]:
        return {
            "hidden_states": self.x, "w1": self.gate_up, "w2": self.down,
            "topk_weights": self.weight, "topk_ids": self.ids,
        }  # fmt: skip

    def flashinfer(self) -> dict[str, Any]:
        return {
            "input": self.x, "token_selected_experts": self.ids, "token_final_scales": self.weight,
            "fc1_expert_weights": self.up_gate, "fc2_expert_weights": self.down,
            "output_dtype": self.x.dtype, "quant_scales": [],
        }  # fmt: skip

    def expected(
        self, act: Callable[..., Tensor] = silu, *, ids: Tensor | None = None, biased: bool = False
    ) -> Tensor:
        """Of the experts that are here, by their rows; -1 is skipped."""
        return experts_f64(
            self.x, lambda e: (self.gate[e], self.up[e]), lambda e: self.down[e],
            self.ids if ids is None else ids, self.weight, act,
            (lambda e: [b[e] for b in self.bias]) if biased else None,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    i = Inputs(dtype=dtype)
    assert_matches(fused_experts(**i.vllm()), i.expected())
    assert_matches(cutlass_fused_moe(**i.flashinfer()), i.expected())


def test_by_position() -> None:
    """The order of the arguments both libraries agree on over their versions."""
    i = Inputs()
    assert_matches(fused_experts(i.x, i.gate_up, i.down, i.weight, i.ids), i.expected())
    out = cutlass_fused_moe(i.x, i.ids, i.weight, i.up_gate, i.down, torch.float32, [])
    assert_matches(out, i.expected())


@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_numbers_of_tokens(tokens: int) -> None:
    i = Inputs(tokens=tokens)
    assert_matches(fused_experts(**i.vllm()), i.expected())
    assert_matches(cutlass_fused_moe(**i.flashinfer()), i.expected())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ids_outside_are_skipped(dtype: torch.dtype) -> None:
    i = Inputs()
    i.ids = i.ids.to(dtype)
    i.ids[0, 0], i.ids[1, :], i.ids[2, 2] = -1, -1, E
    skipped = (i.ids < 0) | (i.ids >= E)
    expected = i.expected(ids=i.ids.masked_fill(skipped, -1))
    i.weight = i.weight.masked_fill(skipped, NAN)
    for out in (fused_experts(**i.vllm()), cutlass_fused_moe(**i.flashinfer())):
        assert_matches(out, expected)
        assert_bitwise(out[1], torch.zeros(D))


# vLLM

OAI = {"gemm1_alpha": 1.702, "gemm1_beta": 1.0, "gemm1_clamp_limit": 7.0}  # of gpt-oss


class MoEActivation(enum.Enum):
    """As vLLM spells it."""

    GELU = "gelu"


@pytest.mark.parametrize(
    ("name", "act", "rows"),
    [
        ("silu", silu, "gate_up"), ("gelu", gelu, "gate_up"), ("gelu_tanh", gelu_tanh, "gate_up"),
        ("swigluoai", swiglu_oai, "interleaved"),
        ("swigluoai_uninterleave", swiglu_oai, "gate_up"),
        (MoEActivation.GELU, gelu, "gate_up"),
    ],
)  # fmt: skip
def test_vllm_activation(name: Any, act: Callable[..., Tensor], rows: str) -> None:
    i = Inputs()
    args = i.vllm() | {"w1": getattr(i, rows), "activation": name}
    if name == "swigluoai_uninterleave":
        args |= config(**OAI)
    out = fused_experts(**args)
    assert_matches(out, i.expected(act))


def test_vllm_biases_of_its_configuration() -> None:
    i = Inputs()
    gate, up, down = i.bias
    config = SimpleNamespace(w1_bias=torch.stack([gate, up], 2).flatten(1), w2_bias=down)
    config.quant_dtype, config.gemm1_alpha, config.gemm1_clamp_limit = None, 1.702, 7.0
    args = i.vllm() | {"w1": i.interleaved, "activation": "swigluoai", "quant_config": config}
    out = fused_experts(**args)
    assert_matches(out, i.expected(swiglu_oai, biased=True))


@pytest.mark.parametrize("num_experts", [-1, 12])
def test_vllm_expert_map(num_experts: int) -> None:
    """Twelve experts of all devices, five of them here, in another order."""
    i = Inputs()
    rows = torch.full((12,), -1, dtype=torch.int32)
    rows[[7, 0, 11, 3, 4]] = torch.arange(E, dtype=torch.int32)
    i.ids = torch.rand(T, 12).argsort(1)[:, :K].int()
    i.ids[0, 0], i.ids[1, 1] = -1, 12
    outside = (i.ids < 0) | (i.ids >= 12)
    here = rows[i.ids.masked_fill(outside, 0).long()].masked_fill(outside, -1)
    assert (here >= 0).any() and (here < 0).sum() > 3
    out = fused_experts(**i.vllm(), expert_map=rows, global_num_experts=num_experts)
    assert_matches(out, i.expected(ids=here))


def test_vllm_parts_of_all_devices_add_up() -> None:
    i = Inputs()
    whole = fused_experts(**i.vllm())
    total = torch.zeros_like(whole)
    for rows in (slice(0, 2), slice(2, 5)):
        part = torch.full((E,), -1, dtype=torch.int32)
        part[rows] = torch.arange(rows.stop - rows.start, dtype=torch.int32)
        args: dict[str, Any] = i.vllm()
        args |= {"w1": i.gate_up[rows], "w2": i.down[rows], "expert_map": part}
        total += fused_experts(**args)
    assert_matches(total, whole)


def test_vllm_weight_on_input() -> None:
    i = Inputs(top_k=1)
    i.ids[3] = -1
    scaled = Inputs(top_k=1)
    scaled.__dict__.update(vars(i))
    scaled.x, scaled.weight = i.x.double() * i.weight.double(), torch.ones(T, 1)
    i.weight[3] = NAN
    out = fused_experts(**i.vllm(), apply_router_weight_on_input=True)
    assert_matches(out[i.ids[:, 0] >= 0], scaled.expected()[i.ids[:, 0] >= 0])
    assert_bitwise(out[3], torch.zeros(D))


@pytest.mark.parametrize("inplace", [False, True])
def test_vllm_inplace(inplace: bool) -> None:
    i = Inputs()
    before, expected = i.x.clone(), i.expected()
    out = fused_experts(**i.vllm(), inplace=inplace)
    assert (out is i.x) == inplace
    assert_matches(out, expected)
    if not inplace:
        assert_bitwise(i.x, before)


def config(**given: Any) -> dict[str, Any]:
    return {"quant_config": SimpleNamespace(**given)}


ONES = torch.ones(1)
VLLM_BAD = [
    ({"activation": "relu2_no_mul"}, NotImplementedError, "activation: .* got 'relu2_no_mul'"),
    ({"inplace": "silu"}, TypeError, "inplace: expected a bool, got 'silu'"),
    ({"global_num_experts": 8}, ValueError, "global_num_experts: w1 has 5 experts, got 8"),
    ({"expert_map": torch.zeros(6).int(), "global_num_experts": 5}, ValueError,
     "global_num_experts: expert_map has 6 experts, got 5"),
    ({"expert_map": torch.zeros(6)}, TypeError, "expert_map_G: expected torch.int32"),
    ({"apply_router_weight_on_input": True}, ValueError,
     "apply_router_weight_on_input: needs K = 1, got K=3"),
    ({"topk_ids": torch.zeros(T, K)}, TypeError, "topk_ids_T_K: expected torch.int32"),
    ({"topk_ids": torch.zeros(T + 1, K).int()}, ValueError, "topk_ids_T_K: T=10"),
    ({"topk_weights": torch.zeros(T, 2)}, ValueError, "topk_weights_T_K: K=2"),
    ({"hidden_states": torch.zeros(T, D + 1)}, ValueError, "hidden_states_T_D: D=41"),
    ({"w1": None}, TypeError, "w1_E_J_D: expected a tensor, got NoneType"),
    ({"w1": torch.zeros(E, 46, D)}, ValueError, "w1: expected 2 F = 48 rows .*got 46"),
    ({"w1": torch.zeros(E, D, 48).mT}, ValueError, "w1_E_J_D: must be contiguous"),
    ({"w1": torch.zeros(E, 48, D).to(torch.float8_e4m3fn)}, TypeError, "w1_E_J_D: expected"),
    ({"w2": torch.zeros(E, D, F_).half()}, TypeError, "w2: expected torch.float32, as w1 has"),
    ({"w2": torch.zeros(4, D, F_)}, ValueError, "w2_E_D_F: E=4"),
    (config(quant_dtype=torch.float8_e4m3fn), NotImplementedError, "quant_config.quant_dtype"),
    (config(w1_scale=ONES), NotImplementedError, "quant_config.w1_scale: .*got a Tensor"),
    (config(w2_zp=ONES), NotImplementedError, "quant_config.w2_zp"),
    (config(gemm1_clamp_limit=7.0), NotImplementedError, "gemm1_clamp_limit: only None .*got 7.0"),
    (config(gemm1_alpha=1.5) | {"activation": "swigluoai"}, NotImplementedError,
     "quant_config.gemm1_alpha: only 1.702 is served, got 1.5"),
    *((config(**{**OAI, name: None}) | {"activation": "swigluoai_uninterleave"}, ValueError,
       f"quant_config.{name}: 'swigluoai_uninterleave' needs it") for name in OAI),
    ({"activation": "swigluoai_uninterleave"}, ValueError, "gemm1_alpha: .* needs it, got None"),
    (config(w1_bias=torch.zeros(E, 4)), ValueError, "quant_config.w1_bias_E_J: J=4"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "words"), VLLM_BAD)
def test_vllm_bad_input(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fused_experts(**Inputs().vllm() | change)


def test_vllm_biases_with_weight_on_input_are_refused() -> None:
    i = Inputs(top_k=1)
    given = config(w2_bias=i.bias[2])
    with pytest.raises(NotImplementedError, match=r"quant_config\.w2_bias"):
        fused_experts(**i.vllm(), apply_router_weight_on_input=True, **given)


# FlashInfer


@pytest.mark.parametrize(("kind", "act"), [(3, silu), (4, gelu), (8, gelu_tanh)])
def test_flashinfer_activation(kind: int, act: Callable[..., Tensor]) -> None:
    i = Inputs()
    assert_matches(cutlass_fused_moe(**i.flashinfer(), activation_type=kind), i.expected(act))


def test_flashinfer_output_and_biases() -> None:
    i = Inputs()
    gate, up, down = i.bias
    output = torch.empty(T, D)
    out = cutlass_fused_moe(
        **i.flashinfer(), fc1_expert_biases=torch.cat([up, gate], 1), fc2_expert_biases=down,
        output=output, tune_max_num_tokens=64, enable_pdl=True, use_fused_finalize=False,
    )  # fmt: skip
    assert out is output
    assert_matches(out, i.expected(biased=True))


@pytest.mark.parametrize("rank", range(3))
def test_flashinfer_expert_parallel(rank: int) -> None:
    """Fifteen experts on three devices; each serves its own five."""
    i = Inputs()
    i.ids = torch.rand(T, 3 * E).argsort(1)[:, :K].int()
    i.ids[0, 0] = -1
    here = i.ids - rank * E
    here = here.masked_fill((here < 0) | (here >= E), -1)
    assert (here >= 0).any() and (here < 0).any()
    out = cutlass_fused_moe(**i.flashinfer(), ep_size=3, ep_rank=rank)
    assert_matches(out, i.expected(ids=here))


FLASHINFER_BAD = [
    ({"output_dtype": torch.float16}, NotImplementedError, "output_dtype: only torch.float32"),
    ({"quant_scales": [ONES]}, NotImplementedError, "quant_scales: only None .*got a list"),
    ({"swiglu_limit": ONES}, NotImplementedError, "swiglu_limit: only None .*got a Tensor"),
    ({"tp_size": 2}, NotImplementedError, "tp_size: only 1 is served, got 2"),
    ({"enable_alltoall": True}, NotImplementedError, "enable_alltoall: only False .*got True"),
    ({"min_latency_mode": True}, NotImplementedError, "min_latency_mode"),
    ({"use_w4_group_scaling": True}, NotImplementedError, "use_w4_group_scaling"),
    ({"activation_type": 6}, NotImplementedError, r"activation_type: .*\[3, 4, 8\], got 6"),
    ({"ep_size": 2, "ep_rank": 2}, ValueError, "ep_rank: expected 0..1 of ep_size=2, got 2"),
    ({"input": torch.zeros(T, D + 1)}, ValueError, "input_T_D: D=41"),
    ({"input": None}, TypeError, "input_T_D: expected a tensor, got NoneType"),
    ({"output": torch.zeros(T, D + 1)}, ValueError, "output_T_D: D=41"),
    ({"token_final_scales": torch.zeros(T, 1)}, ValueError, "token_final_scales_T_K: K=1"),
    ({"token_selected_experts": torch.zeros(T, K)}, TypeError, "token_selected_experts_T_K"),
    ({"fc1_expert_weights": torch.zeros(E, 46, D)}, ValueError, "fc1_expert_weights: expected 2 F"),
    ({"fc2_expert_weights": torch.zeros(E, D, F_).byte()}, TypeError, "fc2_expert_weights_E_D_F"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "words"), FLASHINFER_BAD)
def test_flashinfer_bad_input(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        cutlass_fused_moe(**Inputs().flashinfer() | change)


# Both, on a GPU


@pytest.mark.gpu
def test_gpu_captured() -> None:
    """Called under capture from the first, with biases, a map and parts of the experts: nothing
    synchronises, nothing is kept; replayed with other tokens."""
    i = Inputs(dtype=torch.bfloat16)
    names = ("x", "ids", "weight", "gate", "up", "down")
    on_gpu = Inputs(dtype=torch.bfloat16)
    on_gpu.__dict__.update({name: getattr(i, name).cuda() for name in names})
    gate, up, down = (bias.cuda() for bias in i.bias)
    args = on_gpu.vllm() | config(w1_bias=torch.cat([gate, up], 1), w2_bias=down)
    rows = torch.arange(E, dtype=torch.int32, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        return (
            fused_experts(**args, expert_map=rows),
            cutlass_fused_moe(**peer, fc1_expert_biases=both, fc2_expert_biases=down, ep_size=2),
        )

    peer, both = on_gpu.flashinfer(), torch.cat([up, gate], 1)
    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    i.x = randn(T, D, dtype=torch.bfloat16)
    on_gpu.x.copy_(i.x)
    graph.replay()
    for out in outs:
        assert_matches(out, i.expected(biased=True))
