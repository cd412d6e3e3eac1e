"""Inputs of attention_prologue for tests and benchmarks, and what each must move at least."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from ..._pages import FP8
from ..._rope import rope_increments
from ...testing import Cost, randn

POOLS = ("k_pages_P_G_R_C", "v_pages_P_G_R_C")
SCALES = ("k_scale_P_G_R", "v_scale_P_G_R")
CONV = ("k_conv_GC_4", "v_conv_GC_4", "conv_state_N_2_3_GC")
NORMS = ("q_norm_C", "k_norm_C")
FURTHEST = 10**9  # positions


def reference_inputs(inputs: dict) -> dict:
    """What the oracle takes of the public function's arguments."""
    _, num_kv_heads, _, head_width = inputs["k_pages_P_G_R_C"].shape
    left = {k: v for k, v in inputs.items() if k not in (*POOLS, *SCALES, "kv_row_T")}
    return left | {"num_kv_heads": num_kv_heads, "head_width": head_width}


@dataclass(frozen=True)
class Case:
    """tokens: of each session row; idle: the rows whose slot is -1; padding: tokens after the last
    row. The pages hold NaN, and so do the inputs of idle and padding tokens, when `poison`. conv,
    norm, rope: which of the optional steps there are."""

    tokens: tuple[int, ...]
    num_heads: int  # H
    num_kv_heads: int  # G
    head_width: int  # C
    num_features: int = 4  # relative-position features of a head
    idle: tuple[int, ...] = ()
    padding: int = 0
    page_rows: int = 64  # R
    poison: bool = True
    dtype: torch.dtype = torch.float32
    page_dtype: torch.dtype | None = None
    conv: bool = True
    norm: bool = True
    rope: bool = False

    def __str__(self) -> str:
        tokens = "+".join(map(str, self.tokens)) if len(self.tokens) < 8 else str(self.num_tokens)
        steps = [name for name in ("conv", "norm", "rope") if getattr(self, name)]
        dtypes = [self.dtype] + [self.page_dtype] * (self.page_dtype is not None)
        return (
            f"S{len(self.tokens)}-T{tokens or 0}-H{self.num_heads}-G{self.num_kv_heads}-"
            f"C{self.head_width}-F{self.num_features}-idle{len(self.idle)}-pad{self.padding}-"
            f"{'-'.join([*steps, *(str(d).removeprefix('torch.') for d in dtypes)])}"
        )

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens) + self.padding

    @property
    def num_slots(self) -> int:
        return len(self.tokens) + 2

    def make_inputs(self, device: str) -> dict:
        heads, kv_heads, width = self.num_heads, self.num_kv_heads, self.head_width
        columns = (heads + 2 * kv_heads) * width + heads * self.num_features
        qkvr = randn(self.num_tokens, columns, device=device, dtype=self.dtype)
        ends = torch.tensor([0, *self.tokens]).cumsum(0)
        slot_S = torch.randperm(self.num_slots)[: len(self.tokens)].to(torch.int32)
        slot_S[list(self.idle)] = -1
        if self.poison:
            for row in self.idle:
                qkvr[int(ends[row]) : int(ends[row + 1])] = float("nan")
            qkvr[int(ends[-1]) :] = float("nan")

        num_pages = 2 + self.num_tokens // self.page_rows
        pool = (num_pages, kv_heads, self.page_rows, width)
        fill = float("nan") if self.poison else 0.0
        page_dtype = self.page_dtype or self.dtype
        kv_row_T = torch.randperm(num_pages * self.page_rows)[: self.num_tokens]
        if self.num_tokens > 2:
            kv_row_T[2] = -1
        inputs = {
            "qkvr_T_J": qkvr,
            "k_conv_GC_4": randn(kv_heads * width, 4, device=device, scale=0.5),
            "v_conv_GC_4": randn(kv_heads * width, 4, device=device, scale=0.5),
            "q_norm_C": 1 + randn(width, device=device, scale=0.1),
            "k_norm_C": 1 + randn(width, device=device, scale=0.1),
            "conv_state_N_2_3_GC": randn(
                self.num_slots, 2, 3, kv_heads * width, device=device, dtype=self.dtype
            ),
            "k_pages_P_G_R_C": torch.full(pool, fill, device=device, dtype=page_dtype),
            "v_pages_P_G_R_C": torch.full(pool, fill, device=device, dtype=page_dtype),
            "kv_row_T": kv_row_T.to(device),
            "start_S1": ends.to(device=device, dtype=torch.int32),
            "slot_S": slot_S.to(device),
            "num_heads": heads,
        }
        inputs |= dict.fromkeys(() if self.conv else CONV)
        inputs |= dict.fromkeys(() if self.norm else NORMS)
        if page_dtype == FP8:
            for name in SCALES:
                inputs[name] = torch.full(pool[:3], fill, device=device)
        if self.rope:
            position_T = torch.randint(FURTHEST, (self.num_tokens,))
            inputs["position_T"] = position_T.to(device)
            inputs["rope_phase_B"] = rope_increments(10_000.0, width, device)
        return inputs

    def cost(self) -> Cost:
        size, page_size = self.dtype.itemsize, (self.page_dtype or self.dtype).itemsize
        q, kv = self.num_heads * self.head_width, 2 * self.num_kv_heads * self.head_width
        state = 2 * 3 * kv * len(self.tokens) * self.conv  # read and written
        weights = 4 * kv * self.conv + 2 * self.head_width * self.norm
        scales = 2 * self.num_kv_heads * (self.page_dtype == FP8)
        return Cost(
            bytes=size * (self.num_tokens * (2 * q + kv) + state)
            + page_size * self.num_tokens * kv
            + 4 * (weights + self.num_tokens * scales)
            + 8 * (self.num_tokens * (1 + self.rope) + self.head_width // 2 * self.rope),
            flops=self.num_tokens
            * ((4 * self.norm + 3 * self.rope) * (q + kv // 2) + 9 * self.conv * kv),
        )


EDGE = [
    Case((), 2, 1, 32),  # no session rows, no tokens
    Case((0,), 2, 1, 32),  # a row without tokens
    Case((1,), 2, 1, 32),  # one token: its taps are all state
    Case((2,), 2, 1, 32),  # state and input share the new state
    Case((3,), 2, 2, 32),  # the new state is all input
    Case((9,), 3, 1, 32),  # longer than the taps, one past a block of rows
    Case((4, 0, 1, 5), 4, 2, 32, padding=3),  # ragged, an empty row, padding
    Case((2, 3, 1), 2, 1, 32, idle=(1,), padding=2),  # an idle row between active ones
    Case((2, 3), 2, 1, 32, idle=(0, 1)),  # everyone idle
    Case((3, 2), 3, 3, 5, num_features=1, page_rows=3),  # odd widths, odd pages
    Case((4,), 2, 1, 1, num_features=0),  # one column per head, no r
    Case((1, 5), 2, 1, 32, conv=False, norm=False),  # nothing but the page write
    Case((3, 2), 2, 1, 2, rope=True, padding=1),  # one pair
    Case((2, 3, 1), 4, 2, 34, idle=(1,), rope=True),  # half a head is no power of two
    Case((2, 4), 2, 2, 5, page_rows=3, padding=2, page_dtype=FP8),
]
MODEL = [
    Case((23,), 4, 2, 32, num_features=16),  # tiny, a tick's append
    Case((1,) * 8, 4, 2, 32, num_features=16),  # tiny, an output step of eight sessions
    Case((4, 4), 32, 8, 128, num_features=16),  # inkling-small
    Case((4, 1), 32, 8, 128, num_features=16, page_dtype=FP8),
    Case((3, 1), 32, 8, 128, 0, conv=False, norm=False, rope=True),  # Llama
    Case((2,), 16, 8, 128, 0, conv=False, rope=True, page_dtype=FP8),  # Qwen3
    Case((2,), 4, 1, 256, 0, conv=False, rope=True),  # Gemma
]
_BF16 = partial(Case, poison=False, dtype=torch.bfloat16)
BENCH = [
    *(_BF16((1,) * t, 32, 8, 128, 16) for t in (1, 8, 32, 64)),
    *(_BF16((16,) * s, 32, 8, 128, 16) for s in (1, 8, 32)),
    *(_BF16((1,) * t, 32, 8, 128, 16, page_dtype=FP8) for t in (1, 32)),
    *(_BF16((1,) * t, 32, 8, 128, 0, conv=False, norm=False, rope=True) for t in (1, 32)),
]
