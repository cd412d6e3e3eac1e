"""shift_keys: check, choose, launch."""

# Dimension key: L layers, I keys, G KV heads, C head width, B = C / 2 rotary frequencies, P pages,
# R rows in a page.

from __future__ import annotations

import torch
from torch import Tensor

from ..._dims import Dims
from ..._head_tiles import MAX_HEAD_WIDTH
from ..._pages import FP8, write_rows
from ..._ragged import check_below, check_distinct
from ..._registry import refuse_grad, register_op
from ...precision import ACTIVATIONS
from .reference import shift_keys_ref


def _plain(
    source: Tensor,
    row: Tensor,
    shift: Tensor,
    rope_phase: Tensor,
    k_pages: Tensor,
    k_scale: Tensor | None,
) -> None:
    check_below(k_pages.shape[1] * k_pages.shape[3], row_I=row)
    check_distinct(row_I=row)
    keys_L_I_G_C = shift_keys_ref(source, shift, rope_phase, dtype=torch.float32)
    written = (row >= 0).nonzero().squeeze(1)
    for layer, keys_I_G_C in enumerate(keys_L_I_G_C):
        scale_P_G_R = None if k_scale is None else k_scale[layer]
        write_rows(k_pages[layer], scale_P_G_R, keys_I_G_C[written], row[written])


def _kernel(*args) -> None:
    from .kernel import launch_shift_keys

    launch_shift_keys(*args)


_op = register_op(
    "shift_keys(Tensor source, Tensor row, Tensor shift, Tensor rope_phase, Tensor(a!) k_pages, "
    "Tensor(b!)? k_scale) -> ()",
    plain=_plain,
    kernel=_kernel,
)


def shift_keys(
    source_L_I_G_C: Tensor,
    k_pages_L_P_G_R_C: Tensor,
    row_I: Tensor,
    shift_I: Tensor,
    rope_phase_B: Tensor,
    *,
    k_scale_L_P_G_R: Tensor | None = None,
) -> None:
    """Rotated keys turned further by shift[i] positions, to row row[i] of the pages of all layers.

    For attention sinks that stay at a bounded distance while the window moves on: `source` holds
    their keys as they were first rotated and is not written, so a later shift begins there and
    nothing drifts. Columns b and b + C / 2 turn by shift[i] * rope_phase[b] / 2^64 of a full turn
    (`rope_increments`; the product wraps, any int64 is a shift). Key i is written to row row[i] % R
    of page row[i] // R; -1 writes nothing, and two keys must not share a row. Pages of
    float8_e4m3fn come with scales: key = fp8 * scale, scale = amax / 448 per row and head (1 where
    that is zero).

    source float32, bfloat16 or float16; the pages any of these or float8_e4m3fn; scales float32;
    row, shift and rope_phase int64; C <= 1024. Turns in float32 and rounds once. Deterministic; a
    key's bits depend on it and its shift alone. One launch; nothing is allocated. Raises TypeError
    or ValueError naming the argument, and for values of row before any write, on CPU tensors only;
    a GPU skips a row beyond the pages.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023, section
    3.2: positions within the cache, not in the text.
    """
    dims = Dims()
    dims.check(source_L_I_G_C=source_L_I_G_C, dtype=ACTIVATIONS)
    device = source_L_I_G_C.device
    dims.check(k_pages_L_P_G_R_C=k_pages_L_P_G_R_C, dtype=(*ACTIVATIONS, FP8), device=device)
    dims.check(
        row_I=row_I, shift_I=shift_I, rope_phase_B=rope_phase_B, dtype=torch.int64, device=device
    )
    if not 0 < dims["C"] <= MAX_HEAD_WIDTH:
        raise ValueError(f"source_L_I_G_C: C={dims['C']} is not in 1..{MAX_HEAD_WIDTH}")
    if 2 * dims["B"] != dims["C"]:
        raise ValueError(f"rope_phase_B: expected C / 2 of C={dims['C']}, got B={dims['B']}")
    has_scales = k_scale_L_P_G_R is not None
    if has_scales != (k_pages_L_P_G_R_C.dtype == FP8):
        raise ValueError(
            f"k_scale_L_P_G_R: scales go with pages of {FP8} and no others, got "
            f"{k_pages_L_P_G_R_C.dtype} pages {'with' if has_scales else 'without'} scales"
        )
    if k_scale_L_P_G_R is not None:
        dims.check(k_scale_L_P_G_R=k_scale_L_P_G_R, dtype=torch.float32, device=device)
    refuse_grad(source_L_I_G_C)
    if source_L_I_G_C.numel() > 0 and k_pages_L_P_G_R_C.numel() > 0:
        _op(source_L_I_G_C, row_I, shift_I, rope_phase_B, k_pages_L_P_G_R_C, k_scale_L_P_G_R)
