"""How paged_attention is cut, which problems its kernels take, and where its partial sums lie."""

# Dimension key: T tokens, S session rows, H query heads, G KV heads, C head width, R rows in a
# page, M page-list columns, B features, K splits.

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..._configs import chooser, tile_of
from ..._device import max_shared
from ..._scratch import Buffer, lay_out

SPLIT_KEYS = 512  # keys of a split: fixed, because a query's bits depend on where splits begin
MAX_PROGRAMS = 528  # a program takes every MAX_PROGRAMS-th item: four for each SM of an H200
MAX_WINDOW = 1 << 20
MAX_SCRATCH = 2 << 30
# The counters have the first bytes of every scratch, whatever the call: partial results of one call
# never lie where another counts.
MAX_COUNTERS = 1 << 16
DOT_K = 32  # (tokens x features) of one product of the relative bias
MAX_BIAS_PRODUCTS = 4  # of a tile: each has its part of the table in shared memory, every stage


@dataclass(frozen=True)
class Problem:
    num_tokens: int  # T
    num_rows: int  # S
    num_columns: int  # M
    num_heads: int  # H
    num_kv_heads: int  # G
    head_width: int  # C
    page_rows: int  # R
    window: int | None
    num_features: int  # B; 0 without a relative bias
    dtype: torch.dtype
    page_dtype: torch.dtype

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def split_pages(self) -> int:
        return max(1, SPLIT_KEYS // self.page_rows)

    @property
    def block_r(self) -> int:
        return tile_of(self.page_rows)

    @property
    def block_c(self) -> int:
        return tile_of(self.head_width)

    @property
    def block_b(self) -> int:
        return tile_of(max(1, self.num_features))

    @property
    def max_splits(self) -> int:
        """Splits lie at fixed places of the page list, with a window at fixed positions."""
        if self.window is None:
            return max(1, -(-self.num_columns // self.split_pages))
        span = self.split_pages * self.page_rows
        return (self.window + self.num_tokens + span - 2) // span + 1


def problem_of(
    q: Tensor, k_pages: Tensor, page_S_M: Tensor, window: int | None, rel: Tensor | None
) -> Problem:
    return Problem(
        num_tokens=q.shape[0],
        num_rows=page_S_M.shape[0],
        num_columns=page_S_M.shape[1],
        num_heads=q.shape[1],
        num_kv_heads=k_pages.shape[1],
        head_width=q.shape[2],
        page_rows=k_pages.shape[2],
        window=window,
        num_features=0 if rel is None else rel.shape[2],
        dtype=q.dtype,
        page_dtype=k_pages.dtype,
    )


@dataclass(frozen=True)
class Config:
    """A tile of `block_q` rows, each one query head of one token; of as many tokens as fit, or of
    one alone: a tile's biases cost what its tokens do, whether there are so many or not."""

    block_q: int
    num_warps: int
    num_stages: int
    alone: bool = False

    def tile_tokens(self, p: Problem) -> int:
        return 1 if self.alone else self.block_q // p.group

    def max_tiles(self, p: Problem) -> int:
        """Tiles of all session rows and of the padding."""
        rows = min(p.num_rows + 1, p.num_tokens)
        return min(p.num_tokens // self.tile_tokens(p) + rows, p.num_tokens)

    def dot_tokens(self, p: Problem) -> int:
        """Tokens of a tile whose biases come from one product."""
        tokens = 1 << (self.tile_tokens(p) - 1).bit_length()
        return min(tokens, max(1, DOT_K // p.block_b))

    def shared_bytes(self, p: Problem, table_dtype: torch.dtype) -> int:
        """Shared memory of the loop over pages of 16 bits, as cubins for sm_80 to sm_100 have it:
        for every second stage a page's keys, values and positions, and what the tile needs of the
        table; and the tile's own rows."""
        dot_tokens = self.dot_tokens(p)
        columns = -(-self.tile_tokens(p) // dot_tokens) * dot_tokens * p.block_b
        row = 4 * p.block_c + table_dtype.itemsize * columns + 24
        own = 2 * self.block_q * (p.block_c + columns + p.block_r)
        return (self.num_stages - 1) // 2 * p.block_r * row + own

    def fitted(self, p: Problem, table_dtype: torch.dtype | None, arch: int) -> Config:
        """With fewer stages, which give the same bits, where a relative bias would not fit the
        chip's shared memory. table_dtype: None without a bias."""
        if table_dtype is None or self.alone or p.page_dtype != p.dtype:
            return self
        if self.shared_bytes(p, table_dtype) <= max_shared(arch):
            return self
        return replace(self, num_stages=FEW_STAGES.get(self.block_q, 1))


# ALONE is for output steps, a token of every row; LARGE reads keys once for twice as many tokens as
# SMALL. All give the same bits. Four warps leave room for a second program on a processor, which
# hides what a program waits for before its first key: where there is work for all of an H200 they
# take 0.69 to 0.75 of the time of eight, though a few registers lie in local memory (`bench tune`).
ALONE = Config(block_q=16, num_warps=4, num_stages=2, alone=True)
ALONE_WIDE = Config(block_q=16, num_warps=8, num_stages=3, alone=True)  # heads over 128 wide
SMALL = Config(block_q=16, num_warps=8, num_stages=5)
LARGE = Config(block_q=32, num_warps=4, num_stages=3)


FEW_STAGES = {SMALL.block_q: 3, LARGE.block_q: 1}


@chooser
def choose_config(p: Problem) -> Config:
    """Pure: same problem, same config; no device, no clock."""
    bias_products = SMALL.tile_tokens(p) // SMALL.dot_tokens(p) if p.num_features else 0
    if p.num_tokens <= p.num_rows or bias_products > MAX_BIAS_PRODUCTS:
        return ALONE if p.head_width <= 128 else ALONE_WIDE
    fills = p.num_tokens >= LARGE.tile_tokens(p) * max(1, p.num_rows)
    return LARGE if fills and p.page_dtype == p.dtype else SMALL


def kernel_why_not(p: Problem) -> str | None:
    """Why CUDA tensors take the plain path; None when the kernels take them."""
    if p.dtype == torch.float32:
        return "the kernels' products take 16-bit operands"
    reason = shape_why_not(p)
    if reason is not None:
        return reason
    config = choose_config(p)
    if (size := scratch_buffers(p)[-1].end) > MAX_SCRATCH:
        return f"T={p.num_tokens}, M={p.num_columns}: partial results take {size} bytes"
    if config.max_tiles(p) * p.num_kv_heads > MAX_COUNTERS:
        return f"T={p.num_tokens}, G={p.num_kv_heads}: over {MAX_COUNTERS} tiles"
    return None


def shape_why_not(p: Problem) -> str | None:
    """What stands against the kernels in the interpreter too."""
    if p.page_dtype not in (p.dtype, torch.float8_e4m3fn):
        return f"queries of {p.dtype} with pages of {p.page_dtype}"
    if p.dtype == torch.float16 and p.page_dtype == torch.float8_e4m3fn:
        return "weights times values' scales are rounded to float16, which has no range for them"
    if p.head_width > 256:
        return f"C={p.head_width}: at most 256"
    if p.page_rows > 64:
        return f"R={p.page_rows}: at most 64"
    if p.group > 16:
        return f"H={p.num_heads}, G={p.num_kv_heads}: at most 16 query heads of one KV head"
    if p.num_features > 64:
        return f"B={p.num_features}: at most 64"
    if p.window is not None and p.window > MAX_WINDOW:
        return f"window={p.window}: at most {MAX_WINDOW}"
    return None


def scratch_buffers(p: Problem) -> tuple[Buffer, ...]:
    """The counters of the tiles, zero between calls; maximum and sum of every partial result
    [T, H, K, 2] and weighted values [T, H, K, C]."""
    partial = (p.num_tokens, p.num_heads, p.max_splits)
    return lay_out(
        [
            ((MAX_COUNTERS,), torch.int32),
            ((*partial, 2), torch.float32),
            ((*partial, p.block_c), torch.float32),
        ]
    )


def scratch_bytes(p: Problem) -> int:
    """Bytes that `paged_attention` needs on CUDA; 0 where it takes the plain path."""
    return 0 if kernel_why_not(p) is not None else scratch_buffers(p)[-1].end
