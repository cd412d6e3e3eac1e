"""shift_keys: few rows, scattered over all layers; the launch decides."""

# Dimension key: L layers, I keys, G KV heads, C head width, P pages, R rows in a page.

from __future__ import annotations

import torch
from torch import Tensor

from tml_kernels._pages import FP8, quantize_ref
from tml_kernels.ops.shift_keys import cases, shift_keys
from tml_kernels.ops.shift_keys.reference import shift_keys_ref
from tml_kernels.testing import assert_matches

from .harness import OpBench, Variant

FP8_LIMIT = 0.04  # rounding to a step of a sixteenth to an eighth, over all sizes: some 0.027


def check(case: cases.Case, device: str) -> None:
    inputs = case.make_inputs(device)
    expected = shift_keys_ref(inputs["source_L_I_G_C"], inputs["shift_I"], inputs["rope_phase_B"])
    shift_keys(**inputs)
    keys = written(**inputs)
    kept, page_dtype = inputs["row_I"] >= 0, inputs["k_pages_L_P_G_R_C"].dtype
    if page_dtype == FP8:
        assert_matches(keys[:, kept], expected[:, kept], limit=FP8_LIMIT)
    else:
        assert_matches(keys[:, kept], expected[:, kept], dtype=page_dtype)


def written(
    k_pages_L_P_G_R_C: Tensor, row_I: Tensor, k_scale_L_P_G_R: Tensor | None = None, **_: Tensor
) -> Tensor:
    """The keys [L, I, G, C] that the pages hold at these rows; anything for what is skipped."""
    page_I, row_I = row_I // k_pages_L_P_G_R_C.shape[3], row_I % k_pages_L_P_G_R_C.shape[3]
    keys_I_L_G_C = k_pages_L_P_G_R_C[:, page_I, :, row_I]
    if k_scale_L_P_G_R is not None:
        keys_I_L_G_C = keys_I_L_G_C.float() * k_scale_L_P_G_R[:, page_I, :, row_I][..., None]
    return keys_I_L_G_C.transpose(0, 1)


def ours(**inputs: Tensor) -> Tensor:
    shift_keys(**inputs)
    return compared(**inputs)


def compared(
    k_pages_L_P_G_R_C: Tensor, k_scale_L_P_G_R: Tensor | None = None, **_: Tensor
) -> Tensor:
    """What the harness compares: the scales, where the pages' codes are one of two neighbours."""
    return k_pages_L_P_G_R_C if k_scale_L_P_G_R is None else k_scale_L_P_G_R


def torch_shift(
    source_L_I_G_C: Tensor,
    k_pages_L_P_G_R_C: Tensor,
    row_I: Tensor,
    shift_I: Tensor,
    rope_phase_B: Tensor,
    k_scale_L_P_G_R: Tensor | None = None,
) -> Tensor:
    """In float32, written by index; no row is skipped in what is timed."""
    keys_L_I_G_C = shift_keys_ref(source_L_I_G_C, shift_I, rope_phase_B, dtype=torch.float32)
    page_I, row_I = row_I // k_pages_L_P_G_R_C.shape[3], row_I % k_pages_L_P_G_R_C.shape[3]
    pages, keys_I_L_G_C = k_pages_L_P_G_R_C, keys_L_I_G_C.transpose(0, 1)
    if k_scale_L_P_G_R is not None:
        keys_I_L_G_C, scale_I_L_G = quantize_ref(keys_I_L_G_C)
        k_scale_L_P_G_R[:, page_I, :, row_I] = scale_I_L_G
        pages, keys_I_L_G_C = pages.view(torch.uint8), keys_I_L_G_C.view(torch.uint8)
    pages[:, page_I, :, row_I] = keys_I_L_G_C.to(pages.dtype)
    return compared(k_pages_L_P_G_R_C, k_scale_L_P_G_R)


OP = OpBench(
    name="shift_keys",
    edge=cases.EDGE,
    model=cases.MODEL,
    bench=cases.BENCH,
    check=check,
    variants={"ours": Variant(ours), "torch": Variant(torch_shift)},
)
