"""dmel_embed, and the constants and the spec behind all of dmel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tml_kernels.ops.dmel import DMEL_20HZ, DMEL_40HZ, DmelSpec, dmel, dmel_embed, dmel_levels
from tml_kernels.ops.dmel.cases import SMALL, Case
from tml_kernels.ops.dmel.configs import SHIPPED, choose_embed
from tml_kernels.ops.dmel.constants import (
    bands,
    dft_basis,
    frame_window,
    level_thresholds,
    mel_filters,
)
from tml_kernels.ops.dmel.kernel import launch_dmel_embed
from tml_kernels.ops.dmel.reference import dmel_embed_ref, quantise_ref
from tml_kernels.testing import assert_bitwise, assert_matches, randn

SPECS = [
    pytest.param(spec, id=name)
    for name, spec in (("20hz", DMEL_20HZ), ("40hz", DMEL_40HZ), ("small", SMALL))
]
# Tokens, bands, levels, width: none, one, an odd width, a width past one block, the model's.
SHAPES = [(0, 80, 16, 128), (1, 1, 2, 1), (5, 7, 3, 77), (3, 5, 256, 130), (6, 80, 16, 4096)]


def run_public(levels: Tensor, table: Tensor, norm_weight: Tensor, num_levels: int) -> Tensor:
    return dmel_embed(levels, table, norm_weight, num_levels=num_levels)


def run_kernel(levels: Tensor, table: Tensor, norm_weight: Tensor, num_levels: int) -> Tensor:
    out = table.new_empty(len(levels), table.shape[1])
    if len(out):
        launch_dmel_embed(levels, table, norm_weight, num_levels, 1e-6, out)
    return out


PATHS = [
    pytest.param(run_public, "cpu", id="public"),
    pytest.param(run_kernel, None, id="kernel"),
    pytest.param(run_public, "cuda", id="gpu", marks=pytest.mark.gpu),
]


def make_embed(shape: tuple[int, int, int, int], device: str) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_bands, num_levels, width = shape
    levels = torch.randint(num_levels, (num_tokens, num_bands), dtype=torch.uint8).to(device)
    table = randn(num_bands * num_levels, width, device=device)
    return levels, table, 1 + 0.1 * randn(width, device=device)


@pytest.mark.parametrize(("run", "place"), PATHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_embed(run, place, shape: tuple[int, int, int, int], device: str) -> None:
    levels, table, norm_weight = make_embed(shape, place or device)
    table_B_V_D = table.cpu().double().view(shape[1], shape[2], -1)
    rows_T_B_D = table_B_V_D[torch.arange(shape[1]), levels.cpu().long()]
    total = rows_T_B_D.sum(1)
    scale = (total.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    expected = total * scale * norm_weight.cpu().double()
    out = run(levels, table, norm_weight, shape[2])
    assert_matches(out, expected)
    oracle = dmel_embed_ref(levels, table, norm_weight, num_levels=shape[2])
    assert_matches(oracle, expected, limit=1e-13)


@pytest.mark.parametrize(("run", "place"), PATHS)
def test_row_does_not_depend_on_neighbours(run, place, device: str) -> None:
    levels, table, norm_weight = make_embed((9, 80, 16, 128), place or device)
    together = run(levels, table, norm_weight, 16)
    alone = torch.cat([run(levels[t : t + 1], table, norm_weight, 16) for t in range(9)])
    assert_bitwise(together, alone)


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("width", [64, 4096])
def test_dmel_is_levels_then_embed(place: str, width: int) -> None:
    inputs = Case(3, 2, width).make_inputs(place)
    sound = (inputs["pcm_S_W"], inputs["tail_N_L"].clone(), inputs["slot_S"])
    levels = dmel_levels(*sound)
    tokens = dmel_embed(levels.flatten(0, 1), inputs["table_V_D"], inputs["norm_weight_D"])
    out, out_levels = dmel(**inputs)
    assert_bitwise(out_levels, levels)
    assert_bitwise(out.flatten(0, 1), tokens)
    assert_bitwise(inputs["tail_N_L"], sound[1])


def test_kernel_takes_a_level_that_is_too_large_as_the_highest(device: str) -> None:
    levels, table, norm_weight = make_embed((2, 3, 4, 16), device)
    highest = run_kernel(torch.full_like(levels, 3), table, norm_weight, 4)
    assert_bitwise(run_kernel(torch.full_like(levels, 255), table, norm_weight, 4), highest)


def test_opcheck() -> None:
    args = (*make_embed((3, 4, 5, 16), "cpu"), 5, 1e-6, torch.zeros(3, 16))
    torch.library.opcheck(torch.ops.tml_kernels.dmel_embed.default, args)


U8 = torch.zeros(3, 80, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"levels_T_B": U8.int()}, TypeError, "int32"),
        ({"levels_T_B": U8[0]}, ValueError, "levels_T_B: expected 2 axes"),
        ({"levels_T_B": U8[:, :0]}, ValueError, "at least one band"),
        ({"levels_T_B": U8 + 16}, ValueError, "16 is not below num_levels=16"),
        ({"num_levels": 0}, ValueError, "num_levels: expected at least 1, got 0"),
        ({"num_levels": 8}, ValueError, "640 rows, got 1280"),
        ({"table_V_D": torch.zeros(1280, 0), "norm_weight_D": torch.ones(0)}, ValueError, "D=0"),
        ({"norm_weight_D": torch.ones(8).half()}, TypeError, "float16"),
        ({"out_T_D": torch.zeros(3, 8).bfloat16()}, TypeError, "bfloat16"),
        ({"table_V_D": torch.zeros(1280, 8, requires_grad=True)}, RuntimeError, "no backward"),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    table, norm_weight = torch.zeros(1280, 8), torch.ones(8)
    inputs = {"levels_T_B": U8, "table_V_D": table, "norm_weight_D": norm_weight} | change
    with pytest.raises(error, match=words):
        dmel_embed(**inputs)


def test_every_width_has_a_config() -> None:
    for width in [1, 128, 129, 4096, 6144, 16384]:
        assert choose_embed(width).why_not(width) is None
    assert SHIPPED[0].why_not(129) is not None
    with pytest.raises(ValueError, match="16385"):
        choose_embed(16385)


@pytest.mark.parametrize("spec", SPECS)
def test_mel_filters_equal_those_of_transformers(spec: DmelSpec) -> None:
    audio_utils = pytest.importorskip("transformers.audio_utils")
    expected = audio_utils.mel_filter_bank(
        spec.num_bins,
        spec.num_bands,
        spec.f_min,
        spec.f_max,
        spec.sample_rate,
        norm="slaney",
        mel_scale="slaney",
    ).astype(np.float32)
    np.testing.assert_array_equal(mel_filters(spec), expected)


@pytest.mark.parametrize("spec", SPECS)
def test_bands_are_the_filters_without_their_zeros(spec: DmelSpec) -> None:
    parts, dense = bands(spec), np.zeros((spec.num_bands, spec.num_bins), np.float32)
    width = parts.weight_B_J.shape[1]
    for b, first in enumerate(parts.first_B):
        dense[b, first : first + width] = parts.weight_B_J[b]
    np.testing.assert_array_equal(dense.T, mel_filters(spec))
    assert parts.first_B.min() >= parts.first_bin
    assert (parts.first_B + width).max() <= parts.first_bin + parts.num_used


@pytest.mark.parametrize("spec", SPECS)
def test_folded_basis_is_the_windowed_transform(spec: DmelSpec) -> None:
    parts, half = bands(spec), spec.fft // 2
    frame = np.random.default_rng(0).standard_normal(spec.fft)
    near, far = frame[1 : half + 1], np.append(frame[:half:-1], 0.0)
    cosine, sine = dft_basis(spec).astype(np.float64)
    used = slice(parts.first_bin, parts.first_bin + parts.num_used)
    expected = np.fft.rfft(frame * frame_window(spec))[used]
    actual = (near + far) @ cosine - 1j * ((near - far) @ sine)
    assert np.linalg.norm(actual - expected) / np.linalg.norm(expected) < 1e-7  # float32 basis


@pytest.mark.parametrize("spec", SPECS)
def test_window_is_the_periodic_hann_window(spec: DmelSpec) -> None:
    before = (spec.fft - spec.window) // 2
    window = frame_window(spec)
    hann = torch.hann_window(spec.window, periodic=True, dtype=torch.float64).float().numpy()
    np.testing.assert_allclose(window[before : before + spec.window], hann, atol=6e-8)
    assert not window[:before].any()
    assert not window[before + spec.window :].any()
    assert window[0] == 0  # the folded transform leaves sample 0 out


@pytest.mark.parametrize("spec", SPECS)
def test_thresholds_choose_the_nearest_centre(spec: DmelSpec) -> None:
    """For energies all over the range and a few float32 steps beside every boundary."""
    threshold = level_thresholds(spec)
    sweep = 10.0 ** np.linspace(spec.level_min - 1, spec.level_max + 1, 20_001)
    beside = threshold[:, None] * (1 + np.array([-1e-6, 1e-6]))
    energy = np.concatenate([sweep, beside.ravel()]).astype(np.float32)
    level = (energy[:, None] > threshold).sum(1)
    assert set(level) == set(range(spec.num_levels))
    nearest = quantise_ref(torch.from_numpy(np.log10(energy.astype(np.float64))), spec)
    np.testing.assert_array_equal(level, nearest.numpy())
    assert (np.diff(threshold) > 0).all()
    np.testing.assert_array_equal(  # a tie goes to the lower level
        (threshold[:, None] > threshold).sum(1), np.arange(spec.num_levels - 1)
    )


def test_pack_and_unpack() -> None:
    for spec in (DMEL_20HZ, DMEL_40HZ, SMALL):
        assert DmelSpec.unpack(spec.pack()) == spec
    assert DMEL_20HZ.tail == 800
    assert DMEL_40HZ.tail == 624
    assert DMEL_20HZ.table_rows == 1280


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hop": 0}, "hop=0"),
        ({"window": 1602}, "window=1602"),
        ({"fft": 1601, "window": 1601}, "fft=1601"),
        ({"window": 1599}, "window=1599 has no middle"),
        ({"f_max": 8001.0}, "8001"),
        ({"f_min": 8000.0}, "8000.0, 8000.0"),
        ({"num_bands": 0}, "num_bands=0"),
        ({"num_levels": 1}, "num_levels=1"),
        ({"num_levels": 257}, "num_levels=257"),
        ({"level_min": 2.0}, "level_min=2.0"),
    ],
)
def test_bad_spec(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(DMEL_20HZ, **change)


def test_a_band_between_two_bins_is_refused() -> None:
    narrow = replace(DMEL_20HZ, window=200, fft=200, hop=100)  # 80 Hz a bin, bands of 37 Hz
    with pytest.raises(ValueError, match="lie between two bins"):
        bands(narrow)
