"""What a page table means, in dictionaries and lists: sessions' pages and the device's memory."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

from tml_kernels._core import CopyCommand, LayerGroup, PageClass, PageRef, PageTable

ANCHOR, TEXT, AUDIO, VIDEO, REPLY = CLASSES = (
    PageClass.ANCHOR,
    PageClass.TEXT,
    PageClass.AUDIO,
    PageClass.VIDEO,
    PageClass.REPLY,
)
EVICTION_ORDER = (VIDEO, AUDIO, REPLY, TEXT)


@dataclass
class Page:
    base: int
    page_class: PageClass
    tokens: dict[int, int] = field(default_factory=dict)  # position -> name, ascending


def rows_buffer(groups: int, tokens: int) -> memoryview:
    """What append() fills: [groups, T] of int64, -1 before, and T at least 1."""
    tokens = max(1, tokens)
    return memoryview(bytearray(b"\xff" * (8 * groups * tokens))).cast("q", (groups, tokens))


def rows_of(buffer: memoryview) -> list[list[int]]:
    return cast(list[list[int]], buffer.tolist())


class Model:
    """One session: per group its pages from the oldest to the newest."""

    def __init__(self, groups: Sequence[LayerGroup], budgets: dict[PageClass, int]) -> None:
        self.groups = groups
        self.budgets = budgets
        self.pages: list[list[Page]] = [[] for _ in groups]
        self.rolled_to = [0] * len(groups)
        self.length = 0
        self.mark: int | None = None
        self.phase = "open"
        self.runs: list[tuple[PageClass, int]] = []
        self.saved: list[list[tuple[int, int]]] = []

    def copy(self) -> Model:
        other = copy.copy(self)
        other.pages = [[Page(p.base, p.page_class, {**p.tokens}) for p in g] for g in self.pages]
        other.rolled_to = [*self.rolled_to]
        return other

    def count(self, group: int, page_class: PageClass) -> int:
        return sum(p.page_class == page_class for p in self.pages[group])

    def open_page(self, group: int, page_class: PageClass) -> Page | None:
        """Where the next token of the class goes, if not to a new page."""
        spec = self.groups[group]
        pages = self.pages[group]
        if spec.window is None:
            pages = [p for p in pages if p.page_class == page_class]
        if not pages or len(pages[-1].tokens) == spec.page_rows:
            return None
        return None if spec.span and self.length - pages[-1].base >= spec.span else pages[-1]

    def open_pages(self, group: int) -> list[Page]:
        found = [self.open_page(group, page_class) for page_class in CLASSES]
        return [p for i, p in enumerate(found) if p is not None and p not in found[:i]]

    def begin(self, runs: list[tuple[PageClass, int]]) -> None:
        self.before = self.copy()
        self.runs = [*runs]
        self.phase = "reserved"

    def append(self, page_class: PageClass, names: Iterable[int]) -> None:
        for name in names:
            for group, spec in enumerate(self.groups):
                page = self.open_page(group, page_class)
                if page is None:
                    page = Page(self.length, TEXT if spec.window else page_class)
                    self.pages[group].append(page)
                page.tokens[self.length] = name
            self.length += 1

    def commit(self) -> None:
        self.phase = "open"
        for group, spec in enumerate(self.groups):
            pages = self.pages[group]
            if spec.window is not None:
                needed_from = self.length - spec.history - spec.window + 1
                while len(pages) > 1 and pages[0].base + len(pages[0].tokens) <= needed_from:
                    self.rolled_to[group] = pages[0].base + len(pages[0].tokens)
                    del pages[0]
                continue
            for page_class in EVICTION_ORDER:
                over = self.count(group, page_class) - self.budgets[page_class]
                doomed = [p for p in pages if p.page_class == page_class][: max(0, over)]
                pages[:] = [p for p in pages if p not in doomed]

    def rewind(self, position: int) -> None:
        for group, pages in enumerate(self.pages):
            self.pages[group] = [p for p in pages if p.base < position]
            for page in self.pages[group]:
                page.tokens = {at: name for at, name in page.tokens.items() if at < position}
        self.length = position
        if self.mark is not None and self.mark > position:
            self.mark = None

    def oldest_rewind(self, group: int) -> int:
        window = self.groups[group].window
        assert window is not None
        return self.rolled_to[group] + window - 1 if self.rolled_to[group] else 0

    def evictable(self, group: int, refs: list[PageRef], shared: set[int]) -> list[int]:
        """Bases of the pages that roll() may take, in its order."""
        if self.phase != "open" or self.groups[group].window is not None:
            return []
        page_of = {ref.base: ref.page for ref in refs}
        pinned = self.open_pages(group)
        old = [p for p in self.pages[group] if p not in pinned and page_of[p.base] not in shared]
        return [p.base for c in EVICTION_ORDER for p in old if p.page_class == c]

    def visible(self, group: int) -> dict[int, int]:
        return {at: name for page in self.pages[group] for at, name in page.tokens.items()}


class Device:
    """Pages and tables as kernels would see them; a row has its position and a token's name.

    Every token has a name of its own, and a page that nobody holds any more has no rows.
    """

    def __init__(self, groups: Sequence[LayerGroup], table: PageTable, lag: int) -> None:
        self.groups = groups
        self.first_keys = [table.first_key(g) for g in range(len(groups))]
        self.num_keys = table.num_keys
        self.lag = lag
        self.tick = 0
        self.names = itertools.count(1)
        self.pages: dict[tuple[int, int], dict[int, tuple[int, int]]] = {}
        self.entries: dict[int, tuple[int, int, int]] = {}  # key -> page, base, rows
        self.last_seen: dict[tuple[int, int], int] = {}  # (group, page) -> tick it was readable in

    def group_of(self, key: int) -> int:
        assert 0 <= key < self.num_keys
        return max(g for g, first in enumerate(self.first_keys) if first <= key)

    def apply(self, deltas: Sequence[int]) -> None:
        keys = set()
        self.see()
        for i in range(0, len(deltas), 4):
            key, page, base, rows = deltas[i : i + 4]
            keys.add(key)
            if page < 0:
                assert (page, base, rows) == (-1, 0, 0)
                self.entries.pop(key, None)
            else:
                self.entries[key] = (page, base, rows)
        assert len(keys) * 4 == len(deltas)  # no key twice: they may be applied in parallel
        self.see()

    def see(self) -> None:
        for key, (page, _, _) in self.entries.items():
            self.last_seen[self.group_of(key), page] = self.tick

    def take_page(self, group: int, page: int) -> None:
        assert page > 0
        last = self.last_seen.get((group, page))
        assert last is None or self.tick - last >= self.lag
        self.pages[group, page] = {}

    def forget(self, held: set[tuple[int, int]]) -> None:
        self.pages = {where: rows for where, rows in self.pages.items() if where in held}

    def write(self, rows_G_T: list[list[int]], position: int) -> list[int]:
        names = [next(self.names) for _ in rows_G_T[0]]
        for group, rows in enumerate(rows_G_T):
            for i, row in enumerate(rows):
                page, row_in_page = divmod(row, self.groups[group].page_rows)
                if row_in_page == 0:
                    self.take_page(group, page)
                self.pages[group, page][row_in_page] = (position + i, names[i])
        return names

    def copy(self, commands: list[CopyCommand]) -> None:
        for group, source, target, count in commands:
            self.take_page(group, target)
            rows = self.pages[group, source]
            self.pages[group, target] = {i: rows[i] for i in range(count)}

    def read(self, refs: list[PageRef]) -> list[list[tuple[int, int]]]:
        return [[self.pages[r.group, r.page][i] for i in range(r.used)] for r in refs]

    def restore(self, refs: list[PageRef], saved: list[list[tuple[int, int]]]) -> None:
        for ref, rows in zip(refs, saved, strict=True):
            assert ref.used == len(rows)
            assert ref.base == rows[0][0]
            self.take_page(ref.group, ref.page)
            self.pages[ref.group, ref.page] = dict(enumerate(rows))

    def visible(self, slot: int, group: int, length: int) -> dict[int, int]:
        """Position -> token, as attention at `length` finds them in a row's pages."""
        found: dict[int, int] = {}
        spec = self.groups[group]
        first = self.first_keys[group] + slot * spec.columns
        for key in range(first, first + spec.columns):
            page, base, rows = self.entries.get(key, (-1, 0, 0))
            if spec.window is not None and rows > 0:
                assert rows == spec.page_rows
                rows = min(rows, length - base)
            for i in range(rows):
                position, name = self.pages[group, page][i]
                assert position not in found
                assert base <= position < base + (spec.span or spec.page_rows)
                assert spec.span or position == base + i
                found[position] = name
        return found
