"""The numbers a dMel front end is made of, computed in float64 and rounded once to float32."""

# Dimension key: B bands, Q frequency bins in use, K half the FFT, J widest band in bins.

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .spec import DmelSpec

# The Slaney mel scale (Auditory Toolbox, 1998): linear to 1 kHz, logarithmic above.
HZ_PER_MEL = 200.0 / 3.0
BREAK_HZ = 1000.0
BREAK_MEL = BREAK_HZ / HZ_PER_MEL
LOG_STEP = np.log(6.4) / 27.0  # of the logarithm of the frequency, per mel


def hz_to_mel(hz: float) -> float:
    if hz < BREAK_HZ:
        return hz / HZ_PER_MEL
    return BREAK_MEL + float(np.log(hz / BREAK_HZ)) / LOG_STEP


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    above = BREAK_HZ * np.exp(LOG_STEP * (mel - BREAK_MEL))
    return np.where(mel < BREAK_MEL, HZ_PER_MEL * mel, above)


def mel_filters(spec: DmelSpec) -> np.ndarray:
    """[fft/2 + 1, B] float32: triangles evenly spaced in mel, each of area 1 Hz.

    Equals `transformers.audio_utils.mel_filter_bank` with norm and mel_scale "slaney".
    """
    mel = np.linspace(hz_to_mel(spec.f_min), hz_to_mel(spec.f_max), spec.num_bands + 2)
    corner = mel_to_hz(mel)
    bin_hz = np.linspace(0.0, spec.sample_rate // 2, spec.fft // 2 + 1)
    rise, width = bin_hz[:, None] - corner[None, :], np.diff(corner)
    triangle = np.minimum(rise[:, :-2] / width[:-1], -rise[:, 2:] / width[1:])
    area = 2.0 / (corner[2:] - corner[:-2])
    return (np.maximum(triangle, 0.0) * area).astype(np.float32)


def frame_window(spec: DmelSpec) -> np.ndarray:
    """[fft] float32: the periodic Hann window in the middle of a frame, as torch.stft places it."""
    hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(spec.window) / spec.window)
    before = (spec.fft - spec.window) // 2
    return np.pad(hann.astype(np.float32), (before, spec.fft - spec.window - before))


def level_centres(spec: DmelSpec) -> np.ndarray:
    """[num_levels] float32, in log10 of mel energy."""
    return np.linspace(spec.level_min, spec.level_max, spec.num_levels).astype(np.float32)


class Bands(NamedTuple):
    """The mel filters without their zeros: band b weighs bins first[b] .. first[b] + J - 1.

    Rows narrower than J end in zeros. No band uses a bin outside first_bin .. first_bin + Q - 1.
    """

    first_B: np.ndarray  # int32
    weight_B_J: np.ndarray  # float32
    first_bin: int
    num_used: int  # Q


@functools.cache
def bands(spec: DmelSpec) -> Bands:
    filters_B = mel_filters(spec).T
    used = np.flatnonzero(filters_B.any(axis=0))
    if not filters_B.any(axis=1).all():
        empty = np.flatnonzero(~filters_B.any(axis=1)).tolist()
        raise ValueError(f"DmelSpec: bands {empty} lie between two bins of {spec.fft=}")
    spans = [np.flatnonzero(row) for row in filters_B]
    widest = max(span[-1] - span[0] + 1 for span in spans)
    # A narrow band near the top starts earlier instead of reaching beyond the last bin.
    first_B = np.minimum([span[0] for span in spans], used[-1] + 1 - widest)
    weight_B_J = np.stack([filters_B[b, at : at + widest] for b, at in enumerate(first_B)])
    num_used = int(used[-1] - used[0] + 1)
    return Bands(first_B.astype(np.int32), weight_B_J, int(used[0]), num_used)


class PlainConstants(NamedTuple):
    """What the oracle uses: float32 values, widened to float64."""

    window: Tensor  # [fft]
    first_B: Tensor  # int64
    weight_B_J: Tensor
    centre: Tensor  # [num_levels], float32


@functools.cache
def plain_constants(spec: DmelSpec, device: torch.device) -> PlainConstants:
    first_B, weight_B_J, _, _ = bands(spec)
    return PlainConstants(
        torch.from_numpy(frame_window(spec)).to(device, torch.float64),
        torch.from_numpy(first_B).to(device, torch.int64),
        torch.from_numpy(weight_B_J).to(device, torch.float64),
        torch.from_numpy(level_centres(spec)).to(device),
    )


class KernelConstants(NamedTuple):
    """What the kernels use; K and Q are padded with zeros to whole blocks."""

    basis_2_K_Q: Tensor  # windowed cosine and sine of sample n + 1 and bin first_bin + q
    first_B: Tensor  # int32
    weight_B_J: Tensor  # J padded to a power of two
    threshold: Tensor  # [num_levels - 1]


def dft_basis(spec: DmelSpec) -> np.ndarray:
    """[2, fft/2, Q] float32: cos and sin of 2 pi k n / fft times the window, n = 1 .. fft/2.

    A real frame needs half of the samples' rows: cosine and window are even about fft/2 and the
    sine is odd, so x[n] + x[fft - n] meets the one and x[n] - x[fft - n] the other. Sample 0 has
    window 0; sample fft/2 has no partner, and its sine is zero.
    """
    half, parts = spec.fft // 2, bands(spec)
    n_K = np.arange(1, half + 1)
    k_Q = parts.first_bin + np.arange(parts.num_used)
    turn_K_Q = (n_K[:, None] * k_Q % spec.fft) * (2.0 * np.pi / spec.fft)  # exact in integers
    window_K_1 = frame_window(spec)[1 : half + 1, None].astype(np.float64)
    basis = np.stack([np.cos(turn_K_Q) * window_K_1, np.sin(turn_K_Q) * window_K_1])
    return basis.astype(np.float32)


def level_thresholds(spec: DmelSpec) -> np.ndarray:
    """[num_levels - 1] float32 mel energies: a band's level is how many of them it exceeds.

    log10 is monotone, so "the centre nearest to log10(energy), ties to the lowest" is "how many
    midpoints are below log10(energy)", which is "how many powers of ten of midpoints are below the
    energy". Midpoints and powers in float64, rounded once; no logarithm is taken.
    """
    centre = level_centres(spec).astype(np.float64)
    return (10.0 ** ((centre[1:] + centre[:-1]) / 2.0)).astype(np.float32)


@functools.cache
def kernel_constants(
    spec: DmelSpec, device: torch.device, block_k: int, block_q: int, block_j: int
) -> KernelConstants:
    basis, parts = dft_basis(spec), bands(spec)
    _, num_k, num_q = basis.shape
    widest = parts.weight_B_J.shape[1]
    padded = np.pad(basis, ((0, 0), (0, -num_k % block_k), (0, -num_q % block_q)))
    weight = np.pad(parts.weight_B_J, ((0, 0), (0, block_j - widest)))
    arrays = (padded, parts.first_B, weight, level_thresholds(spec))
    return KernelConstants(*(torch.from_numpy(a).to(device) for a in arrays))
