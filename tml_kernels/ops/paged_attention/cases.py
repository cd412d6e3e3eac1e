"""Inputs of paged_attention for tests and benchmarks, and what each must move at least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..._page_plan import PagePlan
from ..._pages import FP8, quantize_ref
from ...testing import Cost, randn


class Row(NamedTuple):
    """A session row: its new tokens, its length with them, and how many of the newest positions
    still have their page (None: all)."""

    new: int
    length: int
    kept: int | None = None


class Page(NamedTuple):
    """positions: of the rows in use, ascending; rows: how many the list says are in use."""

    positions: Sequence[int]
    rows: int


@dataclass(frozen=True)
class Case:
    """Every pool row that no query sees holds NaN when `poison`; so do padding queries.

    segment: so many rows of each page are in use, the next page goes on at the next position.
    runs: positions go to classes in turns of so many, (4, 2): 0..3 to the first, 4 and 5 to the
    second, 6..9 to the first; each class has pages of its own, of at most `span` positions.
    """

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
    segment: int | None = None
    runs: tuple[int, ...] = ()
    span: int = 256
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
        options["seg"] = self.segment
        named = "".join(f"-{name}{value:g}" for name, value in options.items() if value is not None)
        return (
            f"{rows}-H{self.num_heads}-G{self.num_kv_heads}-C{self.head_width}{named}"
            f"{'-runs' if self.runs else ''}{'.'.join(map(str, self.runs))}"
            f"-R{self.page_rows}-pad{self.padding}-{str(self.dtype).removeprefix('torch.')}"
            f"{'-fp8' if self.page_dtype == FP8 else ''}"
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

    def pages(self, row: Row) -> list[Page]:
        """By ascending base."""
        seen, size = self.visible(row), self.page_rows
        if self.runs:
            return self._class_pages(seen)
        used = self.segment or size
        bases = range(seen.start // used * used, seen.stop, used)
        return [Page(range(base, base + used), used) for base in bases]

    def _class_pages(self, seen: range) -> list[Page]:
        period, ends = sum(self.runs), list(accumulate(self.runs))
        filled: list[list[int]] = []
        newest: dict[int, list[int]] = {}  # class -> its page with room
        for position in seen:
            kind = next(k for k, end in enumerate(ends) if position % period < end)
            page = newest.get(kind)
            if page is None or len(page) == self.page_rows or position >= page[0] + self.span:
                page = newest[kind] = []
                filled.append(page)
            page.append(position)
        return [Page(page, len(page)) for page in filled]

    def make_inputs(self, device: str) -> dict:
        heads, width, size = self.num_heads, self.head_width, self.page_rows
        lists = [self.pages(row) for row in self.rows]
        num_pages = sum(map(len, lists)) + 1
        page_ids = torch.randperm(num_pages).tolist()
        plan = PagePlan.empty(len(self.rows), max(map(len, lists), default=0) + 2, "cpu")
        for tensor, unused in zip(plan, (-1, -1, 0, 0), strict=True):
            tensor.fill_(unused)
        position_P_R = torch.randint(0, 1 << 40, (num_pages, size))  # of rows not in use: anything
        hidden_P_R = torch.ones(num_pages, size, dtype=torch.bool)
        for s, (row, pages) in enumerate(zip(self.rows, lists, strict=True)):
            seen = self.visible(row)
            plan.count_S[s] = len(pages)
            for m, page in enumerate(pages):
                plan.page_S_M[s, m] = page_id = page_ids.pop()
                plan.base_S_M[s, m] = page.positions[0]
                plan.rows_S_M[s, m] = page.rows
                position_R = torch.tensor(page.positions)
                position_P_R[page_id, : page.rows] = position_R
                hidden_P_R[page_id, : page.rows] = (position_R < seen.start) | (
                    position_R >= seen.stop
                )
        q = randn(self.num_tokens, heads, width, device=device, dtype=self.dtype)
        if self.poison:
            q[sum(row.new for row in self.rows) :] = float("nan")
        inputs = {
            "q_T_H_C": q,
            **self._make_pool(num_pages, hidden_P_R, device),
            "plan": PagePlan(*(tensor.to(device) for tensor in plan)),
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
        }
        if self.runs:
            inputs |= {"row_position_P_R": position_P_R.to(device), "span": self.span}
        return inputs

    def _make_pool(self, num_pages: int, hidden_P_R: Tensor, device: str) -> dict[str, Tensor]:
        pool = (num_pages, self.num_kv_heads, self.page_rows, self.head_width)
        page_dtype = self.page_dtype or self.dtype
        # Drawn on the device: a long context has 0.3 G values.
        pages = [torch.randn(pool, device=device) for _ in range(2)]
        if self.poison:
            for x in pages:
                x.masked_fill_(hidden_P_R.to(device)[:, None, :, None], float("nan"))
        scales = {}
        if page_dtype == FP8:
            pages[0], scales["k_scale_P_G_R"] = quantize_ref(pages[0])
            pages[1], scales["v_scale_P_G_R"] = quantize_ref(pages[1])
        k_pages, v_pages = (x.to(page_dtype) for x in pages)
        return {"k_pages_P_G_R_C": k_pages, "v_pages_P_G_R_C": v_pages, **scales}

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
        if self.runs:
            moved += 8 * keys
        return Cost(
            bytes=moved + 16 * sum(len(self.pages(row)) for row in self.rows),
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
    Case((Row(5, 600), Row(1, 70)), extent=40, page_dtype=FP8),
    Case((Row(5, 600),), window=90, extent=40, page_dtype=FP8),
    # Partly used pages, NaN in their other rows.
    Case((Row(5, 200), Row(1, 41)), extent=40, segment=37),
    Case((Row(5, 200),), window=90, segment=1, page_rows=16),
    Case((Row(5, 200),), window=90, extent=64, segment=63, page_dtype=FP8),
    # Classes: pages with holes, several open at once.
    Case((Row(6, 6),), runs=(4, 4)),  # one page of each, partly used
    Case((Row(9, 300), Row(1, 7), Row(0, 40)), extent=90, runs=(4, 4), padding=1),
    Case((Row(9, 300),), runs=(4, 4), tau_floor=9.0),  # without bias, from far pages to near ones
    Case((Row(17, 300),), 2, 2, extent=500, runs=(30, 1, 5), page_rows=16, span=62),  # rare tokens
    Case((Row(9, 900), Row(1, 600)), extent=40, runs=(25, 7), page_dtype=FP8),
    Case((Row(20, FAR, 400),), 8, 1, extent=128, runs=(9, 2), softcap=3.0, tau_floor=128000.0),
    Case((Row(3, 77),), 3, 1, 5, extent=9, num_features=20, runs=(2, 1), page_rows=3, span=12),
]
MODEL = [
    Case((Row(23, 400),), extent=512, num_features=16, tau_floor=128000.0),  # tiny, global
    Case((Row(1, 700),) * 4, window=128, extent=128, num_features=16),  # tiny, local, four sessions
    Case((Row(4, 700),), 32, 8, 128, window=512, extent=512, num_features=16),  # inkling-small
    Case((Row(4, 1200),), 32, 8, 128, extent=1024, num_features=16, tau_floor=128000.0),
]


def _bench(
    rows: tuple[Row, ...],
    *,
    bias: bool = True,
    window: int | None = None,
    page_dtype: torch.dtype | None = None,
    runs: tuple[int, ...] = (),
) -> Case:
    return Case(
        rows,
        32,
        8,
        128,
        window=window,
        extent=(window or 1024) if bias else None,
        num_features=16,
        tau_floor=128000.0 if bias and window is None else None,
        runs=runs,
        span=1024,
        poison=False,
        dtype=torch.bfloat16,
        page_dtype=page_dtype,
    )


K = 1024
SHAPES = [(1, K), (1, 4 * K), (1, 16 * K), (1, 128 * K), (8, 4 * K), (8, 16 * K)]
DECODE = [
    _bench((Row(1, context),) * sessions, bias=bias, page_dtype=page_dtype)
    for sessions, context in SHAPES
    for page_dtype in (None, FP8)
    for bias in (True, False)
]
LOCAL = [  # a ring of 512
    _bench((Row(1, 4 * K),) * 32, window=512, bias=bias, page_dtype=page_dtype)
    for page_dtype in (None, FP8)
    for bias in (True, False)
]
APPEND = [
    _bench((Row(new, context),), bias=bias)
    for context in (4 * K, 16 * K, 128 * K)
    for new in (16, 64, 204, 500)
    for bias in (True, False)
]
AGES = tuple(Row(1, context * K) for context in (1, 2, 4, 8, 16, 32, 48, 64))
MORE = [
    _bench((Row(64, 16 * K),) * 8),
    *(_bench(AGES, bias=bias) for bias in (True, False)),  # sessions of several ages
    *(_bench((Row(1, 16 * K),) * sessions, runs=(25, 7)) for sessions in (1, 8)),  # classes
    _bench((Row(64, 16 * K),), runs=(25, 7)),
]
BENCH = [*DECODE, *LOCAL, *APPEND, *MORE]
