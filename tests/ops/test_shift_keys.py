from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from exact_turns import exact_turns
from torch import Tensor

from bench.harness import clone
from tml_kernels._head_tiles import SHIPPED, Problem, choose_config
from tml_kernels._pages import FP8, quantize_ref
from tml_kernels._rope import rope_increments, rotate_ref
from tml_kernels.ops.shift_keys import shift_keys
from tml_kernels.ops.shift_keys.cases import BENCH, EDGE, FURTHEST, MODEL, Case
from tml_kernels.ops.shift_keys.kernel import launch_shift_keys
from tml_kernels.ops.shift_keys.reference import shift_keys_ref
from tml_kernels.testing import assert_bitwise, assert_matches, randn

PAGES, SCALE = "k_pages_L_P_G_R_C", "k_scale_L_P_G_R"
OP_TENSORS = ("source_L_I_G_C", "row_I", "shift_I", "rope_phase_B", PAGES, SCALE)
Run = Callable[[dict], None]


def run_public(inputs: dict) -> None:
    shift_keys(**inputs)


def run_kernel(inputs: dict) -> None:
    if inputs["source_L_I_G_C"].numel() > 0:
        launch_shift_keys(*(inputs.get(name) for name in OP_TENSORS))


PATHS = [
    pytest.param(run_public, "cpu", id="public"),
    pytest.param(run_kernel, None, id="kernel"),
    pytest.param(run_public, "cuda", id="gpu", marks=pytest.mark.gpu),
]


def pool_rows(pages_L_P_G_R: Tensor) -> Tensor:
    """[L, P * R, G, ...], in the order in which row_I counts them."""
    return pages_L_P_G_R.transpose(2, 3).flatten(1, 2)


def check(case: Case, run: Run, device: str) -> None:
    inputs = case.make_inputs(device)
    before = clone(inputs)
    run(inputs)
    kept = inputs["row_I"] >= 0
    row = inputs["row_I"][kept]
    expected = shift_keys_ref(inputs["source_L_I_G_C"], inputs["shift_I"], inputs["rope_phase_B"])[
        :, kept
    ]
    keys = pool_rows(inputs[PAGES])[:, row]
    if keys.dtype == FP8:
        check_fp8(keys, pool_rows(inputs[SCALE])[:, row], expected)
    else:
        assert_matches(keys, expected)
    for name in (PAGES, SCALE):
        if name in inputs:
            rows, rows_before = pool_rows(inputs[name]), pool_rows(before[name])
            untouched = torch.ones(rows.shape[1], dtype=torch.bool, device=rows.device)
            untouched[row] = False
            assert_bitwise(rows[:, untouched], rows_before[:, untouched])
    assert_bitwise(inputs["source_L_I_G_C"], before["source_L_I_G_C"])


def check_fp8(keys: Tensor, scale: Tensor, expected: Tensor) -> None:
    """Within half a step of e4m3: a sixteenth, or 2^-10 scales among subnormals."""
    amax = expected.abs().amax(-1)
    assert_matches(scale, amax / 448)
    scale = scale.double()[..., None]
    half_step = torch.maximum(expected.abs() / 16, scale * 2.0**-10)
    error = (keys.double() * scale - expected).abs()
    assert (error <= half_step * 1.0001 + amax[..., None] * 1e-6).all()


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_public(case: Case) -> None:
    check(case, run_public, "cpu")


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_kernel(case: Case, device: str) -> None:
    check(case, run_kernel, device)


@pytest.mark.gpu
@pytest.mark.parametrize("case", EDGE + MODEL + BENCH, ids=str)
def test_gpu(case: Case) -> None:
    check(case, run_public, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    check(Case(2, 3, 2, 32, dtype=dtype), run_public, "cpu")
    check(Case(2, 3, 2, 32, page_dtype=dtype), run_public, "cpu")
    check(Case(2, 3, 2, 32, dtype=dtype, page_dtype=torch.float32), run_public, "cpu")


def unit_inputs(phase_B: Tensor, shift_I: Tensor, device: str) -> dict:
    """Keys whose first half is one and second half zero: turned, they hold cosine and sine."""
    num_keys, half = shift_I.shape[0], phase_B.shape[0]
    inputs = Case(1, num_keys, 1, 2 * half).make_inputs(device)
    unit = torch.tensor([1.0, 0.0]).repeat_interleave(half)
    return inputs | {
        "source_L_I_G_C": unit.repeat(1, num_keys, 1, 1).to(device),
        "row_I": torch.arange(num_keys, device=device),
        "shift_I": shift_I.to(device),
        "rope_phase_B": phase_B.to(device),
    }


def assert_turned(inputs: dict, turns: Tensor) -> None:
    """turns [I, B] of a full turn, float64; sine and cosine are within 2e-7."""
    angle = 2 * math.pi * turns
    keys = pool_rows(inputs[PAGES])[0, : angle.shape[0], 0].cpu().double()
    assert (keys - torch.cat([angle.cos(), angle.sin()], 1)).abs().max() <= 2e-7


@pytest.mark.parametrize(("run", "place"), PATHS)
def test_shifts_agree_with_sixty_digits(run: Run, place, device: str) -> None:
    shift = [0, 1, 4095, 1_000_003, 10**9, -1, -(10**9)]
    inputs = unit_inputs(rope_increments(1e4, 64, "cpu"), torch.tensor(shift), place or device)
    run(inputs)
    turns = [[float(t) for t in exact_turns("10000", 64, n)] for n in shift]
    assert_turned(inputs, torch.tensor(turns, dtype=torch.float64))


@pytest.mark.parametrize(("run", "place"), PATHS)
def test_any_shift_is_exact_in_the_fixed_point(run: Run, place, device: str) -> None:
    """The fraction of shift * phase / 2^64, by integers without end, up to the widest shifts."""
    shift = [2**40 + 1, FURTHEST, FURTHEST - 1, -FURTHEST, 2**63 - 1, -(2**63)]
    phase_B = rope_increments(1e4, 64, "cpu")
    inputs = unit_inputs(phase_B, torch.tensor(shift), place or device)
    run(inputs)
    turns = [[(n * phase % 2**64) / 2**64 for phase in phase_B.tolist()] for n in shift]
    assert_turned(inputs, torch.tensor(turns, dtype=torch.float64))


@pytest.mark.parametrize(("run", "place"), PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=str)
def test_no_shift_is_a_copy(run: Run, place, dtype: torch.dtype, device: str) -> None:
    """Rounded as the pages are, and not otherwise."""
    inputs = Case(2, 3, 2, 34, page_dtype=dtype).make_inputs(place or device)
    inputs["shift_I"].zero_()
    run(inputs)
    source, rows = inputs["source_L_I_G_C"], pool_rows(inputs[PAGES])[:, inputs["row_I"]]
    if dtype == FP8:
        source, scale = quantize_ref(source.cpu())
        assert_bitwise(pool_rows(inputs[SCALE])[:, inputs["row_I"]], scale)
    assert torch.equal(rows.cpu().float(), source.to(dtype).cpu().float())


@pytest.mark.parametrize(("run", "place"), PATHS)
@pytest.mark.parametrize("page_dtype", [None, FP8], ids=str)
def test_many_shifts_leave_no_trace(run: Run, place, page_dtype, device: str) -> None:
    """Each begins with the pristine keys: the last alone writes the same bits."""
    inputs = Case(2, 3, 2, 34, page_dtype=page_dtype).make_inputs(place or device)
    once = clone(inputs)
    for n in (5, 77, 10**6):
        run(inputs | {"shift_I": inputs["shift_I"] - n})
    run(inputs)
    run(once)
    for name in (PAGES, SCALE):
        if name in inputs:
            assert_bitwise(inputs[name], once[name])


@pytest.mark.parametrize(("run", "place"), PATHS)
def test_a_shift_is_a_rotation_at_the_sum(run: Run, place, device: str) -> None:
    """A key that was rotated at position n, shifted by s, is the key rotated at n + s."""
    inputs = Case(2, 4, 2, 34).make_inputs(place or device)
    phase_B, key = inputs["rope_phase_B"], randn(2, 4, 2, 34, device=place or device).double()
    position_I = torch.arange(4, device=phase_B.device)
    inputs["source_L_I_G_C"] = rotate_ref(key, phase_B, position_I).float()
    run(inputs)
    expected = rotate_ref(key, phase_B, position_I + inputs["shift_I"])
    assert_matches(pool_rows(inputs[PAGES])[:, inputs["row_I"]], expected)


@pytest.mark.parametrize(("run", "place"), PATHS)
def test_a_key_depends_on_itself_alone(run: Run, place, device: str) -> None:
    inputs = Case(3, 4, 2, 34, page_dtype=FP8).make_inputs(place or device)
    alone = clone(inputs)
    run(inputs)
    for i in range(4):
        own = {name: alone[name][i : i + 1].contiguous() for name in ("row_I", "shift_I")}
        source = alone["source_L_I_G_C"][:, i : i + 1].contiguous()
        run(alone | own | {"source_L_I_G_C": source})
    assert_bitwise(alone[PAGES], inputs[PAGES])
    assert_bitwise(alone[SCALE], inputs[SCALE])


def test_kernel_skips_rows_beyond_the_pages(device: str) -> None:
    inputs = Case(2, 3, 1, 32).make_inputs(device)
    before = clone(inputs)
    inputs["row_I"].copy_(torch.tensor([3 * 64, -1, 2**40]))
    run_kernel(inputs)
    assert_bitwise(inputs[PAGES], before[PAGES])


@pytest.mark.gpu
@pytest.mark.parametrize("page_dtype", [torch.bfloat16, FP8], ids=str)
def test_gpu_captured_call_replays_with_other_shifts(page_dtype: torch.dtype) -> None:
    case = Case(4, 4, 8, 128, skipped=1, dtype=torch.bfloat16, page_dtype=page_dtype)
    inputs = case.make_inputs("cuda")
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    shift_keys(**inputs)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        shift_keys(**inputs)
    for _ in range(3):
        given = case.make_inputs("cuda")
        for name, tensor in given.items():
            inputs[name].copy_(tensor)
        shift_keys(**given)
        graph.replay()
        assert_bitwise(inputs[PAGES], given[PAGES])


@pytest.mark.parametrize("scales", [False, True])
def test_opcheck(scales: bool) -> None:
    inputs = Case(2, 3, 2, 8, skipped=1, page_rows=4, poison=False).make_inputs("cpu")
    if scales:  # opcheck cannot compare fp8 pages: scales are declared for any
        inputs[SCALE] = torch.zeros_like(inputs[PAGES][..., 0])
    args = tuple(inputs.get(name) for name in OP_TENSORS)
    torch.library.opcheck(torch.ops.tml_kernels.shift_keys.default, args)


def test_every_width_has_a_config() -> None:
    for width in [2, 32, 34, 64, 96, 128, 256, 512, 1024]:
        assert choose_config(Problem(width)).why_not(Problem(width)) is None
    assert SHIPPED[0].why_not(Problem(34)) is not None
    with pytest.raises(ValueError, match="1026"):
        choose_config(Problem(1026))


def test_cost_counts_every_key_once() -> None:
    cost = Case(3, 4, 2, 32, skipped=1, dtype=torch.bfloat16, page_dtype=FP8).cost()
    assert cost.bytes == 3 * 3 * 2 * (32 * 3 + 4) + 16 * 4 + 8 * 16


FP8_PAGES = torch.zeros(2, 3, 1, 4, 8).to(FP8)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"source_L_I_G_C": torch.zeros(2, 3, 1, 8).double()}, TypeError, "source.*float64"),
        ({"source_L_I_G_C": torch.zeros(2, 3, 1, 8).to(FP8)}, TypeError, "source.*float8"),
        ({"source_L_I_G_C": torch.zeros(2, 3, 1, 6)}, ValueError, "k_pages.*: C=8, but C=6"),
        (
            {"source_L_I_G_C": torch.zeros(2, 3, 1, 8, requires_grad=True)},
            RuntimeError,
            "no backward",
        ),
        ({PAGES: torch.zeros(1, 3, 1, 4, 8)}, ValueError, "k_pages_L_P_G_R_C: L=1, but L=2"),
        ({PAGES: torch.zeros(2, 3, 1, 4, 8).long()}, TypeError, "k_pages.*int64"),
        ({PAGES: torch.zeros(2, 3, 4, 1, 8).transpose(2, 3)[:, ::2]}, ValueError, "contiguous"),
        ({PAGES: FP8_PAGES}, ValueError, "k_scale_L_P_G_R: .*float8_e4m3fn pages without"),
        ({SCALE: torch.zeros(2, 3, 1, 4)}, ValueError, "k_scale_L_P_G_R: .*float32 pages with"),
        (
            {PAGES: FP8_PAGES, SCALE: torch.zeros(2, 3, 1, 4).half()},
            TypeError,
            "k_scale_L_P_G_R.*float16",
        ),
        (
            {PAGES: FP8_PAGES, SCALE: torch.zeros(2, 3, 1, 5)},
            ValueError,
            "k_scale_L_P_G_R: R=5, but R=4",
        ),
        ({"row_I": torch.arange(3).int()}, TypeError, "row_I.*int32"),
        ({"shift_I": torch.arange(2)}, ValueError, "shift_I: I=2, but I=3"),
        ({"shift_I": torch.zeros(3)}, TypeError, "shift_I.*float32"),
        ({"rope_phase_B": torch.arange(8)}, ValueError, "rope_phase_B: .*C=8, got B=8"),
        ({"row_I": torch.tensor([0, 12, 1])}, ValueError, "row_I: .*below 12, got 12"),
        ({"row_I": torch.tensor([-1, 5, 5])}, ValueError, "row_I: 5 is named twice"),
    ],
)
def test_bad_input_changes_nothing(change: dict, error: type, words: str) -> None:
    inputs = {
        "source_L_I_G_C": torch.ones(2, 3, 1, 8),
        PAGES: torch.zeros(2, 3, 1, 4, 8),
        "row_I": torch.tensor([11, -1, 0]),
        "shift_I": torch.arange(3),
        "rope_phase_B": torch.arange(4),
    } | change
    with pytest.raises(error, match=words):
        shift_keys(**inputs)
    assert not inputs[PAGES].float().any()


def test_too_wide_and_odd() -> None:
    inputs = Case(1, 1, 1, 1026).make_inputs("cpu")
    with pytest.raises(ValueError, match=r"source_L_I_G_C: C=1026 is not in 1\.\.1024"):
        shift_keys(**inputs)
    odd = {name: inputs[name][..., :33].contiguous() for name in ("source_L_I_G_C", PAGES)}
    phase_B = torch.zeros(16, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"rope_phase_B: .*C=33, got B=16"):
        shift_keys(**inputs | odd | {"rope_phase_B": phase_B})
