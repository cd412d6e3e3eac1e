"""How flow_head is cut, and the scratch that its launches hand on."""

# Dimension key: S session rows, N Euler steps, Q rows evaluated together: S, or 2 S when guided,
# D model width, W head width, U inner width of a block's MLP, L blocks, B output values (mel bins);
# of a product: F features, K columns.

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .reference import FlowWeights


@dataclass(frozen=True)
class Config:
    """A tile is block_r rows x block_f features; a program adds up split_k of its columns, block_k
    at a time.

    One configuration per kernel, whatever the number of rows: a row's bits cannot depend on it.
    """

    block_f: int
    block_r: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int

    def for_weight(self, dtype: torch.dtype, num_columns: int) -> Config:
        """Three tf32 products take more registers than three bfloat16 ones, and more room. Rows
        of a number of columns that 16 does not divide come by plain stores, which are not fenced
        from the wide product of 64 rows (sm_90)."""
        if dtype != torch.bfloat16:
            return replace(self, block_r=16, block_k=32)
        return self if num_columns % 16 == 0 else replace(self, block_r=min(self.block_r, 32))

    def splits(self, num_columns: int) -> int:
        return -(-num_columns // self.split_k)

    def tiles(self, num_rows: int, num_features: int) -> int:
        return -(-num_rows // self.block_r) * -(-num_features // self.block_f)

    def programs(self, num_rows: int, num_features: int, num_columns: int) -> int:
        return self.tiles(num_rows, num_features) * self.splits(num_columns)

    def part_values(self, num_rows: int, num_features: int, num_columns: int) -> int:
        """Of float32: a tile for each program."""
        programs = self.programs(num_rows, num_features, num_columns)
        return programs * self.block_r * self.block_f


# A program takes 64 KB of bfloat16 weights, three quarters of them asked for before the first is
# multiplied. At W = 1024 and U = 4096 that is 128 programs for each matrix of a block and 16 rows.
PRODUCT = Config(block_f=64, block_r=16, block_k=128, split_k=512, num_warps=4, num_stages=4)
# Short and wide: each program normalises its columns for itself.
NORM_PRODUCT = Config(block_f=128, block_r=16, block_k=64, split_k=256, num_warps=4, num_stages=4)
VELOCITY = Config(block_f=32, block_r=16, block_k=64, split_k=256, num_warps=4, num_stages=4)
# Many rows at once, N * Q of them, times the weights of all blocks: enough tiles without splits.
# 64 rows are what the matrix unit takes from registers, where x is split; each warp has its own.
MODULATION = Config(block_f=128, block_r=64, block_k=32, split_k=1 << 20, num_warps=4, num_stages=6)


@dataclass(frozen=True)
class Problem:
    num_rows: int
    model_width: int
    width: int
    inner: int
    num_blocks: int
    num_bins: int
    num_steps: int
    guided: bool

    @property
    def evaluated(self) -> int:
        """Q."""
        return self.num_rows * self.branches

    @property
    def branches(self) -> int:
        """Evaluations of a row."""
        return 2 if self.guided else 1

    @property
    def products(self) -> list[tuple[Config, int, int, int]]:
        """(configuration, rows, F, K) of the products whose tiles have several parts."""
        rows, width = self.evaluated, self.width
        # A program of the velocity has both branches of its rows, with a part of each.
        moved = self.branches * -(-self.num_rows // VELOCITY.block_r) * VELOCITY.block_r
        return [
            (PRODUCT, self.num_rows, width, self.model_width),
            (PRODUCT, self.num_steps, width, width),
            (PRODUCT, self.num_steps * rows, 2 * width, width),
            (PRODUCT, rows, width, self.num_bins),
            (NORM_PRODUCT, rows, self.inner, width),
            (PRODUCT, rows, width, self.inner),
            (VELOCITY, moved, self.num_bins, width),
        ]

    def work_shapes(self) -> dict[str, tuple[int, ...]]:
        """What is handed on between launches, float32; the counters are int32."""
        rows = (self.num_steps, self.evaluated)
        return {
            "counter_A": (max(c.tiles(r, f) for c, r, f, _ in self.products),),
            "part": (max(c.part_values(*sizes) for c, *sizes in self.products),),
            "time_in_N_W": (self.num_steps, self.width),
            "time_N_W": (self.num_steps, self.width),
            "act_N_Q_W": (*rows, self.width),
            "mod_N_Q_L_3_W": (*rows, self.num_blocks, 3, self.width),
            "final_N_Q_2_W": (*rows, 2, self.width),
            "h_Q_W": (self.evaluated, self.width),
            "stat_Q_2_T": (self.evaluated, 2, PRODUCT.tiles(1, self.width)),
            "inner_3_Q_U": (3, self.evaluated, -(-self.inner // 2)),  # of bfloat16, or float32
        }

    def work_size(self) -> int:
        """Values of scratch; each part begins at a multiple of ALIGN."""
        return sum(aligned_size(shape) for shape in self.work_shapes().values())


def problem_of(num_rows: int, w: FlowWeights, num_steps: int, guidance: float) -> Problem:
    (num_blocks, inner), (width, model_width) = w.up_bias_L_U.shape, w.cond_W_D.shape
    num_bins, guided = len(w.output_bias_B), guidance != 1.0
    sizes = (num_rows, model_width, width, inner, num_blocks, num_bins)
    return Problem(*sizes, num_steps, guided)


ALIGN = 32  # values: 128 bytes


def aligned_size(shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // ALIGN) * ALIGN
