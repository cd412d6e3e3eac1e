"""Readers of ready quantised checkpoints: their codes and scales, unchanged in meaning."""

# Dimension key: E experts, R rows, K columns, G groups of columns that share a scale.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .codes import FP8_BLOCK, Scales, silence_zero_groups
from .fill import Source
from .formats import Format
from .pack import reinterpret

PACKINGS = ("awq", "gptq", "rows")
# AWQ's nibble i holds column (0, 2, 4, 6, 1, 3, 5, 7)[i] of eight; this is the inverse.
_AWQ_NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
_SCALE_DTYPE = {
    "int4": (torch.bfloat16,),
    "int4_f16": (torch.float16,),
    "mxfp4": (torch.uint8, torch.float8_e8m0fnu),
    "nvfp4": (torch.float8_e4m3fn,),
    "fp8": (torch.float32, torch.bfloat16, torch.float16),
    "fp8_channel": (torch.float32, torch.bfloat16, torch.float16),
}


@dataclass(frozen=True)
class MatrixScales:
    """What comes with one matrix of a checkpoint."""

    scale: Tensor
    zero: Tensor | None = None
    outer: Tensor | None = None


def read_checkpoint(
    name: str, data: Tensor, fmt: Format, given: MatrixScales, *, kn: bool, packing: str | None
) -> Source:
    """The source of one stack. Raises TypeError or ValueError naming `name` or its scales."""
    if not fmt.packed:
        raise ValueError(f"scales: precision {fmt.name!r} has none")
    _check(f"scales.{name}", given.scale, _SCALE_DTYPE[fmt.name], data)
    is_int4 = fmt.name.startswith("int4")
    if packing not in (PACKINGS if is_int4 else (None,)):
        wanted = f"one of {', '.join(PACKINGS)}" if is_int4 else "None"
        raise ValueError(f"packing: precision {fmt.name!r} needs {wanted}, got {packing!r}")
    if given.zero is not None and not is_int4:
        raise ValueError(f"scales.{name}_zero: precision {fmt.name!r} has no zero points")
    if (given.outer is not None) != (fmt.name == "nvfp4"):
        words = "needs" if given.outer is None else "does not have"
        raise ValueError(f"scales.{name}_global: precision {fmt.name!r} {words} a global scale")
    if fmt.name.startswith("fp8"):
        return _Fp8Source(name, data, fmt, given, kn)
    if kn:
        raise ValueError(
            f"layout: '_kn' is for matrices of one number per weight; {name} in {fmt.name} has an "
            f"orientation of its own, use the layout without '_kn'"
        )
    if packing is not None:
        return _WordSource(name, data, fmt, given, packing)
    return _Fp4Source(name, data, fmt, given)


class _ReadySource:
    """What the readers share: nothing is rounded, so there is no error to report."""

    has_zero = False
    name: str
    base: Tensor
    shape: tuple[int, int, int]

    def error_E(self) -> None:
        return None

    def _refuse(self, bad: Tensor, part: str, expert: int, words: str) -> None:
        if bad.any():
            raise ValueError(f"{part}: expert {expert} holds {words}")


class _Fp8Source(_ReadySource):
    def __init__(self, name: str, data: Tensor, fmt: Format, given: MatrixScales, kn: bool) -> None:
        _check(name, data, (torch.float8_e4m3fn,), data, rank=3)
        self.name, self.base = name, data
        self._bytes = data.view(torch.uint8)
        scale = given.scale
        if kn:
            self._bytes = self._bytes.transpose(1, 2)
            if scale.ndim == 3 and (fmt.name == "fp8" or scale.shape[1] == 1):
                scale = scale.transpose(1, 2)
        num_experts, num_rows, num_columns = self._bytes.shape
        self.shape = (num_experts, num_rows, num_columns)
        if fmt.name == "fp8_channel":
            wanted = (num_experts, num_rows)
            scale = scale[..., 0] if scale.ndim == 3 and scale.shape[2] == 1 else scale
            rule = "one scale per row"
        else:
            wanted = (num_experts, -(-num_rows // FP8_BLOCK), -(-num_columns // FP8_BLOCK))
            rule = "one scale per block of 128 x 128"
        if tuple(scale.shape) != wanted:
            found = ""
            if fmt.name == "fp8" and scale.ndim == 3 and scale.numel() > 0:
                blocks = (_group(num_rows, scale.shape[1]), _group(num_columns, scale.shape[2]))
                found = f", blocks of {blocks[0]} x {blocks[1]}"
            raise ValueError(
                f"scales.{name}: {rule} is {wanted} for {name} [E, R, K] = {self.shape}, got "
                f"shape {tuple(scale.shape)}{found}"
            )
        self._scale = scale

    def scales(self, expert: int) -> Scales:
        scale = self._scale[expert].float()
        self._refuse(~scale.isfinite(), f"scales.{self.name}", expert, "NaN or Inf")
        return Scales(scale)

    def codes(self, expert: int, begin: int, end: int, scales: Scales) -> Tensor:
        codes_R_K = self._bytes[expert, begin:end].contiguous()
        self._refuse((codes_R_K & 0x7F) == 0x7F, self.name, expert, "NaN")
        return codes_R_K


class _Fp4Source(_ReadySource):
    """mxfp4 and nvfp4: two e2m1 codes in a byte, the low nibble is the even column."""

    def __init__(self, name: str, data: Tensor, fmt: Format, given: MatrixScales) -> None:
        self.name, self.base, self._fmt = name, data, fmt
        blocked = fmt.name == "mxfp4" and data.ndim == 4 and data.shape[3] == 16
        _check(name, data, (torch.uint8,), data, rank=4 if blocked else 3)
        self._bytes = data.flatten(2)
        num_experts, num_rows, num_bytes = self._bytes.shape
        self.shape = (num_experts, num_rows, 2 * num_bytes)
        _check_groups(f"scales.{name}", given.scale, self.shape, fmt, column_axis=2)
        self._scale = given.scale
        self._outer_E = None
        if given.outer is not None:
            self._outer_E = self._read_global(given.outer)

    def _read_global(self, outer: Tensor) -> Tensor:
        part, num_experts = f"scales.{self.name}_global", self.shape[0]
        _check(part, outer, (torch.float32,), self.base)
        if tuple(outer.shape) not in ((), (1,), (num_experts,)):
            raise ValueError(
                f"{part}: expected [E] = [{num_experts}] or a scalar, got shape "
                f"{tuple(outer.shape)}; gate and up rows share one factor"
            )
        outer_E = outer.expand(num_experts)
        # The factor times 2^8 is what is kept; it has to be a normal number.
        for expert, value in enumerate(outer_E.tolist()):
            if not 2.0**-126 <= value < 2.0**119:
                raise ValueError(f"{part}: expert {expert} has {value}, not in 2^-126..2^119")
        return outer_E

    def scales(self, expert: int) -> Scales:
        scale, part = self._scale[expert], f"scales.{self.name}"
        byte = scale.view(torch.uint8)
        if self._fmt.name == "mxfp4":
            # 6 * 2^126 is no float32 any more; 255 is NaN.
            self._refuse(byte >= 253, part, expert, "an e8m0 scale over 2^125")
            return Scales(byte)
        self._refuse(byte >= 0x7F, part, expert, "NaN or a negative scale")
        assert self._outer_E is not None
        return Scales(scale, outer=self._outer_E[expert])

    def codes(self, expert: int, begin: int, end: int, scales: Scales) -> Tensor:
        return silence_zero_groups(_nibbles(self._bytes[expert, begin:end]), scales, self._fmt)


class _WordSource(_ReadySource):
    """int4 in int32 words of eight nibbles: AWQ, GPTQ, or along the rows."""

    def __init__(
        self, name: str, data: Tensor, fmt: Format, given: MatrixScales, packing: str
    ) -> None:
        _check(name, data, (torch.int32,), data, rank=3)
        self.name, self.base, self._packing = name, data, packing
        num_experts, first, second = data.shape
        self.shape = {
            "awq": (num_experts, 8 * second, first),
            "gptq": (num_experts, second, 8 * first),
            "rows": (num_experts, first, 8 * second),
        }[packing]
        column_axis = 2 if packing == "rows" else 1
        _check_groups(f"scales.{name}", given.scale, self.shape, fmt, column_axis)
        self._scale = given.scale if packing == "rows" else given.scale.transpose(1, 2)
        self._zero = None
        if given.zero is not None:
            self._zero = self._read_zero(given.zero)
        self.has_zero = self._zero is not None

    def _read_zero(self, zero: Tensor) -> Tensor | None:
        """Words [E, G, R / 8]; None where all are 8."""
        part = f"scales.{self.name}_zero"
        if self._packing == "rows":
            raise ValueError(f"{part}: packing 'rows' has zero 8")
        _check(part, zero, (torch.int32,), self.base)
        num_experts, num_rows, _ = self.shape
        wanted = (num_experts, self._scale.shape[2], num_rows // 8)
        if tuple(zero.shape) != wanted or num_rows % 8:
            raise ValueError(
                f"{part}: expected [E, G, R / 8] = {wanted} for R={num_rows}, got shape "
                f"{tuple(zero.shape)}"
            )
        eights = 0x88888888 - 2**32 if self._packing == "awq" else 0x77777777
        return None if (zero == eights).all() else zero

    def scales(self, expert: int) -> Scales:
        scale_R_G = self._scale[expert].contiguous()
        self._refuse(~scale_R_G.isfinite(), f"scales.{self.name}", expert, "NaN or Inf")
        if self._zero is None:
            return Scales(scale_R_G)
        zero_G_R = _nibbles(self._zero[expert].view(torch.uint8))
        if self._packing == "awq":
            zero_G_R = _awq_columns(zero_G_R)
        else:  # a stored 15 means 16
            zero_G_R = zero_G_R + 1
        return Scales(scale_R_G, zero_G_R.T.contiguous())

    def codes(self, expert: int, begin: int, end: int, scales: Scales) -> Tensor:
        words = self.base[expert]
        if self._packing == "rows":
            return _nibbles(words[begin:end].view(torch.uint8))
        if self._packing == "gptq":
            return _nibbles(reinterpret(words[:, begin:end].T, torch.uint8))
        some_K_R = words[:, begin // 8 : end // 8]
        return _awq_columns(_nibbles(reinterpret(some_K_R, torch.uint8))).T.contiguous()


def _nibbles(bytes_X: Tensor) -> Tensor:
    """uint8 [..., 2 n] of bytes [..., n], low nibble first; int32 words viewed as bytes give their
    eight nibbles in order."""
    return torch.stack((bytes_X & 15, bytes_X >> 4), dim=-1).flatten(-2)


def _awq_columns(nibbles_X_R: Tensor) -> Tensor:
    order = torch.tensor(_AWQ_NIBBLE_OF_COLUMN, device=nibbles_X_R.device)
    return nibbles_X_R.unflatten(1, (-1, 8))[:, :, order].flatten(1)


def _group(num_columns: int, num_groups: int) -> int:
    return -(-num_columns // num_groups)


def _check_groups(
    part: str, scale: Tensor, shape: tuple[int, int, int], fmt: Format, column_axis: int
) -> None:
    assert fmt.group is not None
    num_experts, num_rows, num_columns = shape
    wanted = [num_experts, num_rows]
    wanted.insert(column_axis, -(-num_columns // fmt.group))
    if list(scale.shape) == wanted:
        return
    message = f"{part}: expected shape {tuple(wanted)}, got {tuple(scale.shape)}"
    if scale.ndim == 3 and scale.shape[column_axis] not in (0, wanted[column_axis]):
        found = _group(num_columns, scale.shape[column_axis])
        message += f": groups of {found} columns, {fmt.name} has groups of {fmt.group}"
    raise ValueError(message)


def _check(
    part: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    data: Tensor,
    rank: int | None = None,
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{part}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(d) for d in dtypes)
        raise TypeError(f"{part}: expected {wanted}, got {tensor.dtype}")
    if tensor.device != data.device:
        raise ValueError(f"{part}: expected device {data.device}, got {tensor.device}")
    if rank is not None and tensor.ndim != rank:
        raise ValueError(f"{part}: expected {rank} axes, got shape {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{part}: must be contiguous, strides are {tensor.stride()}")
