"""The oracle of patch_embed, and its plain path: the same lines in float64 and in float32.

An hMLP (Touvron et al., "Three things everyone should know about Vision Transformers", 2022,
section 5) over patches of several frames: fold pixels into channels step by step, a linear layer,
RMSNorm and GELU after each fold, the frames folded last. Fold orders are those of the `inkling`
model of transformers, so that its weights fit unchanged.
"""

# Dimension key: N frame groups, L frames in a group, H and W pixels, Y and X patch rows and columns
# of a frame, T = N * Y * X tokens, P patch side, D model width.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._plain import row_blocked_matmul

NUM_CHANNELS = 3
MISSING_PIXEL = -1.0  # of a pixel outside the frame, on the scale of 0..255

# Elements per call of the float32 GELU: below torch's threshold for several threads, and a multiple
# of every vector length.
GELU_BLOCK = 8192


@dataclass(frozen=True)
class PatchSpec:
    """How a patch becomes one row: sides in pixels, folds in order, the width after each fold.

    patch: side of a patch; frames: frames that make one token, folded after everything else.
    folds: spatial folds, their product is `patch`; widths: channels after each of them.
    extra_column: cut a frame as transformers does: width // patch + 1 columns and any frame size,
    where pixels beyond the frame are -1 before normalisation. Otherwise height and width must be
    multiples of `patch`. mean, std: of each channel, for pixels on the scale of 0..1.

    >>> PatchSpec().linear_shapes(4096)
    ((128, 75), (320, 512), (4800, 5120), (4096, 9600))
    """

    patch: int = 40
    frames: int = 2
    folds: tuple[int, ...] = (5, 2, 4)
    widths: tuple[int, ...] = (128, 320, 4800)
    extra_column: bool = False
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"frames={self.frames} is less than one")
        if not self.folds or min(self.folds) < 1 or math.prod(self.folds) != self.patch:
            raise ValueError(f"folds={self.folds} do not multiply to patch={self.patch}")
        if len(self.widths) != len(self.folds) or min(self.widths) < 1:
            raise ValueError(f"widths={self.widths} is not one positive width per fold")
        if len(self.mean) != NUM_CHANNELS or len(self.std) != NUM_CHANNELS or min(self.std) <= 0:
            raise ValueError(f"mean={self.mean}, std={self.std}: expected three, std over zero")

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(Y, X): patch rows and columns of a frame. ValueError for a size that cannot be cut."""
        if self.extra_column:
            return -(-height // self.patch), width // self.patch + 1
        for name, size in (("height", height), ("width", width)):
            if size % self.patch:
                raise ValueError(
                    f"frame {name} {size} is not a multiple of {self.patch}; crop or pad the frame"
                )
        return height // self.patch, width // self.patch

    def linear_shapes(self, width: int) -> tuple[tuple[int, int], ...]:
        """[out, in] of every linear layer, for a model of this width."""
        depth = (NUM_CHANNELS, *self.widths)
        spatial = [(depth[i + 1], depth[i] * fold * fold) for i, fold in enumerate(self.folds)]
        return (*spatial, (width, self.widths[-1] * self.frames))


PATCH_40 = PatchSpec()


class PatchWeights(NamedTuple):
    """linears: one [out, in] per fold, then [D, frames * widths[-1]]; norms: one per fold."""

    linears: tuple[Tensor, ...]
    norms: tuple[Tensor, ...]
    final_norm: Tensor


def spec_of(
    frames: Tensor,
    linears: list[Tensor],
    folds: list[int],
    extra_column: bool,
    mean: list[float],
    std: list[float],
) -> PatchSpec:
    """The spec behind the arguments of the registered op, which takes tensors and numbers only."""
    return PatchSpec(
        patch=math.prod(folds),
        frames=frames.shape[1],
        folds=tuple(folds),
        widths=tuple(linear.shape[0] for linear in linears[:-1]),
        extra_column=extra_column,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
    )


def divide_frames(
    frames_N_L_H_W_3: Tensor,
    spec: PatchSpec = PATCH_40,
    *,
    extent_N_2: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalised pixels [T, L, P, P, 3] in `dtype`, patches row by row within a frame group. Those
    beyond a group's extent are missing, as those beyond a frame are.

    In float32 bitwise what transformers' image processor makes of each frame.
    """
    groups, frames, height, width, _ = frames_N_L_H_W_3.shape
    rows, columns = spec.grid(height, width)
    p = spec.patch
    padding = (0, 0, 0, columns * p - width, 0, rows * p - height)
    x = F.pad(frames_N_L_H_W_3.to(dtype), padding, value=MISSING_PIXEL)
    if extent_N_2 is not None:
        y_Y, x_X = (torch.arange(size, device=x.device) for size in x.shape[2:4])
        beyond_N_Y_X = (y_Y[:, None] >= extent_N_2[:, :1, None]) | (x_X >= extent_N_2[:, 1:, None])
        x = x.masked_fill(beyond_N_Y_X[:, None, :, :, None], MISSING_PIXEL)
    mean = torch.tensor(spec.mean, dtype=dtype, device=x.device) * 255.0
    std = torch.tensor(spec.std, dtype=dtype, device=x.device) * 255.0
    x = (x - mean) / std
    x = x.reshape(groups, frames, rows, p, columns, p, NUM_CHANNELS)
    return x.permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, frames, p, p, NUM_CHANNELS)


def hmlp(
    pixels_T_L_P_P_3: Tensor,
    weights: PatchWeights,
    spec: PatchSpec = PATCH_40,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """Tokens [T, D] in the pixels' dtype, float32 or float64."""
    num_tokens, frames, side, _, depth = pixels_T_L_P_P_3.shape
    dtype = pixels_T_L_P_P_3.dtype
    x = pixels_T_L_P_P_3
    for fold, linear, norm in zip(spec.folds, weights.linears, weights.norms, strict=False):
        side //= fold
        x = x.reshape(num_tokens * frames, side, fold, side, fold, depth)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, fold * fold * depth)
        x = row_blocked_matmul(x, linear.to(dtype))
        x = _gelu(_rms_norm(x, norm.to(dtype), eps))
        depth = x.shape[-1]
    x = row_blocked_matmul(x.reshape(num_tokens, frames * depth), weights.linears[-1].to(dtype))
    return _rms_norm(x, weights.final_norm.to(dtype), eps)


def patch_embed_ref(
    frames_N_L_H_W_3: Tensor,
    weights: PatchWeights,
    *,
    spec: PatchSpec = PATCH_40,
    eps: float = 1e-6,
    extent_N_2: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Tokens [T, D] in `dtype`."""
    pixels = divide_frames(frames_N_L_H_W_3, spec, extent_N_2=extent_N_2, dtype=dtype)
    return hmlp(pixels, weights, spec, eps=eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _gelu(x: Tensor) -> Tensor:
    """erf-GELU of which every element depends on itself alone.

    torch's vector and scalar erf differ in the last bit, and which one an element gets depends on
    where a call's threads and vectors end; so every call has whole vectors and one thread.
    """
    if x.dtype == torch.float64:
        return F.gelu(x)
    flat = F.pad(x.reshape(-1), (0, -x.numel() % GELU_BLOCK))
    for block in flat.split(GELU_BLOCK):
        block.copy_(F.gelu(block))
    return flat[: x.numel()].view(x.shape)
