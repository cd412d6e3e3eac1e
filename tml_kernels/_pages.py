"""Plain torch: keys and values to rows of pages, quantised where the pages are fp8."""

# Dimension key: T tokens, P pages, G KV heads, R rows in a page, C head width.

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def quantize_ref(x_T_G_C: Tensor) -> tuple[Tensor, Tensor]:
    """(fp8 values [T, G, C], scale [T, G]): x is about value * scale, and the largest value of a
    head is 448. The scale is amax / 448, 1 where that is zero."""
    scale_T_G = x_T_G_C.abs().amax(-1) / FP8_MAX
    scale_T_G = torch.where(scale_T_G == 0, 1.0, scale_T_G)
    return (x_T_G_C / scale_T_G[..., None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale_T_G


def write_rows(
    pages_P_G_R_C: Tensor, scale_P_G_R: Tensor | None, value_T_G_C: Tensor, row_T: Tensor
) -> None:
    """value[t] to row row[t] % R of page row[t] // R, with its scales where there are any."""
    page_T, row_T = row_T // pages_P_G_R_C.shape[2], row_T % pages_P_G_R_C.shape[2]
    if scale_P_G_R is not None:
        value_T_G_C, scale_P_G_R[page_T, :, row_T] = quantize_ref(value_T_G_C)
    pages_P_G_R_C[page_T, :, row_T] = value_T_G_C.to(pages_P_G_R_C.dtype)
