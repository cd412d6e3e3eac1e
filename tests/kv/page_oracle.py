"""What a page table means, in dictionaries and lists: sessions' pages and the device's memory."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tml_kernels._core import CopyCommand, LayerGroup, PageClass, PageRef, Span

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
    tokens: list[int]


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
        self.saved: list[list[int]] = []

    def copy(self) -> Model:
        other = copy.copy(self)
        other.pages = [[Page(p.base, p.page_class, [*p.tokens]) for p in g] for g in self.pages]
        other.rolled_to = [*self.rolled_to]
        return other

    def count(self, group: int, page_class: PageClass) -> int:
        return sum(p.page_class == page_class for p in self.pages[group])

    def open_tail(self, group: int) -> Page | None:
        if not self.pages[group]:
            return None
        tail = self.pages[group][-1]
        room = len(tail.tokens) < self.groups[group].page_rows
        return tail if room and tail.base + len(tail.tokens) == self.length else None

    def begin(self, runs: list[tuple[PageClass, int]]) -> None:
        self.before = self.copy()
        self.runs = [*runs]
        self.phase = "reserved"

    def append(self, page_class: PageClass, names: Iterable[int]) -> None:
        for name in names:
            for group, spec in enumerate(self.groups):
                tail = self.open_tail(group)
                if tail is None or (spec.window is None and tail.page_class != page_class):
                    tail = Page(self.length, page_class, [])
                    self.pages[group].append(tail)
                tail.tokens.append(name)
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
                del page.tokens[position - page.base :]
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
        old = [p for p in self.pages[group][:-1] if page_of[p.base] not in shared]
        return [p.base for c in EVICTION_ORDER for p in old if p.page_class == c]

    def visible(self, group: int) -> dict[int, int]:
        return {p.base + i: name for p in self.pages[group] for i, name in enumerate(p.tokens)}


class Device:
    """Rows and tables as kernels would see them; every token has a name of its own."""

    def __init__(self, groups: Sequence[LayerGroup], lag: int) -> None:
        self.groups = groups
        self.lag = lag
        self.tick = 0
        self.names = itertools.count(1)
        self.rows: dict[tuple[int, int], int] = {}  # (group, page * R + row) -> name
        self.entries: dict[tuple[int, int, int], tuple[int, int, int]] = {}
        self.last_seen: dict[tuple[int, int], int] = {}  # (group, page) -> tick it was readable in

    def apply(self, deltas: Sequence[int]) -> None:
        keys = set()
        self.see()
        for i in range(0, len(deltas), 6):
            group, slot, index, page, base, rows = deltas[i : i + 6]
            keys.add((group, slot, index))
            if page < 0:
                assert (base, rows) == (0, 0)
                self.entries.pop((group, slot, index), None)
            else:
                self.entries[group, slot, index] = (page, base, rows)
        assert len(keys) * 6 == len(deltas)  # no key twice: they may be applied in parallel
        self.see()

    def see(self) -> None:
        for (group, _, _), (page, _, _) in self.entries.items():
            self.last_seen[group, page] = self.tick

    def take_page(self, group: int, page: int) -> None:
        assert page > 0
        last = self.last_seen.get((group, page))
        assert last is None or self.tick - last >= self.lag

    def write(self, spans: list[Span], tokens: int) -> list[int]:
        names = [next(self.names) for _ in range(tokens)]
        left = [iter(names) for _ in self.groups]
        for group, row, count in spans:
            rows = self.groups[group].page_rows
            assert row // rows == (row + count - 1) // rows
            if row % rows == 0:
                self.take_page(group, row // rows)
            for i in range(row, row + count):
                self.rows[group, i] = next(left[group])
        assert all(next(names_left, None) is None for names_left in left)
        return names

    def copy(self, commands: list[CopyCommand]) -> None:
        for group, source, target, count in commands:
            self.take_page(group, target)
            rows = self.groups[group].page_rows
            for i in range(count):
                self.rows[group, target * rows + i] = self.rows[group, source * rows + i]

    def read(self, refs: list[PageRef]) -> list[list[int]]:
        return [[self.rows[r.group, self.row(r) + i] for i in range(r.used)] for r in refs]

    def restore(self, refs: list[PageRef], saved: list[list[int]]) -> None:
        for ref, names in zip(refs, saved, strict=True):
            assert ref.used == len(names)
            self.take_page(ref.group, ref.page)
            for i, name in enumerate(names):
                self.rows[ref.group, self.row(ref) + i] = name

    def row(self, ref: PageRef) -> int:
        return ref.page * self.groups[ref.group].page_rows

    def visible(self, slot: int, group: int, length: int) -> dict[int, int]:
        """Position -> token, as attention at `length` finds them in a row's pages."""
        found: dict[int, int] = {}
        for (entry_group, entry_slot, _), (page, base, rows) in self.entries.items():
            if (entry_group, entry_slot) != (group, slot):
                continue
            first = page * self.groups[group].page_rows
            for i in range(min(rows, length - base)):
                assert base + i not in found
                found[base + i] = self.rows[group, first + i]
        return found
