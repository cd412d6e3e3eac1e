"""Rounding to codes and back: one byte per value, before the values are packed in words."""

# Dimension key: R rows, K columns, G groups of columns that share a scale.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .formats import Format

FP8_BLOCK = 128  # rows and columns under one scale of fp8
FP8_MAX = 448.0
FP4_MAX = 6.0
CLIPS = (0.95, 0.9, 0.85, 0.8)  # of a group's extreme value, that `search_scales` tries beside 1


@dataclass(frozen=True)
class Scales:
    """Scales of one expert's matrix [R, K], as the format's checkpoints hold them.

    fp8 float32 [ceil(R / 128), ceil(K / 128)]; fp8_channel float32 [R]; int4 bfloat16 and int4_f16
    float16 [R, G]; mxfp4 e8m0 bytes [R, G]; nvfp4 float8_e4m3fn [R, G].
    """

    scale: Tensor
    zero_R_G: Tensor | None = None  # uint8; None: 8 (int4 alone)
    outer: Tensor | None = None  # float32 []: nvfp4's global scale, a factor

    def rows(self, begin: int, end: int, fmt: Format) -> Scales:
        """Of rows begin..end alone; in fp8 begin is a multiple of 128."""
        if fmt.name == "fp8":
            return Scales(self.scale[begin // FP8_BLOCK : -(-end // FP8_BLOCK)])
        zero = None if self.zero_R_G is None else self.zero_R_G[begin:end]
        return Scales(self.scale[begin:end], zero, self.outer)


def extremes(w_R_K: Tensor, fmt: Format) -> Tensor:
    """The largest magnitude under each scale, shaped like `Scales.scale`; int4's has its sign.

    NaN and Inf among the weights come through.
    """
    if fmt.name == "fp8_channel":
        return w_R_K.abs().amax(-1)
    if fmt.name == "fp8":
        groups_R_G = _in_groups(w_R_K.abs(), FP8_BLOCK).amax(-1)
        return _in_groups(groups_R_G.T, FP8_BLOCK).amax(-1).T
    assert fmt.group is not None
    if fmt.name in ("mxfp4", "nvfp4"):
        return _in_groups(w_R_K.abs(), fmt.group).amax(-1)
    low, high = _in_groups(w_R_K, fmt.group).aminmax(dim=-1)
    return torch.where(-low > high, low, high)


def choose_scales(extreme: Tensor, fmt: Format) -> Scales:
    """Scales of a whole expert from its `extremes`, rounded as they will be stored.

    fp8: extreme / 448. int4: extreme / -8, so that the value of the largest magnitude is code 0
    and all 16 codes are in use; a value of the same magnitude and the other sign loses one step.
    mxfp4: 2^(floor(log2 extreme) - 2) (OCP Microscaling Formats 1.0, section 6.3).
    nvfp4: outer = extreme of the expert / (6 * 448), scale = extreme / (6 * outer).
    """
    if fmt.name.startswith("fp8"):
        return Scales(extreme / FP8_MAX)
    if fmt.name == "int4":
        return Scales((extreme / -8).to(torch.bfloat16))
    if fmt.name == "int4_f16":
        return Scales((extreme / -8).to(torch.float16))
    if fmt.name == "mxfp4":
        exponent_field = extreme.view(torch.int32) >> 23
        return Scales((exponent_field - 2).clamp_(min=0).to(torch.uint8))
    outer = (extreme.max() / (FP4_MAX * FP8_MAX)).clamp_(min=torch.finfo(torch.float32).tiny)
    scale = (extreme / FP4_MAX / outer).clamp_(max=FP8_MAX)
    return Scales(scale.to(torch.float8_e4m3fn), outer=outer)


def search_scales(w_R_K: Tensor, extreme_R_G: Tensor, fmt: Format) -> Scales:
    """int4's scales of these rows with the least error in each group: those of `choose_scales`, or
    with the extreme value clipped to one of CLIPS. Among equal ones the first."""
    assert fmt.name.startswith("int4")
    scale_R_G = choose_scales(extreme_R_G, fmt).scale
    least_R_G = _rounding_error(w_R_K, scale_R_G, fmt)
    for clip in CLIPS:
        clipped_R_G = choose_scales(extreme_R_G * clip, fmt).scale
        error_R_G = _rounding_error(w_R_K, clipped_R_G, fmt)
        better_R_G = error_R_G < least_R_G
        scale_R_G = torch.where(better_R_G, clipped_R_G, scale_R_G)
        least_R_G = torch.where(better_R_G, error_R_G, least_R_G)
    return Scales(scale_R_G)


def _rounding_error(w_R_K: Tensor, scale_R_G: Tensor, fmt: Format) -> Tensor:
    """L2 norm [R, G] of what rounding takes from each group; float64, as float32 squares of weights
    that a format can hold may underflow."""
    assert fmt.group is not None
    scales = Scales(scale_R_G)
    lost_R_K = decode(encode(w_R_K, scales, fmt), scales, fmt).sub_(w_R_K)
    return torch.linalg.vector_norm(_in_groups(lost_R_K, fmt.group), dim=-1, dtype=torch.float64)


def encode(w_R_K: Tensor, scales: Scales, fmt: Format) -> Tensor:
    """Codes uint8 [R, K] of float32 weights: divided by the stored scale, rounded to nearest even.

    fp8: e4m3 bits; int4: n in 0..15; mxfp4 and nvfp4: bits s, e1, e0, m. Where the scale is 0, the
    code of 0.
    """
    scale = _per_weight(scales.scale, w_R_K.shape, fmt)
    if scales.outer is not None:
        scale = scale * scales.outer
    x_R_K = w_R_K / scale.masked_fill(scale == 0, torch.inf)
    if fmt.name.startswith("fp8"):
        return x_R_K.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    if fmt.name.startswith("int4"):
        return x_R_K.round_().clamp_(-8, 7).add_(8).to(torch.uint8)
    return _encode_fp4(x_R_K)


def _encode_fp4(x_R_K: Tensor) -> Tensor:
    """Codes of the nearest of +-0, 0.5, 1, 1.5, 2, 3, 4, 6. Steps are 0.5 below 2, 1 below 4, then
    2: in each part the code is a rounded multiple of the step, plus a constant."""
    sign_R_K = (x_R_K < 0).to(torch.uint8) << 3
    x_R_K = x_R_K.abs_().clamp_(max=FP4_MAX)
    upper = torch.where(x_R_K < 4, x_R_K.round() + 2, (x_R_K * 0.5).round_() + 4)
    code = torch.where(x_R_K < 2, (x_R_K * 2).round_(), upper)
    return code.to(torch.uint8) | sign_R_K


def decode(codes_R_K: Tensor, scales: Scales, fmt: Format) -> Tensor:
    """float32 values [R, K] of the codes.

    Exact but for one rounding in fp8 and one in nvfp4, where the scale is a full float32.
    """
    if fmt.name.startswith("fp8"):
        value = codes_R_K.view(torch.float8_e4m3fn).float()
    elif fmt.name.startswith("int4"):
        value = codes_R_K.float()
        zero = scales.zero_R_G
        value -= 8 if zero is None else _per_weight(zero, codes_R_K.shape, fmt)
    else:  # the bits of a float16 that is smaller by 2^14, an exact factor
        code = codes_R_K.to(torch.int16)
        bits = ((code & 8) << 12) | ((code & 7) << 9)
        value = bits.view(torch.float16).float() * 2.0**14
    value *= _per_weight(scales.scale, codes_R_K.shape, fmt)
    if scales.outer is not None:
        value *= scales.outer
    return value


def silence_zero_groups(codes_R_K: Tensor, scales: Scales, fmt: Format) -> Tensor:
    """Codes of a checkpoint, with those of groups whose scale is 0 set to 0 (nvfp4 alone: there the
    packed scale cannot hold 0)."""
    if fmt.name != "nvfp4":
        return codes_R_K
    scale = _per_weight(scales.scale, codes_R_K.shape, fmt)
    return codes_R_K.masked_fill(scale == 0, 0)


def _in_groups(x_R_K: Tensor, group: int) -> Tensor:
    """[R, G, group], the last group filled up with zeros."""
    missing = -x_R_K.shape[-1] % group
    if missing:
        x_R_K = torch.nn.functional.pad(x_R_K, (0, missing))
    return x_R_K.unflatten(-1, (-1, group))


def _per_weight(scale: Tensor, shape: torch.Size, fmt: Format) -> Tensor:
    """Scales or zero points as float32, one for every weight of [R, K] or to be broadcast so."""
    if scale.dtype == torch.uint8 and fmt.name == "mxfp4":
        scale = scale.view(torch.float8_e8m0fnu)
    scale = scale.float()
    if fmt.name == "fp8_channel":
        return scale[:, None]
    num_rows, num_columns = shape
    if fmt.name == "fp8":
        scale = scale.repeat_interleave(FP8_BLOCK, dim=0)[:num_rows]
    return scale.repeat_interleave(fmt.group or FP8_BLOCK, dim=1)[:, :num_columns]
