from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_expert_mlp import expected, launch, rows, scheduled

from tml_kernels._routing import Routing, choose_blocking
from tml_kernels.moe import prepare_moe_weights
from tml_kernels.ops.expert_mlp import fused_moe
from tml_kernels.ops.expert_mlp.cases import EDGE, MODEL, PACKED, Case
from tml_kernels.ops.expert_mlp.reference import round_to_fp8
from tml_kernels.testing import assert_bitwise, assert_matches, relative_l2


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


@pytest.mark.parametrize("precision", ["fp8", "fp8_channel"])
def test_quantized_activations_are_rounded_like_the_weights(precision: str) -> None:
    """Powers of two survive; others err by e4m3's 2^-4 at most, about 3 % in the mean."""
    case = Case(5, 160, 72, 4, 2, 1, precision=precision)
    inputs = case.make_inputs("cpu")
    out = fused_moe(**inputs, quantize_x=True)
    assert_matches(out, expected(inputs, quantize_x=True), limit=2e-3)
    assert 1e-2 < relative_l2(out, expected(inputs)) < 8e-2
    x = torch.randn(3, 300)
    error = (round_to_fp8(x) - x).abs() / x.abs().clamp(min=0.05)
    assert 0.01 < error.max() <= 2.0**-4
    exact = 2.0 ** torch.randint(-6, 1, (3, 300)) * 448.0
    assert_bitwise(round_to_fp8(exact), exact)


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


def test_what_a_map_names_outside_the_weights_is_skipped(device: str) -> None:
    inputs = Case(7, 32, 16, 8, 3).make_inputs(device)
    data = [side.data[:4] for side in (inputs["weights"].w13, inputs["weights"].w2)]
    inputs["weights"] = prepare_moe_weights(
        *data, layout="interleaved", precision="fp32", inplace=True
    )
    expert_map = torch.arange(8, dtype=torch.int32, device=device)  # rows 4..7 lie behind
    expert_map[0] = -3
    plain = fused_moe(**inputs, expert_map=expert_map)
    assert_bitwise(plain, fused_moe(**inputs, expert_map=expert_map.where(expert_map < 4, -1)))
    for given in (inputs, scheduled(inputs)):
        assert_matches(launch(given, expert_map), plain)


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
