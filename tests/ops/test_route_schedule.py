from __future__ import annotations

from dataclasses import replace
from typing import Any

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

from tml_kernels._routing import (
    GROUP_T,
    Blocking,
    Schedule,
    choose_blocking,
    new_scratch,
    scratch_sizes,
)
from tml_kernels.ops.route import Routing, moe_route
from tml_kernels.ops.route.cases import BENCH, Case, assert_routes
from tml_kernels.ops.route.configs import MAX_EXPERTS, SHIPPED, Problem, choose_config
from tml_kernels.ops.route.kernel import launch_route_schedule
from tml_kernels.ops.route.reference import schedule_ref
from tml_kernels.testing import assert_bitwise, randn

LATE = [case for case in BENCH if case.late_norm]


def ints(values: list, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def by_hand(expert_T_K: Tensor, num_experts: int, size: int) -> tuple[list, list, list]:
    """(order, begin, expert of each block), by lists: no sort, no prefix sums."""
    assignments = list(enumerate(expert_T_K.flatten().tolist()))
    order, begin, expert = [], [], []
    for e in range(num_experts):
        mine = [a for a, chosen in assignments if chosen == e]
        for i in range(0, len(mine), size):
            begin.append(len(order) + i)
            expert.append(e)
        order += mine
    return order, [*begin, len(order)], expert


def run_schedule(expert_T_K: Tensor, num_experts: int, blocking: Blocking) -> Schedule:
    tokens, top_k = expert_T_K.shape
    schedule = Schedule.empty(blocking, tokens, top_k, num_experts, expert_T_K.device)
    scratch = new_scratch(tokens, top_k, 0, num_experts, expert_T_K.device)
    launch_route_schedule(
        expert_T_K, num_experts, blocking.size, schedule.max_blocks, schedule.buffer, scratch
    )
    assert not scratch[: scratch_sizes(tokens, top_k, 0, num_experts, 0)[0]].any()
    return schedule


def draw_ids(kind: str, tokens: int, top_k: int, num_experts: int) -> Tensor:
    if kind == "one":  # all on one expert, several times in a row
        return torch.full((tokens, top_k), num_experts - 1, dtype=torch.int32)
    if kind == "none":
        return torch.full((tokens, top_k), -1, dtype=torch.int32)
    if kind == "stray":  # also ids of nobody, and the same id twice in a row
        return torch.randint(-3, num_experts + 3, (tokens, top_k), dtype=torch.int32)
    return torch.rand(tokens, num_experts).argsort(1)[:, :top_k].int()


SCHEDULES = [
    ("distinct", 1, 1, 1, 16),
    ("distinct", 9, 3, 13, 2),
    ("stray", 33, 3, 7, 4),
    ("stray", 20, 5, 60, 16),
    ("one", 37, 2, 8, 16),
    ("none", 11, 2, 8, 16),
    ("distinct", 64, 6, 256, 16),
    ("stray", 300, 8, 128, 64),
    ("distinct", 1024, 10, 512, 64),
]


@pytest.mark.parametrize(("kind", "tokens", "top_k", "experts", "size"), SCHEDULES)
def test_schedule(kind: str, tokens: int, top_k: int, experts: int, size: int, device: str) -> None:
    blocking = Blocking(size, scheduled=True)
    ids = draw_ids(kind, tokens, top_k, experts)
    order, begin, expert = by_hand(ids, experts, size)
    reference = schedule_ref(ids, experts, blocking)
    for schedule in (reference, run_schedule(ids.to(device), experts, blocking)):
        assert schedule.num_blocks_1.tolist() == [len(expert)]
        assert schedule.order_A[: len(order)].tolist() == order
        assert schedule.begin_B1[: len(begin)].tolist() == begin
        assert schedule.expert_B[: len(expert)].tolist() == expert
        assert len(expert) <= schedule.max_blocks


def test_example_of_schedule(device: str) -> None:
    """The numbers in its docstring."""
    ids = ints([[5, 0], [2, 5], [5, 9]], device)
    schedule = run_schedule(ids, 8, Blocking(2, scheduled=True))
    assert schedule.order_A[:5].tolist() == [1, 2, 0, 3, 4]
    assert schedule.num_blocks_1.tolist() == [4]
    assert schedule.expert_B[:4].tolist() == [0, 2, 5, 5]
    assert schedule.begin_B1[:5].tolist() == [0, 1, 2, 4, 5]


def test_blocking_covers_every_routing() -> None:
    for tokens in (1, 4, 5, 64, 65, 1024):
        for top_k, experts in ((1, 1), (2, 8), (6, 256), (10, 512)):
            blocking = choose_blocking(tokens, top_k, experts)
            assert blocking.scheduled == (tokens > 4)
            if blocking.scheduled:
                for kind in ("one", "distinct"):
                    ids = draw_ids(kind, tokens, top_k, experts)
                    made = schedule_ref(ids, experts, blocking)
                    assert int(made.num_blocks_1) <= made.max_blocks


def test_every_configuration_and_any_order_of_programs(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs one after another in a random order, each time on the buffers of the last time."""
    case = Case(37, 600, 24, 3, 2)
    inputs = case.make_inputs(device)
    out = empty_routing(case, device)
    for config in SHIPPED:
        expected = None
        for _ in range(3):
            order = shuffle_programs(monkeypatch) if device == "cpu" else []
            run_kernel(inputs, out, config)
            assert device != "cpu" or order != sorted(order)
            assert_routes(out, inputs)
            assert out.schedule is not None
            assert_schedule(out.schedule, out.expert_T_K, 24)
            assert_counters(out)
            values = [getattr(out, name).clone() for name in TENSORS]
            expected = expected or values
            for actual, first in zip(values, expected, strict=True):
                assert_bitwise(actual, first)


def shuffle_programs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Triton's interpreter runs one program after another: in this order from now on."""
    from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder

    order: list[int] = []

    def set_grid_idx(x: int, y: int, z: int) -> None:
        total = interpreter_builder.grid_dim[0]
        if x == 0:
            order[:] = torch.randperm(total).tolist()
        InterpreterBuilder.set_grid_idx(interpreter_builder, order[x], y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)
    return order


def test_kernel_without_schedule(device: str) -> None:
    case = Case(3, 77, 13, 3, 1)
    inputs = case.make_inputs(device)
    out = run_kernel(inputs, empty_routing(case, device, None))
    assert_routes(out, inputs)
    assert_counters(out)


def test_writes_into_out() -> None:
    case = Case(3, 32, 8, 2, 2)
    inputs = case.make_inputs("cpu")
    expected = moe_route(**inputs)
    out = Routing.empty(3, 2, 2, 8, "cpu", width=32)
    assert moe_route(**inputs, out=out) is out
    assert_same(out, expected)


def test_plain_path_writes_a_schedule_that_is_given() -> None:
    case = Case(19, 32, 8, 2, 2)
    inputs = case.make_inputs("cpu")
    out = moe_route(**inputs, out=empty_routing(case, "cpu"))
    assert out.schedule is not None
    assert_schedule(out.schedule, out.expert_T_K, 8)


def test_ready_ids() -> None:
    ids, weight = ints([[5, 0], [2, 5], [5, 9]]), randn(3, 2)
    weight[2, 1] = float("nan")  # nobody's
    result = moe_route(expert_T_K=ids, weight_T_K=weight, num_experts=8)
    assert result.expert_T_K is ids and result.weight_T_K is weight
    assert result.shared_weight_T_Z.shape == (3, 0)
    assert result.num_experts == 8 and result.schedule is None

    shared, wide = randn(3, 1), ids.long()
    wide[0, 0] = 2**32 + 1  # 1 in its low bits
    ready: dict[str, Any] = {"expert_T_K": wide, "weight_T_K": weight, "shared_weight_T_Z": shared}
    result = moe_route(**ready, num_experts=8)
    assert result.expert_T_K.dtype == torch.int32
    assert result.expert_T_K.tolist() == [[8, 0], [2, 5], [5, 8]]

    out = empty_routing(Case(3, 0, 8, 2, 1), "cpu")
    assert moe_route(**ready, num_experts=8, out=out) is out
    assert_same(out, result)
    assert out.schedule is not None
    assert_schedule(out.schedule, out.expert_T_K, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [BENCH[0], BENCH[3], BENCH[6], *LATE], ids=str)
def test_gpu_graph_replays_into_out(case: Case) -> None:
    """Nothing synchronises or is allocated, and a replay is the same as a call."""
    inputs = case.make_inputs("cuda")
    sizes = (case.num_tokens, case.top_k, case.num_shared, case.num_experts)
    out = Routing.empty(*sizes, "cuda", width=case.width, late_norm=case.late_norm)
    moe_route(**inputs, out=out)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    moe_route(**inputs, out=out)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moe_route(**inputs, out=out)
    for _ in range(3):
        inputs["x_T_D"].normal_()
        if case.late_norm:
            inputs["residual_T_D"].normal_()
        graph.replay()
        assert_same(out, moe_route(**inputs))
        assert_counters(out)
        if out.schedule is not None:
            assert_schedule(out.schedule, out.expert_T_K, case.num_experts)


@pytest.mark.parametrize("num_shared", [0, 2])
@pytest.mark.parametrize(("gate", "late_norm"), [(True, True), (True, False), (False, False)])
def test_opcheck(num_shared: int, gate: bool, late_norm: bool) -> None:
    width = 16 if gate else 0
    case = Case(9, width, 6, 2, num_shared, logit_bias=True, late_norm=late_norm)
    inputs = case.make_inputs("cpu")
    out = empty_routing(case, "cpu")
    assert out.schedule is not None
    args = (
        inputs["x_T_D" if gate else "logits_T_A"], inputs.get("w_gate_A_D"), inputs["bias_E"],
        inputs["logit_bias_A"], inputs["global_scale_1"], inputs.get("residual_T_D"),
        "sink_sigmoid", True, 1, 1, 8.0, 1e-6, 16, out.schedule.max_blocks,
        out.expert_T_K, out.weight_T_K, out.shared_weight_T_Z, out.inv_rms_T,
        out.schedule.buffer, out.scratch,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.tml_kernels.route.default, args)


def test_opcheck_of_route_schedule() -> None:
    blocking = Blocking(2, scheduled=True)
    schedule = Schedule.empty(blocking, 3, 2, 8, "cpu")
    ids, scratch = ints([[5, 0], [2, 5], [5, 9]]), new_scratch(3, 2, 0, 8, "cpu")
    args = (ids, 8, 2, schedule.max_blocks, schedule.buffer, scratch)
    torch.library.opcheck(torch.ops.tml_kernels.route_schedule.default, args)


def test_every_number_of_tokens_has_a_config() -> None:
    chosen = set()
    for tokens in [1, 8, 9, 16, 17, 64, 65, 1024, 100_000]:
        for experts in (1, 256, 257, MAX_EXPERTS):
            problem = Problem(tokens, experts)
            assert choose_config(problem).why_not(problem) is None
            chosen.add(choose_config(problem))
    assert chosen == set(SHIPPED)
    assert len({(config.block_d, config.num_warps) for config in SHIPPED}) == 1


def test_what_is_no_config() -> None:
    few = Problem(1, 8)
    assert "block_a=64" in str(replace(SHIPPED[0], block_a=64).why_not(few))
    assert "multiple" in str(replace(SHIPPED[0], block_t=GROUP_T + 4).why_not(few))
    assert "num_tokens=9" in str(SHIPPED[0].why_not(Problem(9, 8)))
    assert "num_warps=4" in str(replace(SHIPPED[0], num_warps=4).why_not(few))


IDS = {"expert_T_K": ints([[1, 2]] * 3), "weight_T_K": torch.ones(3, 2), "num_experts": 6}
OUT = Routing.empty(3, 2, 2, 6, "cpu")
RESIDUAL = torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x_T_D": [[1.0]]}, TypeError, "x_T_D.*list"),
        ({"x_T_D": torch.zeros(3)}, ValueError, "x_T_D: expected 2 axes"),
        ({"x_T_D": torch.zeros(3, 8).double()}, TypeError, "x_T_D.*float64"),
        ({"x_T_D": torch.zeros(3, 9)}, ValueError, "w_gate_A_D: D=8, but D=9"),
        ({"x_T_D": torch.zeros(8, 3).T}, ValueError, "x_T_D: must be contiguous"),
        ({"x_T_D": torch.zeros(3, 8, device="meta")}, ValueError, "w_gate_A_D: .*meta, got cpu"),
        ({"w_gate_A_D": None}, ValueError, "w_gate_A_D: needed with x_T_D"),
        ({"x_T_D": None}, ValueError, "x_T_D: needed with w_gate_A_D"),
        ({"logits_T_A": torch.zeros(3, 8)}, ValueError, "exactly one.*got x_T_D.*logits_T_A"),
        ({"x_T_D": None, "w_gate_A_D": None}, ValueError, "exactly one.*got none"),
        ({"w_gate_A_D": torch.zeros(9, 8)}, ValueError, "bias_E: E=6, but E=7"),
        ({"w_gate_A_D": torch.zeros(2, 8)}, ValueError, "w_gate_A_D.*experts, got 0"),
        ({"w_gate_A_D": torch.zeros(8, 8).half()}, TypeError, "w_gate_A_D.*float16"),
        ({"bias_E": torch.zeros(6).bfloat16()}, TypeError, "bias_E.*bfloat16"),
        ({"bias_E": torch.zeros(8)}, ValueError, "bias_E: E=8, but E=6"),
        ({"logit_bias_A": torch.zeros(6)}, ValueError, "logit_bias_A: A=6, but A=8"),
        ({"global_scale_1": torch.ones(2)}, ValueError, "global_scale_1"),
        ({"residual_T_D": torch.zeros(3, 9)}, ValueError, "residual_T_D: D=9, but D=8"),
        ({"residual_T_D": RESIDUAL.half()}, TypeError, "residual_T_D.*float16"),
        (
            {
                "residual_T_D": RESIDUAL,
                "x_T_D": None,
                "w_gate_A_D": None,
                "logits_T_A": torch.zeros(3, 8),
            },
            ValueError,
            "residual_T_D: goes with x_T_D and w_gate_A_D alone",
        ),
        (
            {"x_T_D": torch.zeros(3, 0), "w_gate_A_D": torch.zeros(8, 0)},
            ValueError,
            "w_gate_A_D: has no columns",
        ),
        ({"residual_T_D": RESIDUAL, "out": OUT}, ValueError, "out.inv_rms_T: needed with"),
        (
            {"out": Routing.empty(3, 2, 2, 6, "cpu", late_norm=True)},
            ValueError,
            "out.inv_rms_T: given without residual_T_D",
        ),
        (
            {"residual_T_D": RESIDUAL, "out": replace(OUT, inv_rms_T=torch.zeros(2))},
            ValueError,
            "inv_rms_T: T=2, but T=3",
        ),
        ({"scoring": "relu"}, ValueError, "scoring: .*softmax, sigmoid, .*, got 'relu'"),
        ({"renormalize": False}, ValueError, "renormalize: sink_sigmoid.*False"),
        ({"top_k": 7}, ValueError, "top_k: expected 1..6 of 6 experts, got 7"),
        ({"top_k": 0}, ValueError, "top_k: expected 1..6 of 6 experts, got 0"),
        ({"top_k": None}, TypeError, "top_k: expected an integer, got None"),
        ({"num_shared": -1}, ValueError, "num_shared: expected at least 0, got -1"),
        ({"num_groups": 4}, ValueError, "num_groups: 4 do not divide 6"),
        ({"num_groups": 0}, ValueError, "num_groups: expected 1..256, got 0"),
        ({"num_groups": 257}, ValueError, "num_groups: expected 1..256, got 257"),
        ({"num_groups": 3, "top_groups": 4}, ValueError, "top_groups: expected 1..3, got 4"),
        ({"num_groups": 6, "top_groups": 1}, ValueError, "top_k: expected 1..1 of 6.*got 2"),
        ({"num_experts": 8}, ValueError, "num_experts: w_gate_A_D has 6 experts, got 8"),
        ({"shared_weight_T_Z": torch.ones(3, 2)}, ValueError, "shared_weight_T_Z: goes with"),
        ({"out": (1, 2)}, TypeError, "out: expected a Routing, got tuple"),
        ({"out": replace(OUT, num_experts=8)}, ValueError, "out.num_experts: expected 6, got 8"),
        ({"out": replace(OUT, expert_T_K=torch.ones(3, 2))}, TypeError, "expert_T_K: .*int32"),
        ({"out": replace(OUT, weight_T_K=torch.ones(3, 3))}, ValueError, "weight_T_K: K=3"),
        (
            {"out": replace(OUT, scratch=torch.zeros(4, dtype=torch.int32))},
            ValueError,
            r"out.scratch: expected \d+ words in a row, got \(4,\)",
        ),
        (
            {"out": empty_routing(Case(4, 0, 6, 2, 2), "cpu")},
            ValueError,
            "expert_T_K: T=4, but T=3",
        ),
        (
            {"out": replace(OUT, schedule=empty_routing(Case(4, 0, 6, 2), "cpu").schedule)},
            ValueError,
            "out.schedule: expected .* blocks",
        ),
        ({"x_T_D": torch.zeros(3, 8, requires_grad=True)}, RuntimeError, "no backward"),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    inputs = {
        "x_T_D": torch.zeros(3, 8),
        "w_gate_A_D": torch.zeros(8, 8),
        "bias_E": torch.zeros(6),
        "global_scale_1": torch.ones(1),
        "top_k": 2,
        "scoring": "sink_sigmoid",
        "num_shared": 2,
        "scale": 8.0,
    } | change
    with pytest.raises(error, match=words):
        moe_route(**inputs)


def with_nan(*at: int, shape: tuple[int, ...] = (3, 2)) -> Tensor:
    weight = torch.ones(shape)
    weight[at] = float("nan")
    return weight


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"expert_T_K": torch.ones(3, 2)}, TypeError, "expert_T_K: expected torch.int32"),
        ({"expert_T_K": ints([1, 2, 3])}, ValueError, "expert_T_K: expected 2 axes"),
        ({"expert_T_K": ints([[]] * 3)}, ValueError, "weight_T_K: K=2, but K=0"),
        (
            {"expert_T_K": ints([[]] * 3), "weight_T_K": torch.ones(3, 0)},
            ValueError,
            "expert_T_K: needs at least one column",
        ),
        ({"weight_T_K": None}, ValueError, "weight_T_K: needed with expert_T_K"),
        ({"weight_T_K": torch.ones(3, 3)}, ValueError, "weight_T_K: K=3, but K=2"),
        ({"weight_T_K": torch.ones(3, 2).half()}, TypeError, "weight_T_K: .*float16"),
        ({"weight_T_K": with_nan(1, 0)}, ValueError, r"weight_T_K: NaN at \[1, 0\]"),
        ({"shared_weight_T_Z": torch.ones(2, 1)}, ValueError, "shared_weight_T_Z: T=2, but T=3"),
        (
            {"shared_weight_T_Z": with_nan(2, 0, shape=(3, 1))},
            ValueError,
            r"shared_weight_T_Z: NaN at \[2, 0\]",
        ),
        ({"num_experts": None}, TypeError, "num_experts: expected an integer, got None"),
        ({"num_experts": 0}, ValueError, f"num_experts: expected 1..{MAX_EXPERTS}, got 0"),
        ({"top_k": 2}, ValueError, "top_k: 2 does not go with ready ids"),
        ({"scoring": "sigmoid"}, ValueError, "scoring: 'sigmoid' does not go"),
        ({"renormalize": False}, ValueError, "renormalize: False does not go"),
        ({"scale": 2.0}, ValueError, "scale: 2.0 does not go"),
        ({"num_shared": 1}, ValueError, "num_shared: 1 does not go"),
        ({"residual_T_D": RESIDUAL}, ValueError, "residual_T_D: a tensor does not go"),
        ({"bias_E": torch.zeros(6)}, ValueError, "bias_E: a tensor does not go"),
        ({"out": OUT}, ValueError, "shared_weight_T_Z: Z=2, but Z=0"),
        (
            {"out": Routing.empty(3, 2, 0, 6, "cpu", late_norm=True)},
            ValueError,
            "out.inv_rms_T: given without residual_T_D",
        ),
    ],
)
def test_bad_ready_ids(change: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        moe_route(**IDS | change)
