"""How patch_embed is cut, which specs its kernels take, and where intermediate rows lie."""

# Dimension key: T tokens, R rows of a product, F its output width, D model width.

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..._configs import chooser, tile_of
from ..._scratch import Buffer, lay_out
from .reference import NUM_CHANNELS, PatchSpec

# Output features per partial sum of squares. One size for every configuration: a row's norm then
# has the same bits whichever configuration computed it.
SLOT_SIZE = 64

BLOCK_K = 64  # depth of a product's step: divides 4800 and 5120

# What the stem keeps in shared memory: an H200 and a B200 have 227 KiB, of which Triton takes one.
MAX_STEM_SHARED = 225 * 1024
MAX_FIRST_WEIGHTS = 128 * 256  # elements; more would not fit an A100 beside the second layer


@dataclass(frozen=True)
class StemConfig:
    """One for every problem: its norms are sums over a tile, whose order the tile decides."""

    block_r: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ProductConfig:
    """A tile of `block_f` output features by `block_r` rows, which runs over the whole depth."""

    block_f: int
    block_r: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class NormConfig:
    block_d: int
    num_warps: int
    num_stages: int


STEM = StemConfig(block_r=32, num_warps=8, num_stages=2)
NORM = NormConfig(block_d=1024, num_warps=4, num_stages=1)

# Largest number of rows -> configuration. Few rows: narrow tiles, so that 64 programs and more pull
# weights, with 40 KB and more of them in flight each. Many rows: tall tiles, because every program
# along F repeats the norm and GELU of its rows. Chosen by these counts and by the registers of the
# cubins, not by timing.
PRODUCTS = (
    (16, ProductConfig(block_f=64, block_r=16, num_warps=4, num_stages=8)),
    (128, ProductConfig(block_f=64, block_r=32, num_warps=8, num_stages=6)),
    (512, ProductConfig(block_f=128, block_r=64, num_warps=8, num_stages=4)),
    (None, ProductConfig(block_f=256, block_r=64, num_warps=8, num_stages=4)),
)


@chooser
def choose_product(num_rows: int) -> ProductConfig:
    """Pure: same problem, same config; no device, no clock."""
    for limit, config in PRODUCTS:
        if limit is None or num_rows <= limit:
            return config
    raise AssertionError("the last row of PRODUCTS has no limit")


def kernel_why_not(spec: PatchSpec, dtype: torch.dtype) -> str | None:
    """Why CUDA tensors with weights of this dtype take the plain path; None when kernels do."""
    if dtype == torch.float32:
        return "the kernels' products take 16-bit operands"
    return stem_why_not(spec)


def stem_why_not(spec: PatchSpec) -> str | None:
    if len(spec.folds) < 2:
        return f"folds={spec.folds}: the first kernel computes two folds"
    if tile_of(spec.widths[0]) * tile_of(NUM_CHANNELS * spec.folds[0] ** 2) > MAX_FIRST_WEIGHTS:
        return (
            f"folds={spec.folds}, widths={spec.widths}: the first layer is too large for one tile"
        )
    shared = stem_shared(spec)
    if shared > MAX_STEM_SHARED:
        return f"widths={spec.widths}: the first two layers take {shared} bytes of shared memory"
    return None


def stem_shared(spec: PatchSpec) -> int:
    """Most bytes of shared memory that the stem takes: the second layer's weights for one place of
    its fold, twice, the first layer's, and its input and output rows, all of 16 bits."""
    first, second = spec.widths[:2]
    c1, k = tile_of(first), tile_of(NUM_CHANNELS * spec.folds[0] ** 2)
    part = max(16, 1 << (second.bit_length() - 1))
    c2 = part + (tile_of(second - part) if second > part else 0)
    return 2 * (STEM.num_stages * c1 * c2 + c1 * k + STEM.block_r * (c1 + k))


def num_slots(num_features: int) -> int:
    """Pitch of a row of partial sums: a power of two, which a kernel loads whole."""
    return 1 << (-(-num_features // SLOT_SIZE) - 1).bit_length()


def scratch_buffers(
    spec: PatchSpec, num_tokens: int, width: int, dtype: torch.dtype
) -> tuple[Buffer, ...]:
    """Stem rows, then for every product its rows and their partial sums.

    >>> [b.shape for b in scratch_buffers(PatchSpec(), 1, 4096, torch.bfloat16)]
    [(32, 320), (2, 4800), (2, 128), (1, 4096), (1, 64)]
    """
    side = spec.patch // (spec.folds[0] * spec.folds[1])
    rows = num_tokens * spec.frames * side * side
    shapes = [((rows, spec.widths[1]), dtype)]
    for fold, features in zip(spec.folds[2:], spec.widths[2:], strict=True):
        rows //= fold * fold
        shapes += [((rows, features), dtype), ((rows, num_slots(features)), torch.float32)]
    shapes += [((num_tokens, n), torch.float32) for n in (width, num_slots(width))]
    return lay_out(shapes)


def scratch_bytes(spec: PatchSpec, num_tokens: int, width: int, dtype: torch.dtype) -> int:
    """Bytes that `patch_embed` needs for intermediate rows; 0 where it takes the plain path."""
    if kernel_why_not(spec, dtype) is not None:
        return 0
    return scratch_buffers(spec, num_tokens, width, dtype)[-1].end
