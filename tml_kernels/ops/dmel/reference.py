"""The oracles of dmel and dmel_embed, and their plain paths.

Levels are a decision, not an approximation, so the plain path finds them in float64 as the oracle
does: a float32 spectrum would flip a level now and then, and differently on every machine. The
embedding is the same lines in float64 and in float32.
"""

# Dimension key: S session rows, W samples of this call, N state slots, L samples of tail,
# F frames, B bands, J widest band in bins, V = B * levels rows of the table, T tokens,
# D model width.

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .constants import plain_constants
from .spec import MEL_FLOOR, POWER_FLOOR, DmelSpec

FRAMES = 16  # at a time: their bands fit a core's cache


def log_mel_ref(signal_S_W: Tensor, spec: DmelSpec) -> Tensor:
    """float64 [S, F, B]: log10 of the mel energies of every whole frame of a signal.

    Frame f is samples f * hop .. f * hop + fft - 1: the stream before its hop, then its hop.
    A frame has the same bits wherever it stands: the transform works row by row, and the sum over a
    band is one over the last axis.
    """
    window, first_B, weight_B_J, _ = plain_constants(spec, signal_S_W.device)
    mels = []
    for frame_S_F_X in signal_S_W.double().unfold(-1, spec.fft, spec.hop).split(FRAMES, dim=-2):
        spectrum = torch.fft.rfft(frame_S_F_X * window)
        magnitude = (spectrum.real.square() + spectrum.imag.square()).clamp_min(POWER_FLOOR).sqrt()
        band_S_F_B_J = magnitude.unfold(-1, weight_B_J.shape[1], 1).index_select(-2, first_B)
        mels.append(band_S_F_B_J.mul_(weight_B_J).sum(-1))
    return torch.cat(mels, dim=-2).clamp_min(MEL_FLOOR).log10()


def quantise_ref(log_mel: Tensor, spec: DmelSpec) -> Tensor:
    """uint8, same shape: the nearest level centre in float32; ties, and NaN, to the lowest."""
    centre = plain_constants(spec, log_mel.device).centre
    clamped = log_mel.float().clamp(spec.level_min, spec.level_max)
    # argmin keeps the lowest index on ties.
    return (clamped[..., None] - centre).abs().argmin(-1).to(torch.uint8)


def dmel_levels_ref(
    pcm_S_W: Tensor, tail_N_L: Tensor, slot_S: Tensor, spec: DmelSpec
) -> tuple[Tensor, Tensor]:
    """(levels_S_F_B, tail_N_L) as new tensors; idle rows (slot < 0) are zero.

    The signal of a row is its slot's tail followed by its samples; the new tail is its end.
    """
    num_frames = pcm_S_W.shape[1] // spec.hop
    levels = pcm_S_W.new_zeros(len(slot_S), num_frames, spec.num_bands, dtype=torch.uint8)
    new_tail_N_L, live_S = tail_N_L.clone(), slot_S >= 0
    slot_A = slot_S[live_S].long()
    if len(slot_A) == 0 or num_frames == 0:  # an FFT of no rows is an error to some libraries
        return levels, new_tail_N_L
    signal_A_W = torch.cat([tail_N_L[slot_A], pcm_S_W[live_S]], dim=1)
    levels[live_S] = quantise_ref(log_mel_ref(signal_A_W, spec), spec)
    new_tail_N_L[slot_A] = signal_A_W[:, signal_A_W.shape[1] - spec.tail :]
    return levels, new_tail_N_L


def dmel_embed_ref(
    levels_T_B: Tensor,
    table_V_D: Tensor,
    norm_weight_D: Tensor,
    *,
    num_levels: int,
    eps: float = 1e-6,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """tokens_T_D in `dtype`: RMSNorm of the sum over bands b of table[b * num_levels + level_b]."""
    offset_B = num_levels * torch.arange(levels_T_B.shape[1], device=levels_T_B.device)
    sum_T_D = embedding_bag(levels_T_B.long() + offset_B, table_V_D.to(dtype), mode="sum")
    scale_T_1 = torch.rsqrt(sum_T_D.square().mean(-1, keepdim=True) + eps)
    return sum_T_D * scale_T_1 * norm_weight_D.to(dtype)
