"""Triton kernels of dmel, in two launches: the spectrum of all frames, then one program per frame.

1. `spectrum_kernel`: magnitudes of the windowed DFT, which is a product in full float32 (no tf32: a
   level is a decision) folded to half its length.
2. `frame_kernel`: mel bands over the frame's magnitudes, levels, the sum of the levels' embedding
   rows and its norm; the session's first frame also moves the tail, which nobody reads any more.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's types know no launch options and no static_range.

# Dimension key: S session rows, W samples of this call, N state slots, L samples of tail,
# F frames, R = S * F rows, B bands, J widest band in bins, Q frequency bins, K half the FFT,
# V = B * levels rows of the table, T tokens, D model width.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._aot import AotSpec
from .configs import BLOCK_B, LEVELS, SHIPPED, SPECTRUM, EmbedConfig, SpectrumConfig, choose_embed
from .constants import KernelConstants, bands, kernel_constants
from .spec import DMEL_20HZ, DMEL_40HZ, MEL_FLOOR, POWER_FLOOR, DmelSpec

SIZES = ["S", "W", "F", "N"]  # change from tick to tick: one compiled kernel serves all


@triton.jit
def _sample(pcm_ptr, tail_ptr, s, slot, position, W, L: tl.constexpr, mask):
    """The signal of a session row: its slot's tail, then its samples; zero where masked."""
    ptr = tl.where(position < L, tail_ptr + slot * L + position, pcm_ptr + s * W + (position - L))
    return tl.load(ptr, mask=mask, other=0.0)


@triton.jit
def _at_least(x, floor: tl.constexpr):
    """max(x, floor), where NaN stays NaN."""
    return tl.where(x < floor, floor, x)


@triton.jit(do_not_specialize=SIZES)
def spectrum_kernel(
    pcm_ptr,                  # in   [S, W]
    tail_ptr,                 # in   [N, L]
    slot_ptr,                 # in   [S]
    basis_ptr,                # in   [2, K, Q], Q in whole blocks
    work_ptr,                 # out  [R, FFT / 2 + 1]  magnitudes of bins FIRST_BIN ..
    S, W, F, N,
    FFT: tl.constexpr, HOP: tl.constexpr, FIRST_BIN: tl.constexpr, NUM_USED: tl.constexpr,
    POWER_FLOOR: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    L: tl.constexpr = FFT - HOP
    HALF: tl.constexpr = FFT // 2
    PITCH: tl.constexpr = (NUM_USED + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
    DEPTH: tl.constexpr = (HALF + BLOCK_K - 1) // BLOCK_K * BLOCK_K

    row_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    s_r = (row_r // F).to(tl.int64)
    slot_r = tl.load(slot_ptr + s_r, mask=s_r < S, other=-1).to(tl.int64)
    live_r = (slot_r >= 0) & (slot_r < N)
    begin_r = (row_r % F).to(tl.int64) * HOP
    offs_q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)

    real_r_q = tl.zeros([BLOCK_R, BLOCK_Q], tl.float32)
    imag_r_q = tl.zeros([BLOCK_R, BLOCK_Q], tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        near, far = 1 + offs_k, FFT - 1 - offs_k
        mask = live_r[:, None] & (near <= HALF)[None, :]
        position = begin_r[:, None] + near[None, :]
        x_r_k = _sample(pcm_ptr, tail_ptr, s_r[:, None], slot_r[:, None], position, W, L, mask)
        mask = live_r[:, None] & (far > HALF)[None, :]  # sample FFT / 2 has no partner
        position = begin_r[:, None] + far[None, :]
        pair_r_k = _sample(pcm_ptr, tail_ptr, s_r[:, None], slot_r[:, None], position, W, L, mask)

        tile = basis_ptr + offs_k[:, None] * PITCH + offs_q[None, :]
        cos_k_q = tl.load(tile)
        sin_k_q = tl.load(tile + DEPTH * PITCH)
        real_r_q = tl.dot(x_r_k + pair_r_k, cos_k_q, real_r_q, input_precision="ieee")
        imag_r_q = tl.dot(x_r_k - pair_r_k, sin_k_q, imag_r_q, input_precision="ieee")

    power_r_q = _at_least(real_r_q * real_r_q + imag_r_q * imag_r_q, POWER_FLOOR)
    work = work_ptr + row_r.to(tl.int64)[:, None] * (HALF + 1) + FIRST_BIN + offs_q[None, :]
    tl.store(work, tl.sqrt_rn(power_r_q), mask=live_r[:, None] & (offs_q < NUM_USED)[None, :])


@triton.jit
def _levels(
    magnitude_ptr, first_ptr, weight_ptr, threshold_ptr, levels_ptr,
    BANDS: tl.constexpr, WIDEST: tl.constexpr, NUM_LEVELS: tl.constexpr, MEL_FLOOR: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Levels of one frame from its magnitudes; a band is summed in one fixed order."""
    offs_i, offs_j = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    threshold_i = tl.load(threshold_ptr + offs_i, mask=offs_i < NUM_LEVELS - 1, other=float("inf"))
    for start in tl.static_range(0, BANDS, BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B)
        mask_b = offs_b < BANDS
        first_b = tl.load(first_ptr + offs_b, mask=mask_b, other=0)
        mask_b_j = mask_b[:, None] & (offs_j < WIDEST)[None, :]
        bins_b_j = first_b[:, None] + offs_j[None, :]
        magnitude_b_j = tl.load(magnitude_ptr + bins_b_j, mask=mask_b_j, other=0.0)
        at_b_j = offs_b[:, None] * BLOCK_J + offs_j[None, :]
        weight_b_j = tl.load(weight_ptr + at_b_j, mask=mask_b_j, other=0.0)
        mel_b = _at_least(tl.sum(magnitude_b_j * weight_b_j, axis=1), MEL_FLOOR)

        above_b_i = mel_b[:, None] > threshold_i[None, :]
        level_b = tl.sum(above_b_i.to(tl.int32), axis=1)
        tl.store(levels_ptr + offs_b, level_b.to(tl.uint8), mask=mask_b)


@triton.jit
def _embed(
    levels_ptr, table_ptr, norm_weight_ptr, out_ptr, D, eps,
    BANDS: tl.constexpr, NUM_LEVELS: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One token: RMSNorm of the sum of its levels' table rows, added in the order of the bands."""
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    sum_d = tl.zeros([BLOCK_D], tl.float32)
    for b in tl.range(0, BANDS, loop_unroll_factor=UNROLL):
        level = tl.minimum(tl.load(levels_ptr + b).to(tl.int64), NUM_LEVELS - 1)
        row_ptr = table_ptr + (b * NUM_LEVELS + level) * D
        sum_d += tl.load(row_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    weight_d = tl.load(norm_weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(sum_d * sum_d, axis=0) / D + eps)
    tl.store(out_ptr + offs_d, sum_d * scale * weight_d, mask=mask_d)


@triton.jit
def _move_tail(pcm_ptr, tail_ptr, s, slot, W, L: tl.constexpr, BLOCK_L: tl.constexpr):
    """The last L samples of the signal become the slot's tail."""
    offs_l = tl.arange(0, BLOCK_L)
    mask_l = offs_l < L
    tail_l = _sample(pcm_ptr, tail_ptr, s, slot, W + offs_l, W, L, mask_l)
    tl.debug_barrier()  # every thread has read the old tail
    tl.store(tail_ptr + slot * L + offs_l, tail_l, mask=mask_l)


@triton.jit(do_not_specialize=SIZES)
def frame_kernel(
    pcm_ptr, slot_ptr,                # in      [S, W], [S]
    work_ptr,                         # in      [R, FFT / 2 + 1]  magnitudes
    first_ptr, weight_ptr,            # in      [B], [B, BLOCK_J]
    threshold_ptr,                    # in      [NUM_LEVELS - 1]
    table_ptr, norm_weight_ptr,       # in      [V, D], [D], when EMBED
    tail_ptr,                         # in out  [N, L]
    levels_ptr,                       # out     [R, B]
    out_ptr,                          # out     [R, D], when EMBED
    S, W, F, N, D, eps,
    FFT: tl.constexpr, HOP: tl.constexpr, BANDS: tl.constexpr, WIDEST: tl.constexpr,
    NUM_LEVELS: tl.constexpr, MEL_FLOOR: tl.constexpr, EMBED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    s = row // F
    slot = tl.load(slot_ptr + s).to(tl.int64)
    levels_ptr += row * BANDS
    if (slot >= 0) & (slot < N):
        _levels(
            work_ptr + row * (FFT // 2 + 1), first_ptr, weight_ptr, threshold_ptr, levels_ptr,
            BANDS, WIDEST, NUM_LEVELS, MEL_FLOOR, BLOCK_B, BLOCK_I, BLOCK_J,
        )  # fmt: skip
        if EMBED:
            tl.debug_barrier()  # the levels are read back by other threads
            _embed(
                levels_ptr, table_ptr, norm_weight_ptr, out_ptr + row * D, D, eps,
                BANDS, NUM_LEVELS, BLOCK_D, UNROLL,
            )  # fmt: skip
        if row % F == 0:
            _move_tail(pcm_ptr, tail_ptr, s, slot, W, FFT - HOP, BLOCK_L)
    else:
        for start in tl.static_range(0, BANDS, BLOCK_B):
            offs_b = start + tl.arange(0, BLOCK_B)
            zero_b = tl.zeros([BLOCK_B], tl.uint8)
            tl.store(levels_ptr + offs_b, zero_b, mask=offs_b < BANDS)
        if EMBED:
            offs_d = tl.arange(0, BLOCK_D)
            tl.store(out_ptr + row * D + offs_d, tl.zeros([BLOCK_D], tl.float32), mask=offs_d < D)


@triton.jit
def embed_kernel(
    levels_ptr,                       # in   [T, B]
    table_ptr, norm_weight_ptr,       # in   [V, D], [D]
    out_ptr,                          # out  [T, D]
    D, eps,
    BANDS: tl.constexpr, NUM_LEVELS: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    _embed(
        levels_ptr + t * BANDS, table_ptr, norm_weight_ptr, out_ptr + t * D, D, eps,
        BANDS, NUM_LEVELS, BLOCK_D, UNROLL,
    )  # fmt: skip


def _spectrum_constexprs(spec: DmelSpec, config: SpectrumConfig) -> dict:
    parts = bands(spec)
    return {
        "FFT": spec.fft,
        "HOP": spec.hop,
        "FIRST_BIN": parts.first_bin,
        "NUM_USED": parts.num_used,
        "POWER_FLOOR": POWER_FLOOR,
        "BLOCK_R": config.block_r,
        "BLOCK_Q": config.block_q,
        "BLOCK_K": config.block_k,
    }


def _block_j(spec: DmelSpec) -> int:
    return int(triton.next_power_of_2(bands(spec).weight_B_J.shape[1]))


def _frame_constexprs(spec: DmelSpec, config: EmbedConfig, embed: bool) -> dict:
    return {
        "FFT": spec.fft,
        "HOP": spec.hop,
        "BANDS": spec.num_bands,
        "WIDEST": bands(spec).weight_B_J.shape[1],
        "NUM_LEVELS": spec.num_levels,
        "MEL_FLOOR": MEL_FLOOR,
        "EMBED": embed,
        "BLOCK_B": BLOCK_B,
        "BLOCK_I": triton.next_power_of_2(spec.num_levels),
        "BLOCK_J": _block_j(spec),
        "BLOCK_L": triton.next_power_of_2(max(spec.tail, 1)),
        "BLOCK_D": config.block_d,
        "UNROLL": config.unroll,
    }


def _launch(
    pcm: Tensor,
    tail: Tensor,
    slot: Tensor,
    table: Tensor | None,
    norm_weight: Tensor | None,
    spec: DmelSpec,
    eps: float,
    work: Tensor,
    levels: Tensor,
    out: Tensor | None,
    spectrum: SpectrumConfig,
) -> None:
    (num_sessions, num_frames, _), num_samples, num_slots = levels.shape, pcm.shape[1], len(tail)
    constants: KernelConstants = kernel_constants(
        spec, pcm.device, spectrum.block_k, spectrum.block_q, _block_j(spec)
    )
    num_rows, num_used = num_sessions * num_frames, bands(spec).num_used
    grid = (triton.cdiv(num_rows, spectrum.block_r), triton.cdiv(num_used, spectrum.block_q))
    spectrum_kernel[grid](
        pcm, tail, slot, constants.basis_2_K_Q, work,
        num_sessions, num_samples, num_frames, num_slots,
        **_spectrum_constexprs(spec, spectrum),
        num_warps=spectrum.num_warps, num_stages=spectrum.num_stages,
    )  # fmt: skip
    width = 1 if table is None else table.shape[1]
    config = LEVELS if table is None else choose_embed(width)
    frame_kernel[(num_rows,)](
        pcm, slot, work, constants.first_B, constants.weight_B_J, constants.threshold,
        work if table is None else table, work if norm_weight is None else norm_weight,
        tail, levels, work if out is None else out,
        num_sessions, num_samples, num_frames, num_slots, width, eps,
        **_frame_constexprs(spec, config, table is not None),
        num_warps=config.num_warps,
    )  # fmt: skip


def launch_dmel(
    pcm: Tensor,
    tail: Tensor,
    slot: Tensor,
    table: Tensor,
    norm_weight: Tensor,
    spec: list[float],
    eps: float,
    work: Tensor,
    levels: Tensor,
    out: Tensor,
    spectrum: SpectrumConfig = SPECTRUM,
) -> None:
    packed = DmelSpec.unpack(spec)
    _launch(pcm, tail, slot, table, norm_weight, packed, eps, work, levels, out, spectrum)


def launch_dmel_levels(
    pcm: Tensor,
    tail: Tensor,
    slot: Tensor,
    spec: list[float],
    work: Tensor,
    levels: Tensor,
    spectrum: SpectrumConfig = SPECTRUM,
) -> None:
    packed = DmelSpec.unpack(spec)
    _launch(pcm, tail, slot, None, None, packed, 0.0, work, levels, None, spectrum)


def launch_dmel_embed(
    levels: Tensor, table: Tensor, norm_weight: Tensor, num_levels: int, eps: float, out: Tensor
) -> None:
    num_tokens, num_bands = levels.shape
    config = choose_embed(table.shape[1])
    embed_kernel[(num_tokens,)](
        levels, table, norm_weight, out, table.shape[1], eps,
        BANDS=num_bands, NUM_LEVELS=num_levels, BLOCK_D=config.block_d, UNROLL=config.unroll,
        num_warps=config.num_warps,
    )  # fmt: skip


SOUND = {"pcm_ptr": "*fp32", "tail_ptr": "*fp32", "slot_ptr": "*i32", "work_ptr": "*fp32"}
CONSTANTS = {"first_ptr": "*i32", "weight_ptr": "*fp32", "threshold_ptr": "*fp32"}
EMBEDDING = {"table_ptr": "*bf16", "norm_weight_ptr": "*fp32", "out_ptr": "*bf16"}
ROW = {"D": "i32", "eps": "fp32"}


def aot_specs() -> list[AotSpec]:
    """Every shipped configuration as the tick uses it: a bf16 table, fp32 norm weights."""
    sizes = dict.fromkeys(SIZES, "i32")
    spectra = [
        AotSpec(
            kernel=spectrum_kernel,
            config=SPECTRUM,
            signature=SOUND | {"basis_ptr": "*fp32"} | sizes,
            constexprs=_spectrum_constexprs(spec, SPECTRUM),
            num_warps=SPECTRUM.num_warps,
            num_stages=SPECTRUM.num_stages,
            label=f"fft{spec.fft}",
        )
        for spec in (DMEL_20HZ, DMEL_40HZ)
    ]
    frames = [
        AotSpec(
            kernel=frame_kernel,
            config=config,
            signature=SOUND | CONSTANTS | EMBEDDING | {"levels_ptr": "*u8"} | sizes | ROW,
            constexprs=_frame_constexprs(spec, config, config is not LEVELS),
            num_warps=config.num_warps,
            label=f"fft{spec.fft}-D{config.block_d}",
        )
        for spec in (DMEL_20HZ, DMEL_40HZ)
        for config in (LEVELS, *SHIPPED)
    ]
    embeds = [
        AotSpec(
            kernel=embed_kernel,
            config=config,
            signature={"levels_ptr": "*u8"} | EMBEDDING | ROW,
            constexprs={
                "BANDS": DMEL_20HZ.num_bands,
                "NUM_LEVELS": DMEL_20HZ.num_levels,
                "BLOCK_D": config.block_d,
                "UNROLL": config.unroll,
            },
            num_warps=config.num_warps,
            label=f"D{config.block_d}",
        )
        for config in SHIPPED
    ]
    return [*spectra, *frames, *embeds]
