"""Runs the router's kernel on any device, and checks what it leaves behind."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from tml_kernels._routing import Blocking, Routing, Schedule, new_scratch, scratch_sizes
from tml_kernels.ops.route.cases import Case, split_inputs
from tml_kernels.ops.route.configs import Config
from tml_kernels.ops.route.kernel import launch_route
from tml_kernels.ops.route.reference import schedule_ref
from tml_kernels.testing import assert_bitwise

TENSORS = ("expert_T_K", "weight_T_K", "shared_weight_T_Z")


SCHEDULED = Blocking(16, scheduled=True)


def empty_routing(case: Case, device: str, blocking: Blocking | None = SCHEDULED) -> Routing:
    """With scratch, and a schedule if blocking is given, on the CPU too."""
    sizes = (case.num_tokens, case.top_k, case.num_shared, case.num_experts)
    schedule = None
    if blocking is not None:
        schedule = Schedule.empty(blocking, *sizes[:2], case.num_experts, device)
    scratch = new_scratch(*sizes, device, width=case.width)
    empty = Routing.empty(*sizes, device, late_norm=case.late_norm)
    return replace(empty, schedule=schedule, scratch=scratch)


def run_kernel(inputs: dict, out: Routing, config: Config | None = None) -> Routing:
    given, rule = split_inputs(inputs)
    schedule = out.schedule
    launch_route(
        given["x_T_D"], given.get("w_gate_A_D"), given["bias_E"], given["logit_bias_A"],
        given["global_scale_1"], given.get("residual_T_D"),
        rule.scoring, rule.renormalize, rule.num_groups, rule.top_groups, rule.scale, 1e-6,
        schedule.blocking.size if schedule else 0, schedule.max_blocks if schedule else 0,
        out.expert_T_K, out.weight_T_K, out.shared_weight_T_Z, out.inv_rms_T,
        schedule.buffer if schedule else None, out.scratch, config,
    )  # fmt: skip
    return out


def assert_schedule(schedule: Schedule, expert_T_K: Tensor, num_experts: int) -> None:
    """Bitwise the oracle's, wherever that is defined."""
    expected = schedule_ref(expert_T_K, num_experts, schedule.blocking)
    assert schedule.max_blocks == expected.max_blocks
    defined = expected.buffer != -1
    assert_bitwise(schedule.buffer[defined], expected.buffer[defined])


def assert_counters(out: Routing) -> None:
    """Zero, as the next launch needs them."""
    tokens, top_k = out.expert_T_K.shape
    assert out.scratch is not None
    assert not out.scratch[: scratch_sizes(tokens, top_k, 0, out.num_experts, 0)[0]].any()


def assert_same(actual: Routing, expected: Routing, rows: object = slice(None)) -> None:
    names = TENSORS if expected.inv_rms_T is None else (*TENSORS, "inv_rms_T")
    for name in names:
        assert_bitwise(getattr(actual, name)[rows], getattr(expected, name)[rows])
