"""Packing a stack of experts, one after the other, where the source lies or beside it."""

# Dimension key: E experts, R rows, K columns.

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from .._dims import Dims
from ..precision import ACTIVATIONS
from .codes import FP8_BLOCK, Scales, choose_scales, decode, encode, extremes, search_scales
from .formats import FORMATS, Format
from .pack import pack_scales, pack_words
from .packed import OUTER, PackedExperts, data_shape, scale_dtype, scale_shape

PROGRESS_EXPERTS = 8  # a line of progress for every so many
_SLABS = 8  # parts of an expert worked on one after the other, of 128 rows at least


class Source(Protocol):
    """Where experts come from, in codes: one expert at a time, and a slab of its rows."""

    name: str  # of the argument, for errors
    base: Tensor  # the caller's tensor: contiguous, experts in order
    shape: tuple[int, int, int]  # E, R, K
    has_zero: bool

    def scales(self, expert: int) -> Scales: ...

    def codes(self, expert: int, begin: int, end: int, scales: Scales) -> Tensor:
        """uint8 [end - begin, K]; `scales` are of these rows."""
        ...

    def error_E(self) -> Tensor | None: ...


class FloatSource:
    """Experts in bfloat16, float16 or float32, [E, R, K] or (`kn`) [E, K, R]. search: of int4's
    scales."""

    has_zero = False

    def __init__(
        self, name: str, weights: Tensor, fmt: Format, kn: bool, search: bool = False
    ) -> None:
        self.name, self.base = name, weights
        self._fmt, self._search = fmt, search
        self.weights_E_R_K = weights.transpose(1, 2) if kn else weights
        num_experts, num_rows, num_columns = self.weights_E_R_K.shape
        self.shape = (num_experts, num_rows, num_columns)
        # Of each expert: sum of squares of what rounding took, and of the weights.
        self._squares_E_2 = torch.zeros(num_experts, 2, dtype=torch.float64, device=weights.device)

    def _rows(self, expert: int, begin: int, end: int) -> Tensor:
        rows_R_K = self.weights_E_R_K[expert, begin:end]
        return rows_R_K.to(torch.float32, memory_format=torch.contiguous_format)

    def scales(self, expert: int) -> Scales:
        slabs = [
            extremes(self._rows(expert, begin, end), self._fmt) for begin, end in row_slabs(self)
        ]
        extreme = torch.cat(slabs)
        if not extreme.isfinite().all():
            raise ValueError(f"{self.name}: expert {expert} holds NaN or Inf")
        scales = choose_scales(extreme, self._fmt)
        if not (self._fmt.name == "mxfp4" or scales.scale.float().isfinite().all()):
            raise ValueError(
                f"{self.name}: expert {expert} needs scales that {scales.scale.dtype} cannot hold; "
                f"its largest weight is {extreme.abs().max().item():.3g}"
            )
        if not self._search:
            return scales
        searched = [
            search_scales(self._rows(expert, begin, end), slab, self._fmt).scale
            for (begin, end), slab in zip(row_slabs(self), slabs, strict=True)
        ]
        return Scales(torch.cat(searched))

    def codes(self, expert: int, begin: int, end: int, scales: Scales) -> Tensor:
        w_R_K = self._rows(expert, begin, end)
        codes_R_K = encode(w_R_K, scales, self._fmt)
        lost_R_K = decode(codes_R_K, scales, self._fmt).sub_(w_R_K)
        for i, x_R_K in enumerate((lost_R_K, w_R_K)):
            norm = torch.linalg.vector_norm(x_R_K, dtype=torch.float64)
            self._squares_E_2[expert, i] += norm.square()
        return codes_R_K

    def error_E(self) -> Tensor:
        lost_E, whole_E = self._squares_E_2.sqrt().unbind(-1)
        return (lost_E / whole_E.masked_fill(whole_E == 0, 1)).float()


def row_slabs(source: Source) -> list[tuple[int, int]]:
    """(begin, end) of the rows worked on at once; begin is a multiple of fp8's block."""
    num_rows = source.shape[1]
    step = max(FP8_BLOCK, num_rows // _SLABS // FP8_BLOCK * FP8_BLOCK)
    return [(begin, min(begin + step, num_rows)) for begin in range(0, num_rows, step)]


def pack_experts(
    source: Source, fmt: Format, *, inplace: bool = False, progress: bool = False
) -> PackedExperts:
    """Pack every expert of `source`.

    With `inplace`, into the beginning of the source's storage where that is large enough. Works in
    one expert's packed bytes and a slab of rows; an expert is read whole before its place is
    written, and none begins behind where the source has it. To a plain format they are converted.
    On device "meta" the result has its shapes, and nothing is computed.
    """
    if not fmt.packed:
        assert isinstance(source, FloatSource)
        return convert_experts(source, fmt, inplace=inplace, progress=progress)
    num_experts, num_rows, num_columns = source.shape
    device = source.base.device
    packed = _allocate(source, fmt, inplace)
    if device.type == "meta":
        return replace(packed, error_E=source.error_E())
    data = torch.empty(packed.data.shape[1:], dtype=fmt.dtype, device=device)
    for expert in range(num_experts):
        scales = source.scales(expert)
        for begin, end in row_slabs(source):
            slab = scales.rows(begin, end, fmt)
            codes_R_K = source.codes(expert, begin, end, slab)
            pad = 8 if fmt.name.startswith("int4") else 0
            pad = pad if slab.zero_R_G is None else slab.zero_R_G[:, -1:]
            data[:, begin:end] = pack_words(codes_R_K, fmt, pad)
        packed.data[expert] = data
        kept = (packed.scale, packed.zero, packed.outer_E)
        for stack, part in zip(kept, pack_scales(scales, fmt), strict=True):
            if stack is not None and part is not None:
                stack[expert] = part
        if progress:
            _print_progress(source.name, fmt, expert + 1, num_experts)
    return PackedExperts(
        fmt, packed.data, packed.scale, packed.zero, packed.outer_E, num_rows, num_columns,
        source.error_E(),
    )  # fmt: skip


def check_search(precision: str, search: bool) -> None:
    """Raises ValueError where there are no scales to search for."""
    if search and not precision.startswith("int4"):
        raise ValueError(f"search: int4 and int4_f16 scales are searched for, not {precision}'s")


def pack_matrix(weight_R_K: Tensor, precision: str, *, search: bool = False) -> PackedExperts:
    """One matrix in float32, bfloat16 or float16, rounded to a packed format or converted: what
    `linear` takes. Allocates the result and leaves the source as it is. Raises TypeError or
    ValueError naming the argument.

    search: of a few int4 scales for each group of columns, the one with the least squared error.
    Packing takes longer, the packed form is the same. Other formats have none: ValueError.
    """
    if precision not in FORMATS:
        raise ValueError(f"precision: {precision!r} is not one of {', '.join(FORMATS)}")
    Dims().check(weight_R_K=weight_R_K, dtype=ACTIVATIONS)
    if weight_R_K.numel() == 0:
        raise ValueError(f"weight_R_K: is empty, shape {tuple(weight_R_K.shape)}")
    check_search(precision, search)
    fmt = FORMATS[precision]
    source = FloatSource("weight_R_K", weight_R_K.detach()[None], fmt, False, search)
    packed = pack_experts(source, fmt)
    if packed.data.data_ptr() == weight_R_K.data_ptr():  # nothing was to be changed
        packed = replace(packed, data=packed.data.clone())
    return packed


def convert_experts(
    source: FloatSource, fmt: Format, *, inplace: bool = False, progress: bool = False
) -> PackedExperts:
    """Experts as plain numbers: the source itself where nothing changes, else expert by expert.

    Raises ValueError where rounding to `fmt.dtype` leaves NaN or Inf.
    """
    assert not fmt.packed
    num_experts, num_rows, num_columns = source.shape
    weights_E_R_K = source.weights_E_R_K
    if weights_E_R_K.is_contiguous() and weights_E_R_K.dtype == fmt.dtype:
        return PackedExperts(fmt, weights_E_R_K, None, None, None, num_rows, num_columns)
    packed = _allocate(source, fmt, inplace)
    expert_R_K = torch.empty(num_rows, num_columns, dtype=fmt.dtype, device=source.base.device)
    for expert in range(num_experts):
        expert_R_K.copy_(weights_E_R_K[expert])
        if fmt.dtype != source.base.dtype and not expert_R_K.isfinite().all():
            raise ValueError(f"{source.name}: expert {expert} holds NaN or Inf as {fmt.name}")
        packed.data[expert] = expert_R_K
        if progress:
            _print_progress(source.name, fmt, expert + 1, num_experts)
    return packed


def _allocate(source: Source, fmt: Format, inplace: bool) -> PackedExperts:
    num_experts, num_rows, num_columns = source.shape
    device = source.base.device
    data = _allocate_data(source, fmt, inplace)
    scale = zero = outer_E = None
    if fmt.packed:
        shape = (num_experts, *scale_shape(fmt, num_rows, num_columns))
        scale = torch.empty(shape, dtype=scale_dtype(fmt), device=device)
        if source.has_zero:
            zero = torch.empty_like(scale)
        if fmt.name in OUTER:
            outer_E = torch.empty(num_experts, dtype=torch.float32, device=device)
    return PackedExperts(fmt, data, scale, zero, outer_E, num_rows, num_columns)


def _allocate_data(source: Source, fmt: Format, inplace: bool) -> Tensor:
    num_experts, num_rows, num_columns = source.shape
    shape = (num_experts, *data_shape(fmt, num_rows, num_columns))
    base, item = source.base, fmt.dtype.itemsize
    offset = base.storage_offset() * base.element_size()
    fits = math.prod(shape) * item <= base.numel() * base.element_size()
    if not (inplace and fits and offset % item == 0 and base.data_ptr() % 16 == 0):
        return torch.empty(shape, dtype=fmt.dtype, device=base.device)
    data = torch.empty(0, dtype=fmt.dtype, device=base.device)
    return data.set_(base.untyped_storage(), offset // item, shape)  # pyright: ignore


def _print_progress(name: str, fmt: Format, done: int, num_experts: int) -> None:
    if done % PROGRESS_EXPERTS == 0 or done == num_experts:
        print(f"{name}: {done} of {num_experts} experts in {fmt.name}", file=sys.stderr, flush=True)
