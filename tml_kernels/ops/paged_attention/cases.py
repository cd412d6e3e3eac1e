"""Inputs of paged_attention for tests and benchmarks, and what each must move at least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...testing import Cost, randn


class Row(NamedTuple):
    """A session row: its new tokens, its length with them, and how many of the newest positions
    still have their page (None: all)."""

    new: int
    length: int
    kept: int | None = None


def quantize(pages_P_G_R_C: Tensor) -> tuple[Tensor, Tensor]:
    """Pages of fp8 and the scale of every row: its largest magnitude goes to 448."""
    scale_P_G_R = pages_P_G_R_C.abs().amax(-1) / 448
    scale_P_G_R = torch.where(scale_P_G_R == 0, 1.0, scale_P_G_R)
    return (pages_P_G_R_C / scale_P_G_R[..., None]).to(torch.float8_e4m3fn), scale_P_G_R


@dataclass(frozen=True)
class Case:
    """Every pool row that no query sees holds NaN when `poison`; so do padding queries."""

    rows: tuple[Row, ...]
    num_heads: int = 4  # H
    num_kv_heads: int = 2  # G
    head_width: int = 32  # C
    window: int | None = None
    extent: int | None = None  # X; None: no relative bias
    num_features: int = 4  # B
    tau_floor: float | None = None
    softcap: float | None = None
    page_rows: int = 64  # R
    padding: int = 0
    poison: bool = True
    dtype: torch.dtype = torch.float32
    page_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        if len(set(self.rows)) == 1:
            rows = f"{len(self.rows)}x{self.rows[0].new}@{self.rows[0].length}"
        else:
            rows = "+".join(f"{row.new}@{row.length}" for row in self.rows) or "none"
        options = {"w": self.window, "x": self.extent, "tau": self.tau_floor, "cap": self.softcap}
        named = "".join(f"-{name}{value:g}" for name, value in options.items() if value is not None)
        return (
            f"{rows}-H{self.num_heads}-G{self.num_kv_heads}-C{self.head_width}{named}"
            f"-R{self.page_rows}-pad{self.padding}-{str(self.dtype).removeprefix('torch.')}"
            f"{'-fp8' if self.page_dtype == torch.float8_e4m3fn else ''}"
        )

    @property
    def num_tokens(self) -> int:
        return sum(row.new for row in self.rows) + self.padding

    def visible(self, row: Row) -> range:
        """Positions that some query of the row sees and that have a page."""
        first = 0
        if row.kept is not None:
            first = max(0, row.length - row.kept) // self.page_rows * self.page_rows
        if self.window is not None:
            first = max(first, row.length - row.new - self.window + 1)
        return range(first, row.length) if row.new else range(0)

    def make_inputs(self, device: str) -> dict:
        heads, width, size = self.num_heads, self.head_width, self.page_rows
        seen = [self.visible(row) for row in self.rows]
        bases = [list(range(s.start // size * size, s.stop, size)) for s in seen]
        num_pages = sum(map(len, bases)) + 1
        page_ids = torch.randperm(num_pages).tolist()
        num_columns = max(map(len, bases), default=0) + 2
        page_table = torch.full((len(self.rows), num_columns), -1, dtype=torch.int32)
        page_base = torch.randint(0, 1 << 40, (len(self.rows), num_columns))

        pool = (num_pages, self.num_kv_heads, size, width)
        page_dtype = self.page_dtype or self.dtype
        # Drawn on the device: a long context has 0.3 G values.
        k_pages = torch.randn(pool, device=device)
        v_pages = torch.randn(pool, device=device)
        hidden = torch.ones(num_pages, size, dtype=torch.bool)
        for s, row_bases in enumerate(bases):
            columns = torch.randperm(num_columns)[: len(row_bases)].tolist()
            for column, base in zip(columns, row_bases, strict=True):
                page_table[s, column] = page_id = page_ids.pop()
                page_base[s, column] = base
                hidden[page_id, max(0, seen[s].start - base) : seen[s].stop - base] = False
        q = randn(self.num_tokens, heads, width, device=device, dtype=self.dtype)
        if self.poison:
            for pages in (k_pages, v_pages):
                pages.masked_fill_(hidden.to(device)[:, None, :, None], float("nan"))
            q[sum(row.new for row in self.rows) :] = float("nan")
        scales = {}
        if page_dtype == torch.float8_e4m3fn:
            k_pages, scales["k_scale_P_G_R"] = quantize(k_pages)
            v_pages, scales["v_scale_P_G_R"] = quantize(v_pages)
        return {
            "q_T_H_C": q,
            "k_pages_P_G_R_C": k_pages.to(page_dtype),
            "v_pages_P_G_R_C": v_pages.to(page_dtype),
            "page_table_S_M": page_table.to(device),
            "page_base_S_M": page_base.to(device),
            "start_S1": torch.tensor([0, *(row.new for row in self.rows)])
            .cumsum(0)
            .to(device=device, dtype=torch.int32),
            "length_S": torch.tensor(
                [row.length for row in self.rows], dtype=torch.int64, device=device
            ),
            "scale": width**-0.5,
            "window": self.window,
            **self._make_bias(device),
            "tau_floor": self.tau_floor,
            "softcap": self.softcap,
            **scales,
        }

    def _make_bias(self, device: str) -> dict[str, Tensor | None]:
        """rel as a view of wider rows, as it is in the joint projection."""
        if self.extent is None:
            return {"rel_T_H_B": None, "rel_table_B_X": None}
        columns = self.num_heads * self.num_features
        wide = randn(self.num_tokens, 8 + columns, device=device, dtype=self.dtype)
        rel = wide[:, 8:].unflatten(1, (self.num_heads, self.num_features))
        table = randn(self.num_features, self.extent, device=device, scale=0.5)
        return {"rel_T_H_B": rel, "rel_table_B_X": table}

    def cost(self) -> Cost:
        size, page_size = self.dtype.itemsize, (self.page_dtype or self.dtype).itemsize
        keys = sum(len(self.visible(row)) for row in self.rows)
        window = self.window or 1 << 62
        pairs = sum(
            min(row.length - i, len(self.visible(row)), window)
            for row in self.rows
            for i in range(row.new)
        )
        moved = 2 * size * self.num_tokens * self.num_heads * self.head_width
        key_size = page_size * self.head_width + (4 if page_size == 1 else 0)
        moved += 2 * keys * self.num_kv_heads * key_size
        if self.extent is not None:
            moved += size * self.num_tokens * self.num_heads * self.num_features
            moved += 4 * self.num_features * self.extent
        return Cost(
            bytes=moved + 12 * (keys // self.page_rows),
            flops=4 * self.num_heads * self.head_width * pairs,
        )


FAR = 10**9 + 7  # far past 2^24, where float32 stops holding every position

EDGE = [
    Case(()),  # no rows, no tokens
    Case((), padding=2),  # only padding
    Case((Row(1, 1),), extent=4),  # one query, one key
    Case((Row(0, 70), Row(3, 3))),  # a row without tokens
    Case((Row(5, 64),)),  # the append ends on a page
    Case((Row(5, 66),)),  # and crosses one
    Case((Row(6, 6),), window=1),  # every query sees itself alone
    Case((Row(6, 150),), window=64, extent=64),  # shorter than the sequence
    Case((Row(6, 150),), window=500, extent=500),  # longer than it
    Case((Row(70, 140),), window=33, extent=16),  # an append longer than the window
    Case((Row(6, 90),), extent=1),  # only the token itself has a bias
    Case((Row(6, 90),), extent=40, tau_floor=3.0),  # a floor that matters
    Case((Row(6, 90),), extent=40, softcap=2.0, tau_floor=9.0),
    Case((Row(3, FAR, 200),), extent=128, tau_floor=128000.0),  # old pages dropped
    Case((Row(3, FAR),), window=100, extent=100),
    Case((Row(4, 30), Row(1, 200), Row(0, 9), Row(9, 9)), window=50, extent=50, padding=3),
    Case((Row(4, 17),), 3, 3, 5, extent=7, num_features=1, page_rows=3),  # odd widths
    Case((Row(2, 40),), 8, 8),  # no grouping
    Case((Row(2, 40),), 8, 4),
    Case((Row(2, 40),), 8, 2),
    Case((Row(2, 40),), 8, 1, extent=30),  # eight query heads on one KV head
    Case((Row(2, 40),), 6, 2, extent=30),  # a group of three
    Case((Row(5, 600), Row(1, 70)), extent=40, page_dtype=torch.float8_e4m3fn),
    Case((Row(5, 600),), window=90, extent=40, page_dtype=torch.float8_e4m3fn),
]
MODEL = [
    Case((Row(23, 400),), extent=512, num_features=16, tau_floor=128000.0),  # tiny, global
    Case((Row(1, 700),) * 4, window=128, extent=128, num_features=16),  # tiny, local, four sessions
    Case((Row(4, 700),), 32, 8, 128, window=512, extent=512, num_features=16),  # inkling-small
    Case((Row(4, 1200),), 32, 8, 128, extent=1024, num_features=16, tau_floor=128000.0),
]


def _bench(
    sessions: int,
    new: int,
    context: int,
    window: int | None = None,
    page_dtype: torch.dtype | None = None,
) -> Case:
    return Case(
        (Row(new, context),) * sessions,
        32,
        8,
        128,
        window=window,
        extent=window or 1024,
        num_features=16,
        tau_floor=None if window else 128000.0,
        poison=False,
        dtype=torch.bfloat16,
        page_dtype=page_dtype,
    )


K = 1024
BENCH = [
    *(_bench(1, 1, context) for context in (K, 4 * K, 16 * K, 128 * K)),
    *(_bench(8, 1, context) for context in (4 * K, 16 * K)),
    _bench(32, 1, 4 * K, window=512),
    *(_bench(1, new, 16 * K) for new in (16, 64, 500)),
    _bench(8, 64, 16 * K),
    *(_bench(1, 1, context, page_dtype=torch.float8_e4m3fn) for context in (4 * K, 16 * K)),
]
