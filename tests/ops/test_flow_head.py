from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tml_kernels._philox import FLOW_STREAM, normal
from tml_kernels.ops.flow_head import FlowWeights, flow_head, flow_work_size
from tml_kernels.ops.flow_head.cases import EDGE, MODEL, Case
from tml_kernels.ops.flow_head.kernel import noise_kernel
from tml_kernels.ops.flow_head.launch import _wave, launch_flow_head
from tml_kernels.ops.flow_head.reference import flow_head_ref
from tml_kernels.testing import assert_bitwise, assert_matches, relative_l2

SMALL = Case(5, 32, 16, 2, 8, num_steps=3)
PER_ROW = ("cond_S_D", "seed_S", "counter_S")
# 34 rows evaluated in three tiles, 208 features in several; the interpreter takes seconds per case.
TILES = Case(17, 72, 52, 1, 20, num_steps=2, guidance=1.5)
# Every product but the input's has its columns in several parts, and the norm's rows several tiles.
PARTS = Case(2, 520, 260, 1, 40, num_steps=1, guidance=1.5, inner=2)
TICK = [  # inkling-small, as a tick runs it; 33 rows are three tiles
    Case(s, 4096, 1024, 6, 80, guidance=guidance, dtype=torch.bfloat16)
    for s, guidance in ((1, 1.0), (8, 1.0), (33, 1.0), (33, 1.5))
]


def run_kernel(inputs: dict) -> Tensor:
    """The launches with scratch of exactly the size they ask for, NaN at first."""
    out = inputs["cond_S_D"].new_empty(
        len(inputs["cond_S_D"]), len(inputs["weights"].output_bias_B), dtype=torch.float32
    )
    sizes: dict[str, Any] = {name: inputs[name] for name in ("num_steps", "guidance")}
    work = out.new_full((flow_work_size(len(out), inputs["weights"], **sizes),), math.nan)
    if len(out):
        arguments: Any = (*inputs.values(), work, out.fill_(math.nan))
        launch_flow_head(*arguments)
    return out


def check(case: Case, device: str) -> None:
    inputs = case.make_inputs(device)
    out = flow_head(**inputs)
    assert out.dtype == torch.float32
    assert_matches(out, flow_head_ref(**inputs))


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_public(case: Case) -> None:
    check(case, "cpu")


@pytest.mark.parametrize("case", [*EDGE, TILES], ids=str)
def test_kernel(case: Case, device: str) -> None:
    inputs = case.make_inputs(device)
    assert_matches(run_kernel(inputs), flow_head_ref(**inputs))


@pytest.fixture
def bfloat16_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's product of bfloat16 tiles is one of their bits as integers."""
    from triton.language import float32
    from triton.runtime.interpreter import InterpreterBuilder

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, self.cast_impl(a, float32), self.cast_impl(b, float32), *rest)

    plain = InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize(
    "case", [replace(PARTS, dtype=torch.bfloat16), replace(SMALL, dtype=torch.float16)], ids=str
)
@pytest.mark.usefixtures("bfloat16_dots")
def test_kernel_multiplies_narrow_weights_in_float32(case: Case, device: str) -> None:
    """bfloat16 ones with three parts of each row, whose sum it is; float16 ones as float32."""
    inputs = case.make_inputs(device)
    assert_matches(run_kernel(inputs), flow_head_ref(**inputs), limit=2e-6)


def test_parts_are_added_in_order_whoever_comes_last(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder

    inputs = Case(17, 520, 16, 1, 8, num_steps=1, inner=33).make_inputs(device)
    expected = run_kernel(inputs)
    assert_matches(expected, flow_head_ref(**inputs))
    order: list[int] = []

    def set_grid_idx(x: int, y: int, z: int) -> None:
        if x == 0:
            order[:] = torch.randperm(interpreter_builder.grid_dim[0]).tolist()
        InterpreterBuilder.set_grid_idx(interpreter_builder, order[x], y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)
    for _ in range(2):
        assert_bitwise(run_kernel(inputs), expected)


def test_kernel_s_norm_does_not_cancel(device: str) -> None:
    """Means of 100 standard deviations: a mean of squares less a squared mean is 1e-3 off."""
    inputs = Case(2, 32, 70, 1, 8, num_steps=1).make_inputs(device)
    weights = inputs["weights"]
    inputs["weights"] = weights._replace(input_bias_W=weights.input_bias_W + 100)
    assert_matches(run_kernel(inputs), flow_head_ref(**inputs), limit=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*EDGE, TILES, PARTS, *MODEL, *TICK], ids=str)
def test_gpu(case: Case) -> None:
    check(case, "cuda")


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_used_in_float32(dtype: torch.dtype, place: str) -> None:
    check(Case(3, 32, 16, 2, 8, dtype=dtype), place)


@pytest.mark.parametrize("num_columns", [1, 7, 80])
def test_kernel_s_noise_is_philox_s(num_columns: int, device: str) -> None:
    """For seeds and counters with both words set, some of them negative."""
    seed = torch.randint(-(2**62), 2**62, (50,))
    counter = torch.randint(-(2**40), 2**40, (50,))
    x = torch.empty(50, num_columns, device=device)
    arrived = torch.full((300,), 7, dtype=torch.int32, device=device)
    noise_kernel[(50,)](
        seed.to(device), counter.to(device), x, arrived, num_columns, 299, BLOCK_I=32
    )
    assert arrived.tolist() == [0] * 299 + [7]
    assert_matches(x, normal(seed, counter, num_columns, FLOW_STREAM, torch.float64), limit=5e-7)


def velocity(x: Tensor, t: float, c: Tensor, w: FlowWeights) -> Tensor:
    """v(x, t, c) of one row, written block by block in float64; c is in head width."""
    width = c.shape[0]
    index = torch.arange(0, width, 2, dtype=torch.float64)
    freq = 10000.0 ** (-index / width)
    wave = torch.cat([torch.cos(1000 * t * freq), torch.sin(1000 * t * freq)])
    time = functional.silu(w.time_in_W_W @ wave + w.time_in_bias_W)
    act = functional.silu(c + w.time_out_W_W @ time + w.time_out_bias_W)
    h = w.input_W_B @ x + w.input_bias_W

    def norm(h: Tensor) -> Tensor:
        return (h - h.mean()) / torch.sqrt(h.var(correction=0) + 1e-6)

    for i in range(w.up_L_U_W.shape[0]):
        shift, scale, gate = (w.mod_L_3_W_W[i, j] @ act + w.mod_bias_L_3_W[i, j] for j in range(3))
        y = functional.silu(w.up_L_U_W[i] @ (norm(h) * (1 + scale) + shift) + w.up_bias_L_U[i])
        h = h + gate * (w.down_L_W_U[i] @ y + w.down_bias_L_W[i])
    shift, scale = (w.final_mod_2_W_W[j] @ act + w.final_mod_bias_2_W[j] for j in range(2))
    return w.output_B_W @ (norm(h) * (1 + scale) + shift) + w.output_bias_B


@pytest.mark.parametrize("guidance", [1.0, 1.7, 0.0])
@pytest.mark.parametrize("num_steps", [1, 5])
def test_reference_is_euler_over_the_velocity(guidance: float, num_steps: int) -> None:
    inputs = Case(3, 20, 12, 3, 6, num_steps=num_steps, guidance=guidance).make_inputs("cpu")
    w = FlowWeights(*(tensor.double() for tensor in inputs["weights"]))
    out = flow_head_ref(**inputs)
    noise = normal(inputs["seed_S"], inputs["counter_S"], 6, FLOW_STREAM, torch.float64)
    for s in range(3):
        x, c = noise[s], w.cond_W_D @ inputs["cond_S_D"][s].double() + w.cond_bias_W
        for n in range(num_steps):
            t = n / num_steps
            v, null = velocity(x, t, c, w), velocity(x, t, w.null_W, w)
            x = x + (guidance * v + (1 - guidance) * null) / num_steps
        torch.testing.assert_close(out[s], x, rtol=1e-9, atol=1e-9)


def test_constant_velocity_carries_the_noise_by_it() -> None:
    inputs = SMALL.make_inputs("cpu")
    weights = inputs["weights"]._replace(output_B_W=torch.zeros(8, 16))
    out = flow_head(**inputs | {"weights": weights})
    noise = normal(inputs["seed_S"], inputs["counter_S"], 8, FLOW_STREAM, torch.float64)
    assert_matches(out, noise + weights.output_bias_B.double())


def test_condition_time_seed_and_counter_all_matter() -> None:
    inputs = SMALL.make_inputs("cpu")
    base = flow_head(**inputs)
    for change in (
        {"cond_S_D": inputs["cond_S_D"] + 0.5},
        {"seed_S": inputs["seed_S"] + 1},
        {"counter_S": inputs["counter_S"] + 1},
        {"num_steps": 4},
        {"guidance": 1.1},
    ):
        assert relative_l2(flow_head(**inputs | change), base) > 1e-3, change


def test_guidance_one_reads_no_null_condition() -> None:
    inputs = SMALL.make_inputs("cpu")
    expected = flow_head(**inputs)
    poisoned = inputs["weights"]._replace(null_W=torch.full((16,), math.nan))
    assert_bitwise(flow_head(**inputs | {"weights": poisoned}), expected)
    assert flow_head(**inputs | {"weights": poisoned, "guidance": 2.0}).isnan().all()


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_row_does_not_depend_on_neighbours(guidance: float, place: str) -> None:
    inputs = Case(19, 64, 32, 2, 80, guidance=guidance).make_inputs(place)
    together = flow_head(**inputs)
    for s in range(19):
        alone = inputs | {name: inputs[name][s : s + 1].clone() for name in PER_ROW}
        assert_bitwise(flow_head(**alone), together[s : s + 1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_gpu_row_has_its_bits_among_any_number(guidance: float, dtype: torch.dtype) -> None:
    """At every place of a tile, in launches of one tile and of several."""
    inputs = Case(70, 4096, 1024, 2, 80, guidance=guidance, dtype=dtype).make_inputs("cuda")
    together = flow_head(**inputs)
    assert_bitwise(flow_head(**inputs), together)
    for first, count in ((0, 1), (5, 1), (21, 16), (33, 17), (6, 64)):
        rows = slice(first, first + count)
        some = inputs | {name: inputs[name][rows].clone() for name in PER_ROW}
        assert_bitwise(flow_head(**some), together[rows])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_kernel_s_row_does_not_depend_on_neighbours(guidance: float, device: str) -> None:
    """Whatever they are and however many. Rows keep their places in the tiles: the interpreter's
    product, numpy's, sums a tile's columns in different orders."""
    case = Case(18, 32, 16, 1, 8, num_steps=1, guidance=guidance)
    inputs = case.make_inputs(device)
    together = run_kernel(inputs)
    others = torch.arange(18, device=device) != 16
    for name in PER_ROW:
        inputs[name][others] = 7
    assert_bitwise(run_kernel(inputs)[16], together[16])
    if guidance == 1.0:  # rows without condition stand behind those with one
        fewer = inputs | {name: inputs[name][:17].clone() for name in PER_ROW}
        assert_bitwise(run_kernel(fewer)[16], together[16])


def test_kernel_reads_no_null_condition_at_guidance_one(device: str) -> None:
    inputs = SMALL.make_inputs(device)
    expected = run_kernel(inputs)
    nan = torch.full((16,), math.nan, device=device)
    inputs["weights"] = inputs["weights"]._replace(null_W=nan)
    assert_bitwise(run_kernel(inputs), expected)
    assert run_kernel(inputs | {"guidance": 2.0}).isnan().all()


@pytest.mark.parametrize("run", [lambda inputs: flow_head(**inputs), run_kernel])
def test_nan_row_stays_in_its_row(run, device: str) -> None:
    inputs = SMALL.make_inputs(device)
    expected = run(inputs)
    inputs["cond_S_D"][2, 3] = math.nan
    out = run(inputs)
    others = [0, 1, 3, 4]
    assert out[2].isnan().all()
    assert_bitwise(out[others], expected[others])


def test_writes_into_out() -> None:
    inputs = SMALL.make_inputs("cpu")
    out = torch.empty(5, 8)
    assert flow_head(**inputs, out_S_B=out) is out
    assert_bitwise(out, flow_head(**inputs))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_opcheck(guidance: float) -> None:
    inputs = SMALL.make_inputs("cpu") | {"guidance": guidance}
    inputs["weights"] = list(inputs["weights"])
    args = (*inputs.values(), torch.empty(0), torch.empty(5, 8))
    torch.library.opcheck(torch.ops.tml_kernels.flow_head.default, args)


@pytest.mark.gpu
def test_gpu_captured_with_the_caller_s_scratch() -> None:
    """In a graph, allocating nothing, the same bits; too little scratch is refused."""
    case = MODEL[1]
    inputs = case.make_inputs("cuda")
    expected = flow_head(**inputs)
    sizes: dict[str, Any] = {name: inputs[name] for name in ("num_steps", "guidance")}
    size = flow_work_size(case.num_rows, inputs["weights"], **sizes)
    work, out = torch.empty(size, device="cuda"), torch.zeros_like(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flow_head(**inputs, out_S_B=out, work=work)
    work.fill_(math.nan)
    graph.replay()
    assert_bitwise(out, expected)
    with pytest.raises(ValueError, match=f"work: expected at least {size} values"):
        flow_head(**inputs, work=work[:-1])


def test_sinusoids_live_as_long_as_a_graph_that_has_their_pointer() -> None:
    first = _wave(1, 16, torch.device("cpu"))
    for num_steps in range(2, 40):
        _wave(num_steps, 16, torch.device("cpu"))
    assert _wave(1, 16, torch.device("cpu")) is first


def test_cost_reads_every_matrix_once() -> None:
    weights = Case(1, 48, 16, 2, 8).make_weights("cpu")
    sizes: dict[str, Any] = {name: tensor.numel() for name, tensor in weights._asdict().items()}
    matrices = sum(size for name, size in sizes.items() if "bias" not in name)
    assert Case(0, 48, 16, 2, 8).cost().bytes == 4 * (matrices - 16)  # all but the null condition


def weights_with(**change: Tensor) -> dict:
    return {"weights": SMALL.make_weights("cpu")._replace(**change)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"cond_S_D": torch.zeros(5, 33)}, ValueError, "cond_W_D: D=32, but D=33"),
        ({"cond_S_D": torch.zeros(5, 32).double()}, TypeError, "cond_S_D.*float64"),
        ({"weights": (torch.zeros(3),)}, TypeError, "weights: .*FlowWeights, got tuple"),
        (weights_with(null_W=torch.zeros(15)), ValueError, "null_W: W=15, but W=16"),
        (weights_with(null_W=None), TypeError, "null_W.*NoneType"),  # type: ignore
        (weights_with(input_W_B=torch.zeros(16, 8).half()), TypeError, "input_W_B.*float16"),
        (weights_with(mod_L_3_W_W=torch.zeros(2, 2, 16, 16)), ValueError, "mod_L_3_W_W: 3=2"),
        (weights_with(up_L_U_W=torch.zeros(3, 64, 16)), ValueError, "up_L_U_W: L=3, but L=2"),
        (weights_with(down_L_W_U=torch.zeros(2, 16, 63)), ValueError, "down_L_W_U: U=63, but U=64"),
        (weights_with(output_bias_B=torch.zeros(9)), ValueError, "output_bias_B: B=9, but B=8"),
        ({"seed_S": torch.zeros(5).int()}, TypeError, "seed_S.*int32"),
        ({"counter_S": torch.zeros(4).long()}, ValueError, "counter_S: S=4, but S=5"),
        ({"num_steps": 0}, ValueError, "num_steps.*got 0"),
        ({"guidance": math.inf}, ValueError, "guidance.*inf"),
        ({"out_S_B": torch.zeros(5, 8).bfloat16()}, TypeError, "out_S_B.*bfloat16"),
        ({"work": torch.zeros(5).half()}, TypeError, "work_W.*float16"),
        ({"work": torch.zeros(5, 8)}, ValueError, "work_W: expected 1 axes"),
        ({"cond_S_D": torch.zeros(5, 32, requires_grad=True)}, RuntimeError, "no backward"),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        flow_head(**SMALL.make_inputs("cpu") | change)


def test_odd_head_width_is_refused() -> None:
    with pytest.raises(ValueError, match="even head width, got W=15"):
        flow_head(**Case(1, 32, 15, 2, 8).make_inputs("cpu"))
