"""expert_hidden and expert_sum on parts of every expert: together bitwise fused_moe."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_expert_mlp import scheduled
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tml_kernels._routing import Blocking, Routing, Schedule
from tml_kernels.moe import moe_route
from tml_kernels.moe_weights import MoEWeights, part_of
from tml_kernels.ops.expert_mlp import expert_hidden, expert_sum, fused_moe
from tml_kernels.ops.expert_mlp.cases import Case
from tml_kernels.ops.expert_mlp.configs import BLOCK_M
from tml_kernels.ops.expert_mlp.halves import _hidden_op
from tml_kernels.ops.expert_mlp.launch import launch_down, launch_gate_up
from tml_kernels.testing import assert_bitwise, assert_matches

CASES = [
    Case(0, 64, 64, 4, 2),  # no tokens
    Case(1, 64, 64, 4, 2, num_shared=1),  # one token
    Case(5, 96, 32, 5, 3, num_shared=2),
    Case(19, 64, 64, 4, 2, skew="one"),  # over two blocks
    Case(6, 64, 64, 4, 3, skew="skip"),  # a token that no expert writes
    Case(6, 64, 64, 4, 3, num_shared=1, skew="skip"),
    Case(7, 160, 64, 4, 2, order="gate_up", bias=True, activation="swiglu_oai"),
    Case(9, 64, 64, 4, 2, 1, order="up_gate", activation="gelu_tanh"),
    Case(7, 96, 32, 5, 3, 2, skew="skip", bias=True, late_norm=True),
    *(
        Case(5, 512, 256, 4, 2, 1, precision=precision, shared_precision=shared)
        for precision, shared in (
            ("fp8", "fp8"), ("fp8_channel", "fp8"), ("int4", "fp8"), ("int4_f16", "fp32"),
            ("mxfp4", "fp8_channel"), ("nvfp4", "nvfp4"),
        )
    ),
]  # fmt: skip


def by_parts(inputs: dict, parts: int) -> Tensor:
    x, weights, routing = inputs["x"], inputs["weights"], inputs["routing"]
    shares = [part_of(weights, part, parts) for part in range(parts)]
    h = torch.cat([expert_hidden(x, share, routing, activation=inputs["activation"])
                   for share in shares], dim=2)  # fmt: skip
    return torch.cat([expert_sum(h, share, routing, dtype=x.dtype) for share in shares], dim=1)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_make_the_whole(case: Case, parts: int) -> None:
    inputs = case.make_inputs("cpu")
    assert_bitwise(by_parts(inputs, parts), fused_moe(**inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows_round_once(dtype: torch.dtype) -> None:
    inputs = Case(5, 64, 64, 4, 2, 1, dtype=dtype).make_inputs("cpu")
    assert_bitwise(by_parts(inputs, 2), fused_moe(**inputs))


def launch_parts(inputs: dict, parts: int) -> Tensor:
    """The kernels themselves, through the interpreter where there is no GPU."""
    x, weights, routing = inputs["x"], inputs["weights"], inputs["routing"]
    num_tokens, num_slots = x.shape[0], routing.expert_T_K.shape[1] + weights.num_shared
    shares = [part_of(weights, part, parts) for part in range(parts)]
    hidden, outs = [], []
    for share in shares:
        h = x.new_full((num_tokens, num_slots, weights.expert_width // parts), float("nan"))
        launch_gate_up(x, share, routing, None, inputs["activation"], False, h, h.shape[2],
                       routing.expert_T_K, 0, torch.empty_like(x))  # fmt: skip
        hidden.append(h)
    h = torch.cat(hidden, dim=2)
    for share in shares:
        width = weights.width // parts
        out = x.new_zeros(num_tokens, width)
        part = x.new_full((num_tokens * num_slots * width,), float("nan"), dtype=torch.float32)
        counter = torch.zeros(num_tokens * -(-width // BLOCK_M), dtype=torch.int32, device=x.device)
        launch_down(h, h.shape[2], share, routing, None, False, part, counter, out)
        outs.append(out)
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize(
    "case", [CASES[2], replace(CASES[3], num_tokens=5), CASES[4], CASES[8], CASES[9]], ids=str
)
def test_kernel_parts_make_the_whole(case: Case, device: str) -> None:
    if device == "cuda":
        case = replace(case, dtype=torch.bfloat16, shared_precision=None)
    inputs = scheduled(case.make_inputs(device))
    parts, whole = launch_parts(inputs, 2), launch_parts(inputs, 1)
    if device == "cuda":
        assert_bitwise(parts, whole)
    else:  # the interpreter's products depend on where in its tile a row lies
        assert_matches(parts, whole, limit=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("num_tokens", [1, 4, 5, 33, 200])
def test_gpu_parts_make_the_whole(num_tokens: int, precision: str) -> None:
    case = Case(num_tokens, 1024, 512, 16, 4, 2, dtype=torch.bfloat16, precision=precision)
    inputs = case.make_inputs("cuda")
    r = inputs["routing"]
    inputs["routing"] = moe_route(
        expert_T_K=r.expert_T_K, weight_T_K=r.weight_T_K, shared_weight_T_Z=r.shared_weight_T_Z,
        num_experts=case.num_experts,
    )  # fmt: skip
    for parts in (1, 2, 4):
        assert_bitwise(by_parts(inputs, parts), fused_moe(**inputs))


def weights_of(case: Case = CASES[1]) -> MoEWeights:
    return case.make_inputs("cpu")["weights"]


def test_refusals() -> None:
    inputs = CASES[1].make_inputs("cpu")
    x, whole, routing = inputs["x"], inputs["weights"], inputs["routing"]
    share = part_of(whole, 0, 2)
    with pytest.raises(ValueError, match="D=64 is not a multiple of 3 parts"):
        part_of(whole, 0, 3)
    with pytest.raises(ValueError, match="one of 2 parts already"):
        part_of(share, 0, 2)
    with pytest.raises(ValueError, match="one of 2 parts of every expert"):
        fused_moe(x, share, routing)
    with pytest.raises(ValueError, match="shared: parts=1"):
        replace(share, shared=whole.shared)
    with pytest.raises(TypeError, match="expected Routing"):
        expert_hidden(x, share, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_experts=9"):
        expert_hidden(x, share, replace(routing, num_experts=9))
    with pytest.raises(ValueError, match="S=2, but tokens have 2 experts and 1 shared"):
        expert_sum(x.new_zeros(1, 2, 64), share, routing)
    other = Routing(routing.expert_T_K, routing.weight_T_K, x.new_zeros(1, 3), 4)
    with pytest.raises(ValueError, match="shared_weight_T_Z"):
        expert_hidden(x, share, other)
    schedule = Schedule.empty(Blocking(16, scheduled=True), 2, 2, 4, "cpu")
    for call in (expert_hidden, lambda x, *rest: expert_sum(x.new_zeros(1, 3, 64), *rest)):
        with pytest.raises(ValueError, match=r"routing.schedule: expected 2 blocks"):
            call(x, share, replace(routing, schedule=schedule))
        with pytest.raises(TypeError, match=r"weights: expected MoEWeights.*NoneType"):
            call(x, None, routing)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"activation: expected one of .*silu.*, got 'relu'"):
        expert_hidden(x, share, routing, activation="relu")
    with pytest.raises(TypeError, match=r"dtype: expected .*, got torch.int32"):
        expert_sum(x.new_zeros(1, 3, 64), share, routing, dtype=torch.int32)


def test_fp8_rows_that_would_share_a_scale_are_refused() -> None:
    whole = weights_of(Case(1, 512, 192, 2, 1, precision="fp8", dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="fp8 has a scale for 128 rows"):
        part_of(whole, 1, 2)  # rows 192..383 of w13


def test_opcheck() -> None:
    inputs = CASES[1].make_inputs("cpu")
    share = part_of(inputs["weights"], 1, 2)
    recorded = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "tml_kernels":
                recorded.append((func, args))
            return func(*args, **(kwargs or {}))

    with Recorder():
        h = expert_hidden(inputs["x"], share, inputs["routing"])
        expert_sum(torch.cat([h, h], dim=2), share, inputs["routing"])
    assert [func.name() for func, _ in recorded] == [
        "tml_kernels::expert_hidden",
        "tml_kernels::expert_sum",
    ]
    assert recorded[0][0] is _hidden_op
    for func, args in recorded:
        torch.library.opcheck(func, args)
