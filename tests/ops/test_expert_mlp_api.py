"""fused_moe: arguments, sizes and choices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tml_kernels._routing import Blocking, Routing, Schedule
from tml_kernels.moe import prepare_moe_weights
from tml_kernels.ops.expert_mlp import fused_moe, workspace_bytes
from tml_kernels.ops.expert_mlp.api import flatten
from tml_kernels.ops.expert_mlp.cases import BENCH, EDGE, PACKED, Case
from tml_kernels.ops.expert_mlp.configs import (
    MAX_ELEMENTS,
    Problem,
    choose_config,
    kernel_why_not,
    quantized_why_not,
    workspace_of,
)
from tml_kernels.quant import FORMATS, PackedExperts
from tml_kernels.testing import assert_bitwise, randn


def test_cost_counts_each_touched_expert_once() -> None:
    one_token = BENCH[0]
    assert one_token.cost().flops == 2 * 6 * 3 * 4096 * 2048
    assert one_token.cost().bytes == 6 * 3 * 4096 * 2048 * 2 + 2 * 4096 * 2 + 6 * 8
    assert Case(19, 32, 16, 4, 2, skew="one").cost().bytes < Case(19, 32, 16, 4, 2).cost().bytes
    int4 = replace(one_token, precision="int4").cost().bytes
    assert int4 - one_token.cost().bytes == 6 * 3 * 4096 * 2048 * (4.125 / 8 - 2)


def test_zipf_skews_and_draws_without_replacement() -> None:
    case = Case(64, 32, 16, 256, 6, skew="zipf")
    ids = case.expert_ids()
    assert all(row.unique().numel() == 6 for row in ids)
    uniform = replace(case, skew="uniform").expert_ids()
    assert ids.unique().numel() < uniform.unique().numel()


@pytest.mark.parametrize("case", [EDGE[2], EDGE[9], EDGE[-1], PACKED[4]], ids=str)
def test_opcheck(case: Case) -> None:
    inputs = replace(case, num_tokens=2).make_inputs("cpu")
    weights, routing = inputs["weights"], inputs["routing"]
    args = (
        inputs["x"], *flatten(weights), *flatten(weights.shared), routing.expert_T_K,
        routing.weight_T_K, routing.shared_weight_T_Z, routing.inv_rms_T, None, 0,
        case.num_experts, None,
        case.activation, False, torch.empty_like(inputs["x"]), None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.tml_kernels.expert_mlp.default, args)


def test_an_expert_too_large_for_32_bit_offsets_is_refused() -> None:
    empty = torch.empty(0, 0, 0)
    huge = PackedExperts(FORMATS["bf16"], empty, None, None, None, 65536, 65536)
    assert str(MAX_ELEMENTS) in str(kernel_why_not(torch.bfloat16, huge))
    fits = PackedExperts(FORMATS["bf16"], empty, None, None, None, 32768, 65535)
    assert kernel_why_not(torch.bfloat16, fits) is None
    packed = PackedExperts(FORMATS["int4"], empty, None, None, None, 256, 256)
    assert "float16" in str(kernel_why_not(torch.float16, packed))


def test_workspace_sizes_are_64_bit_and_grow() -> None:
    sizes = [workspace_of(t, 8, 4096, 2048, torch.bfloat16).size for t in (0, 1, 64, 1 << 20)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 2**32
    layout = workspace_of(3, 2, 77, 33, torch.float32)
    h, part, counter = layout.carve(torch.empty(layout.size, dtype=torch.uint8), torch.float32)
    assert h.numel() >= 6 * 33 and part.numel() >= 6 * 77 and counter.numel() >= 3


@pytest.mark.parametrize("block_n", [16, 32, 64])
@pytest.mark.parametrize("format", ["plain", "fp8", "fp8_channel", "int4", "mxfp4", "nvfp4"])
def test_chosen_configs_are_legal(format: str, block_n: int) -> None:
    problem = Problem(format, "fp8", block_n)
    assert choose_config(problem).why_not(problem) is None
    alone = Problem(format, format, block_n)  # wider blocks of deep pipelines do not fit anywhere
    assert block_n == 16 or choose_config(alone).num_stages <= 4
    other = replace(problem, block_n=2 * block_n)
    assert "block" in str(choose_config(problem).why_not(other))


def test_four_bits_of_float32_tokens_take_fewer_stages_before_sm_90() -> None:
    """Of 163 KB; bench/kernel_table.json has what they take."""
    for format in ("int4", "int4_f16", "mxfp4", "nvfp4"):
        for shared in (format, "fp8"):
            narrow, wide = (
                choose_config(Problem(format, shared, n, cramped=True)) for n in (16, 64)
            )
            assert narrow.num_stages <= 4 and wide.num_stages == 2
    for problem in (Problem("fp8", "fp8", 64), Problem("plain", "plain", 16)):
        assert choose_config(replace(problem, cramped=True)) == choose_config(problem)


def small() -> dict[str, Any]:
    weights = prepare_moe_weights(
        torch.zeros(4, 12, 8), torch.zeros(4, 8, 6), layout="gate_up", precision="fp32"
    )
    ids, one = torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)
    return {"x": torch.zeros(3, 8), "weights": weights, "routing": Routing(ids, one, one[:, :0], 4)}


def schedule_for(num_tokens: int, dtype: torch.dtype = torch.int32) -> Schedule:
    made = Schedule.empty(Blocking(16, scheduled=True), num_tokens, 2, 4, "cpu")
    return replace(made, buffer=made.buffer.to(dtype))


def routing_with(**fields: Any) -> Routing:
    return replace(small()["routing"], **fields)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(3, 9)}, ValueError, "x_T_D: D=9, but the weights are for D=8"),
        ({"x": torch.zeros(3)}, ValueError, "x_T_D: expected 2 axes"),
        ({"x": torch.zeros(3, 8, dtype=torch.int8)}, TypeError, "x_T_D.*int8"),
        ({"x": torch.zeros(3, 8, device="meta")}, ValueError, "weights: expected device meta"),
        ({"weights": torch.zeros(4, 12, 8)}, TypeError, "weights: expected MoEWeights.*Tensor"),
        ({"routing": torch.zeros(3, 2)}, TypeError, "routing: expected Routing.*Tensor"),
        ({"routing": routing_with(num_experts=5)}, ValueError, "num_experts=5.*hold 4"),
        (
            {"routing": routing_with(expert_T_K=torch.zeros(3, 2).long())},
            TypeError,
            "expert_T_K.*int64",
        ),
        (
            {"routing": routing_with(expert_T_K=torch.zeros(3, 0).int())},
            ValueError,
            "weight_T_K: K=2, but K=0",
        ),
        (
            {"routing": routing_with(weight_T_K=torch.zeros(3, 3))},
            ValueError,
            "weight_T_K: K=3, but K=2",
        ),
        (
            {"routing": routing_with(inv_rms_T=torch.zeros(2))},
            ValueError,
            "inv_rms_T: T=2, but T=3",
        ),
        (  # of five tokens, of which only three are given
            {"routing": routing_with(schedule=schedule_for(5))},
            ValueError,
            r"routing.schedule: expected 4 blocks in 16 words, got 4 in \(20,\)",
        ),
        (
            {"routing": routing_with(schedule=schedule_for(3, torch.float32))},
            TypeError,
            "routing.schedule.buffer: expected torch.int32, got torch.float32",
        ),
        (
            {"routing": routing_with(shared_weight_T_Z=torch.zeros(3, 1))},
            ValueError,
            "shared_weight_T_Z: Z=1, but Z=0",
        ),
        ({"activation": "relu"}, ValueError, "activation.*silu.*got 'relu'"),
        ({"quantize_x": True}, ValueError, "quantize_x: needs fp8 weights.*fp32"),
        ({"expert_map": torch.zeros(5).int()}, ValueError, "expert_map_G: G=5, but G=4"),
        ({"expert_map": torch.zeros(4)}, TypeError, "expert_map_G.*float32"),
        ({"out": torch.zeros(3, 8).bfloat16()}, TypeError, "out_T_D.*bfloat16"),
        ({"workspace": torch.zeros(7).byte()}, ValueError, "workspace: expected .* bytes.*got 7"),
        ({"x": torch.zeros(3, 8, requires_grad=True)}, RuntimeError, "no backward"),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        fused_moe(**small() | change)


def test_kernels_of_quantized_activations_want_sixteens() -> None:
    def packed(num_columns: int) -> PackedExperts:
        empty = torch.empty(0, dtype=torch.uint8)
        return PackedExperts(FORMATS["fp8"], empty, None, None, None, 64, num_columns)

    assert quantized_why_not(packed(80), 32) is None
    assert quantized_why_not(packed(72), 0) == "needs D and F that 16 divides, and one is 72"
    assert "begin at a multiple of 16 bytes, and it is at 2" in str(
        quantized_why_not(packed(80), 2)
    )


def test_out_is_not_x() -> None:
    inputs = small()
    with pytest.raises(ValueError, match="out: must not be x"):
        fused_moe(**inputs, out=inputs["x"])


def test_compiles_whole_with_out() -> None:
    inputs = small()
    out = torch.empty_like(inputs["x"])
    run = torch.compile(lambda **given: fused_moe(**given), fullgraph=True, backend="eager")
    assert_bitwise(run(**inputs, out=out), fused_moe(**inputs))


def test_writes_into_out_with_a_workspace_of_any_content() -> None:
    inputs = Case(3, 32, 16, 4, 2).make_inputs("cpu")
    size = workspace_bytes(inputs["weights"], 3, 2, torch.float32)
    out, workspace = randn(3, 32), torch.full((size,), 7, dtype=torch.uint8)
    assert fused_moe(**inputs, out=out, workspace=workspace) is out
    assert_bitwise(out, fused_moe(**inputs))
