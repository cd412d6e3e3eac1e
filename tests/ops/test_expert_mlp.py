from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tml_kernels._routing import Routing, choose_blocking
from tml_kernels.moe import moe_route, prepare_moe_weights
from tml_kernels.ops.expert_mlp import fused_moe, workspace_bytes
from tml_kernels.ops.expert_mlp.api import flatten
from tml_kernels.ops.expert_mlp.cases import BENCH, EDGE, MODEL, PACKED, Case
from tml_kernels.ops.expert_mlp.configs import (
    MAX_ELEMENTS,
    Problem,
    choose_config,
    kernel_why_not,
    workspace_of,
)
from tml_kernels.ops.expert_mlp.launch import launch_expert_mlp
from tml_kernels.ops.expert_mlp.reference import fused_moe_ref
from tml_kernels.ops.route.reference import schedule_ref
from tml_kernels.quant import FORMATS, PackedExperts
from tml_kernels.testing import assert_bitwise, assert_matches, randn


def expected(inputs: dict[str, Any], **more: Any) -> Tensor:
    routing = inputs["routing"]
    return fused_moe_ref(
        inputs["x"], inputs["weights"], routing.expert_T_K, routing.weight_T_K,
        routing.shared_weight_T_Z, activation=inputs["activation"], **more,
    )  # fmt: skip


def rows(inputs: dict[str, Any], index: Any) -> dict[str, Any]:
    """The same call for some of the tokens."""
    r = inputs["routing"]
    parts = (r.expert_T_K, r.weight_T_K, r.shared_weight_T_Z)
    routing = Routing(*(part[index].contiguous() for part in parts), r.num_experts)
    return inputs | {"x": inputs["x"][index].contiguous(), "routing": routing}


def scheduled(inputs: dict[str, Any]) -> dict[str, Any]:
    """With the schedule that the router makes on CUDA, where there is one for so many tokens."""
    r = inputs["routing"]
    blocking = choose_blocking(*r.expert_T_K.shape, r.num_experts)
    if not blocking.scheduled:
        return inputs
    schedule = schedule_ref(r.expert_T_K, r.num_experts, blocking)
    return inputs | {"routing": replace(r, schedule=schedule)}


def launch(
    inputs: dict[str, Any], expert_map: Tensor | None = None, quantize_x: bool = False
) -> Tensor:
    x, weights, routing = inputs["x"], inputs["weights"], inputs["routing"]
    out = torch.full_like(x, float("nan"))
    size = workspace_bytes(weights, x.shape[0], routing.expert_T_K.shape[1], x.dtype)
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device=x.device)
    if x.shape[0] > 0:
        launch_expert_mlp(
            x, weights, routing, expert_map, inputs["activation"], quantize_x, out, workspace
        )
    return out


@pytest.mark.parametrize("case", EDGE + PACKED + MODEL, ids=str)
def test_public(case: Case) -> None:
    inputs = case.make_inputs("cpu")
    assert_matches(fused_moe(**inputs), expected(inputs))


@pytest.mark.parametrize("case", EDGE + PACKED + MODEL[:1], ids=str)
def test_kernel(case: Case, device: str) -> None:
    inputs = case.make_inputs(device)
    assert_matches(launch(scheduled(inputs)), expected(inputs))
    if case in EDGE:  # token-centric, whatever the number of tokens
        assert_matches(launch(inputs), expected(inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("case", EDGE + PACKED + MODEL, ids=str)
def test_gpu(case: Case) -> None:
    if case.precision or case.shared_precision == "fp32":
        case = replace(case, dtype=torch.bfloat16, shared_precision=None)
    inputs = case.make_inputs("cuda")
    routing = inputs["routing"]
    inputs["routing"] = moe_route(
        expert_T_K=routing.expert_T_K, weight_T_K=routing.weight_T_K,
        shared_weight_T_Z=routing.shared_weight_T_Z, num_experts=case.num_experts,
    )  # fmt: skip
    assert_matches(fused_moe(**inputs), expected(inputs), dtype=case.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4", "mxfp4", "nvfp4"])
def test_gpu_rows_do_not_depend_on_the_number_of_tokens(precision: str) -> None:
    """Every mode and block size of the kernels against each row alone, bit for bit."""
    case = Case(1024, 512, 256, 16, 4, 2, dtype=torch.bfloat16, precision=precision)
    inputs = case.make_inputs("cuda")

    def run(index: slice) -> Tensor:
        part = rows(inputs, index)
        r = part["routing"]
        part["routing"] = moe_route(
            expert_T_K=r.expert_T_K, weight_T_K=r.weight_T_K,
            shared_weight_T_Z=r.shared_weight_T_Z, num_experts=case.num_experts,
        )  # fmt: skip
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
    # e4m3 keeps 3 bits after the point: 2^-4 at most and 2^-5.5 in the mean per activation, twice.
    out = fused_moe(**inputs, quantize_x=True)
    assert_matches(out, expected(inputs), limit=5e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    inputs = Case(11, 64, 48, 4, 2, num_shared=1, dtype=dtype).make_inputs("cpu")
    assert_matches(fused_moe(**inputs), expected(inputs), dtype=dtype)


def test_reference_agrees_with_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers.models.inkling.configuration_inkling import InklingTextConfig
    from transformers.models.inkling.modeling_inkling import InklingExperts, InklingSharedExperts

    config = InklingTextConfig(
        hidden_size=32, moe_intermediate_size=24, n_routed_experts=6, n_shared_experts=2
    )
    routed, shared = InklingExperts(config), InklingSharedExperts(config)
    inputs = Case(13, 32, 24, 6, 3, num_shared=2).make_inputs("cpu")
    weights, routing = inputs["weights"], inputs["routing"]
    w13, shared_w13 = weights.w13.data, weights.shared.w13.data
    with torch.no_grad():
        routed.gate_up_proj.copy_(torch.cat([w13[:, 0::2], w13[:, 1::2]], dim=1))
        routed.down_proj.copy_(weights.w2.data)
        shared.gate_proj.copy_(shared_w13[:, 0::2])
        shared.up_proj.copy_(shared_w13[:, 1::2])
        shared.down_proj.copy_(weights.shared.w2.data)
        x = inputs["x"]
        theirs = routed(x, routing.expert_T_K.long(), routing.weight_T_K)
        theirs = theirs + shared(x, gammas=routing.shared_weight_T_Z)
    torch.testing.assert_close(expected(inputs).float(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["gate_up", "up_gate", "interleaved"])
def test_order_of_rows(order: str, device: str) -> None:
    """gate = 1, up = 3 in every hidden column: silu(1) * 3 * F."""
    gate, up = torch.full((1, 4, 1), 1.0), torch.full((1, 4, 1), 3.0)
    w13 = {
        "gate_up": torch.cat([gate, up], 1),
        "up_gate": torch.cat([up, gate], 1),
        "interleaved": torch.stack([gate, up], 2).flatten(1, 2),
    }[order].to(device)
    w2 = torch.ones(1, 1, 4, device=device)
    weights = prepare_moe_weights(w13, w2, layout=order, precision="fp32")
    ids = torch.zeros(1, 1, dtype=torch.int32, device=device)
    one = torch.ones(1, 1, device=device)
    routing = Routing(ids, one, one[:, :0], 1)
    value = 12 * torch.nn.functional.silu(torch.ones(())).item()
    out = fused_moe(one, weights, routing)
    assert out.item() == pytest.approx(value)
    inputs = {"x": one, "weights": weights, "routing": routing, "activation": "silu"}
    assert launch(inputs).item() == pytest.approx(value)


def test_row_does_not_depend_on_neighbours() -> None:
    inputs = Case(29, 128, 96, 5, 2, num_shared=2).make_inputs("cpu")
    alone = [fused_moe(**rows(inputs, slice(t, t + 1))) for t in range(29)]
    assert_bitwise(fused_moe(**inputs), torch.cat(alone))


def test_kernel_row_does_not_depend_on_neighbours(device: str) -> None:
    """Alone and token-centric, or in a block of the schedule, in any order of the tokens. One block
    size, as the interpreter's products are a BLAS's; `gpu` tests compare the sizes."""
    inputs = Case(21, 96, 48, 8, 2, num_shared=1).make_inputs(device)
    assert choose_blocking(21, 2, 8).size == choose_blocking(1, 2, 8).size
    together = launch(scheduled(inputs))
    alone = [launch(rows(inputs, slice(t, t + 1))) for t in range(21)]
    assert_bitwise(together, torch.cat(alone))
    order = torch.randperm(21)
    assert_bitwise(launch(scheduled(rows(inputs, order))), together[order])


def test_slot_order_is_the_order_of_the_sum(device: str) -> None:
    """Three experts that give 1, 1e8 and -1e8: only the order of the slots decides the sum."""
    w13 = torch.tensor([[[1.0], [1.0]]], device=device).repeat(3, 1, 1)
    w2 = torch.tensor([1.0, 1e8, -1e8], device=device).view(3, 1, 1)
    weights = prepare_moe_weights(w13, w2, layout="interleaved", precision="fp32")
    weight = torch.full((2, 3), 1.0 / torch.nn.functional.silu(torch.ones(1)).item())
    ids = torch.tensor([[0, 1, 2], [1, 2, 0]], dtype=torch.int32)
    routing = Routing(ids.to(device), weight.to(device), weight[:, :0].to(device), 3)
    inputs = {"x": torch.ones(2, 1, device=device), "weights": weights, "routing": routing,
              "activation": "silu"}  # fmt: skip
    for out in (fused_moe(**inputs), launch(inputs)):
        assert out[0].item() == 0.0
        assert out[1].item() == pytest.approx(1.0)


def test_identical_experts_make_the_dense_mlp() -> None:
    """Weights that sum to one over copies of one expert."""
    inputs = Case(9, 64, 48, 4, 3).make_inputs("cpu")
    w13, w2 = (side.data[:1] for side in (inputs["weights"].w13, inputs["weights"].w2))
    copies = (w13.repeat(4, 1, 1), w2.repeat(4, 1, 1))
    inputs["weights"] = prepare_moe_weights(*copies, layout="interleaved", precision="fp32")
    inputs["routing"].weight_T_K.div_(inputs["routing"].weight_T_K.sum(1, keepdim=True))
    gate, up = (inputs["x"].double() @ w13[0].double().T).view(9, 48, 2).unbind(2)
    dense = (torch.nn.functional.silu(gate) * up) @ w2[0].double().T
    assert_matches(fused_moe(**inputs), dense)


def test_same_expert_twice_counts_twice(device: str) -> None:
    inputs = Case(3, 32, 16, 4, 2).make_inputs(device)
    routing = inputs["routing"]
    routing.expert_T_K[:] = 2
    sum_T_1 = routing.weight_T_K.sum(1, keepdim=True)
    once = Routing(routing.expert_T_K[:, :1].clone(), sum_T_1, routing.shared_weight_T_Z, 4)
    for out in (fused_moe(**inputs), launch(inputs), launch(scheduled(inputs))):
        assert_matches(out, expected(inputs | {"routing": once}))


def test_untouched_experts_and_skipped_weights_may_hold_nan(device: str) -> None:
    inputs = Case(6, 32, 16, 4, 3, num_shared=1, skew="skip").make_inputs(device)
    routing, weights = inputs["routing"], inputs["weights"]
    ids = routing.expert_T_K
    ids[ids == 3] = 1  # nobody goes to expert 3
    plain, kernel = fused_moe(**inputs), launch(scheduled(inputs))
    weights.w13.data[3] = float("nan")
    weights.w2.data[3] = float("nan")
    routing.weight_T_K[(ids < 0) | (ids >= 4)] = float("nan")
    assert ((ids < 0) | (ids >= 4)).sum() >= 6
    assert_bitwise(fused_moe(**inputs), plain)
    assert_bitwise(launch(scheduled(inputs)), kernel)


def test_token_with_every_id_skipped_is_zero(device: str) -> None:
    inputs = Case(3, 32, 16, 4, 2).make_inputs(device)
    inputs["routing"].expert_T_K[1] = -1
    for out in (fused_moe(**inputs), launch(inputs)):
        assert (out[1] == 0).all()
        assert (out[[0, 2]] != 0).any(dim=1).all()


def test_nan_token_stays_in_its_row(device: str) -> None:
    inputs = Case(12, 32, 16, 2, 2, num_shared=1).make_inputs(device)
    others = [t for t in range(12) if t != 7]
    for run in (lambda i: fused_moe(**i), lambda i: launch(scheduled(i))):
        before = run(inputs)
        broken = inputs | {"x": inputs["x"].clone()}
        broken["x"][7] = float("nan")
        out = run(broken)
        assert out[7].isnan().all()
        assert_bitwise(out[others], before[others])


def test_expert_map_makes_shards_that_add_up(device: str) -> None:
    """Two devices with four of eight experts each: their outputs sum to the whole."""
    inputs = Case(7, 32, 16, 8, 3).make_inputs(device)
    weights, outs = inputs["weights"], []
    for first in (0, 4):
        data = [side.data[first : first + 4] for side in (weights.w13, weights.w2)]
        part = prepare_moe_weights(*data, layout="interleaved", precision="fp32")
        expert_map = torch.full((8,), -1, dtype=torch.int32, device=device)
        expert_map[first : first + 4] = torch.arange(4, dtype=torch.int32)
        shard = inputs | {"weights": part}
        plain = fused_moe(**shard, expert_map=expert_map)
        for given in (shard, scheduled(shard)):
            assert_matches(launch(given, expert_map), plain)
        outs.append(plain)
    assert_matches(outs[0] + outs[1], expected(inputs))


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


@pytest.mark.parametrize("case", [EDGE[2], EDGE[9], PACKED[4]], ids=str)
def test_opcheck(case: Case) -> None:
    inputs = replace(case, num_tokens=2).make_inputs("cpu")
    weights, routing = inputs["weights"], inputs["routing"]
    args = (
        inputs["x"], *flatten(weights), *flatten(weights.shared), routing.expert_T_K,
        routing.weight_T_K, routing.shared_weight_T_Z, None, 0, case.num_experts, None,
        case.activation, False, torch.empty_like(inputs["x"]), None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.tml_kernels.expert_mlp.default, args)


def test_experts_past_two_billion_elements(tmp_path: Path, device: str) -> None:
    """Expert 262,144 of 128 x 64 begins at element 2^31. A sparse file holds the pages in use."""
    if device == "cuda":
        pytest.skip("`test_gpu_experts_past_two_billion_elements` has as much memory as it takes")
    case = Case(1, 64, 64, 2, 2)
    inputs, num_experts = case.make_inputs("cpu"), 2**18 + 1
    small, routing = inputs["weights"], inputs["routing"]
    huge = []
    for name, side in (("w13", small.w13), ("w2", small.w2)):
        shape = (num_experts, *side.data.shape[1:])
        file = np.memmap(tmp_path / name, np.float32, "w+", shape=shape)
        data = torch.from_numpy(file)
        data[0], data[-1] = side.data[0], side.data[1]
        huge.append(data)
    assert huge[0].stride(0) * (num_experts - 1) == 2**31
    ids = torch.where(routing.expert_T_K == 0, 0, num_experts - 1).to(torch.int32)
    far = inputs | {
        "weights": prepare_moe_weights(*huge, layout="interleaved", precision="fp32"),
        "routing": replace(routing, expert_T_K=ids, num_experts=num_experts),
    }
    assert_bitwise(launch(far), launch(inputs))
    assert_bitwise(fused_moe(**far), fused_moe(**inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_gpu_experts_past_two_billion_elements(precision: str) -> None:
    """256 experts of 4096 x 4096 are 4.3 G elements: the last ones against themselves alone."""
    case = Case(3, 4096, 2048, 256, 2, dtype=torch.bfloat16, precision=precision)
    inputs = case.make_inputs("cuda")
    inputs["routing"].expert_T_K.add_(254).clamp_(max=255)
    assert_matches(fused_moe(**inputs), expected(inputs), dtype=torch.bfloat16)


def test_an_expert_too_large_for_32_bit_offsets_is_refused() -> None:
    empty = torch.empty(0, 0, 0)
    huge = PackedExperts(FORMATS["bf16"], empty, None, None, None, 65536, 65536)
    assert str(MAX_ELEMENTS) in str(kernel_why_not(torch.bfloat16, huge))
    fits = PackedExperts(FORMATS["bf16"], empty, None, None, None, 32768, 65535)
    assert kernel_why_not(torch.bfloat16, fits) is None
    packed = PackedExperts(FORMATS["int4"], empty, None, None, None, 256, 256)
    assert "float16" in str(kernel_why_not(torch.float16, packed))


@pytest.mark.parametrize(
    ("num_experts", "top_k"),
    [(1, 1), (8, 2), (60, 4), (128, 8), (256, 6), (384, 7), (512, 10), (10, 9), (6, 3), (7, 5)],
)
def test_any_number_of_experts(num_experts: int, top_k: int, device: str) -> None:
    inputs = Case(6, 24, 8, num_experts, top_k, num_shared=1).make_inputs(device)
    assert_matches(fused_moe(**inputs), expected(inputs))
    assert_matches(launch(scheduled(inputs)), expected(inputs))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int4", "mxfp4"])
def test_odd_model_widths(precision: str, device: str) -> None:
    """gpt-oss's hidden 2880 and an expert width of 704: no multiple of a step of any format."""
    case = Case(1, 2880, 704, 2, 1, order="gate_up", precision=precision)
    inputs = case.make_inputs(device)
    assert_matches(fused_moe(**inputs), expected(inputs))
    assert_matches(launch(inputs), expected(inputs))


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
    other = replace(problem, block_n=2 * block_n)
    assert "block" in str(choose_config(problem).why_not(other))


def small() -> dict[str, Any]:
    weights = prepare_moe_weights(
        torch.zeros(4, 12, 8), torch.zeros(4, 8, 6), layout="gate_up", precision="fp32"
    )
    ids, one = torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)
    return {"x": torch.zeros(3, 8), "weights": weights, "routing": Routing(ids, one, one[:, :0], 4)}


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


def test_out_is_not_x() -> None:
    inputs = small()
    with pytest.raises(ValueError, match="out: must not be x"):
        fused_moe(**inputs, out=inputs["x"])


def test_writes_into_out_with_a_workspace_of_any_content() -> None:
    inputs = Case(3, 32, 16, 4, 2).make_inputs("cpu")
    size = workspace_bytes(inputs["weights"], 3, 2, torch.float32)
    out, workspace = randn(3, 32), torch.full((size,), 7, dtype=torch.uint8)
    assert fused_moe(**inputs, out=out, workspace=workspace) is out
    assert_bitwise(out, fused_moe(**inputs))
