"""fused_moe on a GPU: what neither the interpreter nor the compiler can tell."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_expert_mlp import expected, rows
from torch import Tensor

from tml_kernels._routing import Routing
from tml_kernels.moe import moe_route
from tml_kernels.ops.expert_mlp import fused_moe, workspace_bytes
from tml_kernels.ops.expert_mlp.cases import EDGE, MODEL, PACKED, Case
from tml_kernels.testing import assert_bitwise, assert_matches, relative_l2


def put_in_order(r: Routing) -> Routing:
    """With the schedule that the router makes of ready ids."""
    made = moe_route(
        expert_T_K=r.expert_T_K, weight_T_K=r.weight_T_K, shared_weight_T_Z=r.shared_weight_T_Z,
        num_experts=r.num_experts,
    )  # fmt: skip
    return replace(made, inv_rms_T=r.inv_rms_T)


@pytest.mark.gpu
@pytest.mark.parametrize("case", EDGE + PACKED + MODEL, ids=str)
def test_gpu(case: Case) -> None:
    if case.precision or case.shared_precision == "fp32":
        case = replace(case, dtype=torch.bfloat16, shared_precision=None)
    inputs = case.make_inputs("cuda")
    inputs["routing"] = put_in_order(inputs["routing"])
    assert_matches(fused_moe(**inputs), expected(inputs), dtype=case.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4", "mxfp4", "nvfp4"])
def test_gpu_rows_do_not_depend_on_the_number_of_tokens(precision: str) -> None:
    """Every mode and block size of the kernels against each row alone, bit for bit."""
    case = Case(1024, 512, 256, 16, 4, 2, dtype=torch.bfloat16, precision=precision, late_norm=True)
    inputs = case.make_inputs("cuda")

    def run(index: slice) -> Tensor:
        part = rows(inputs, index)
        part["routing"] = put_in_order(part["routing"])
        return fused_moe(**part)

    alone = torch.cat([run(slice(t, t + 1)) for t in range(1024)])
    for size in (2, 4, 5, 16, 32, 33, 64, 200, 256, 1024):
        together = torch.cat([run(slice(t, t + size)) for t in range(0, 1024, size)])
        assert_bitwise(together, alone)
    for _ in range(20):
        assert_bitwise(run(slice(0, 64)), alone[:64])


@pytest.mark.gpu
def test_gpu_replays_in_a_graph() -> None:
    """New rows in the same tensors: nothing of the first run is remembered."""
    case = Case(24, 512, 256, 16, 4, 2, dtype=torch.bfloat16, precision="int4")
    inputs = case.make_inputs("cuda")
    routing = Routing.empty(24, 4, 2, 16, "cuda")
    out = torch.empty_like(inputs["x"])
    size = workspace_bytes(inputs["weights"], 24, 4, torch.bfloat16)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")

    def step() -> None:
        moe_route(expert_T_K=ids, weight_T_K=weight, shared_weight_T_Z=shared, num_experts=16,
                  out=routing)  # fmt: skip
        fused_moe(**inputs | {"routing": routing}, out=out, workspace=workspace)

    r = inputs["routing"]
    ids, weight, shared = (t.clone() for t in (r.expert_T_K, r.weight_T_K, r.shared_weight_T_Z))
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(5):
        inputs["x"].copy_(torch.randn_like(inputs["x"]))
        ids.copy_(torch.rand(24, 16, device="cuda").argsort(1)[:, :4])
        graph.replay()
        replayed = out.clone()
        step()
        assert_bitwise(replayed, out)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp8", "fp8_channel"])
def test_gpu_quantized_activations(precision: str) -> None:
    case = Case(33, 512, 256, 8, 2, 1, dtype=torch.bfloat16, precision=precision)
    inputs = case.make_inputs("cuda")
    # The hidden row is bf16 before it is rounded to e4m3, so that some values, and here and there
    # a scale, round to the neighbour of the oracle's: far less than e4m3's own 2^-5 of error.
    out = fused_moe(**inputs, quantize_x=True)
    assert_matches(out, expected(inputs, quantize_x=True), limit=2e-2)
    assert relative_l2(out, expected(inputs)) > 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_gpu_experts_past_two_billion_elements(precision: str) -> None:
    """256 experts of 4096 x 4096 are 4.3 G elements: the last ones against themselves alone."""
    case = Case(3, 4096, 2048, 256, 2, dtype=torch.bfloat16, precision=precision)
    inputs = case.make_inputs("cuda")
    inputs["routing"].expert_T_K.add_(254).clamp_(max=255)
    assert_matches(fused_moe(**inputs), expected(inputs), dtype=torch.bfloat16)
