"""Every verb of the page table against a plain dictionary model, with its device side simulated.

The device's tables are built from the deltas alone, and its rows from the rows of append() and the
copies, so a page that is reused too early, or a delta or copy that is missing, shows as a wrong
token or none.
"""

from __future__ import annotations

import contextlib
import json
from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from page_oracle import ANCHOR, CLASSES, Device, Model, rows_buffer

from tml_kernels import _core
from tml_kernels._core import LayerGroup, PageClass, PageTable, Session

BUDGETS: dict[PageClass, int] = dict(zip(CLASSES, (2, 2, 3, 3, 2), strict=True))
MAX_SESSIONS = 3
GROUPS = (
    LayerGroup(pages=24, columns=13, page_rows=4, span=9),
    LayerGroup(pages=14, columns=6, page_rows=4, window=6, history=3),
)
RUNS = st.lists(st.tuples(st.sampled_from(CLASSES), st.integers(0, 9)), min_size=1, max_size=4)
PICK = st.integers(0, 2)


TICKS = st.lists(st.tuples(RUNS, st.lists(st.integers(0, 9), max_size=5)), min_size=1, max_size=8)
ENDING = st.sampled_from(["commit", "commit", "commit", "roll_back", "later"])


def has(phase: str | None):
    """Only when some session is in the phase: no step is spent on nothing."""
    return precondition(
        lambda self: any(phase in (None, model.phase) for model in self.models.values())
    )


class PageTableMachine(RuleBasedStateMachine):
    lag = 2

    def __init__(self) -> None:
        super().__init__()
        self.table = PageTable(list(GROUPS), max_sessions=MAX_SESSIONS, lag=self.lag)
        self.device = Device(GROUPS, self.table, self.lag)
        self.models: dict[Session, Model] = {}
        self.closed: list[Session] = []

    def snapshot(self) -> object:
        held = [self.table.session_stats(s) for s in self.models]
        pages = [self.table.pages(s, g) for s in self.models for g in range(len(GROUPS))]
        rows = [self.table.positions(s, g) for s in self.models for g in range(len(GROUPS))]
        return held, pages, rows, self.table.stats(), self.table.num_deltas, self.table.work

    @contextlib.contextmanager
    def refused(self, error: type[Exception], **fields: int):
        """The block must raise exactly this, with these fields, and change nothing."""
        before = self.snapshot()
        with pytest.raises(error) as caught:
            yield
        assert caught.type is error
        for name, value in fields.items():
            assert getattr(caught.value, name) == value
        assert self.snapshot() == before

    def pick(self, pick: int, phase: str | None = "open") -> Session:
        fitting = [s for s, m in self.models.items() if phase in (None, m.phase)]
        return fitting[pick % len(fitting)]

    def shared(self, group: int) -> set[int]:
        seen: list[int] = []
        for session, model in self.models.items():
            if model.phase != "suspended":
                seen += [p.page for p in self.table.pages(session, group)]
        return {page for page in seen if seen.count(page) > 1}

    def out_of_pages(self, needed: list[int]) -> dict[str, int] | None:
        """The fields of the refusal, if there is not enough for `needed`."""
        for group, (count, stats) in enumerate(zip(needed, self.table.stats(), strict=True)):
            if count > stats.free:
                evictable = sum(
                    len(m.evictable(group, self.table.pages(s, group), self.shared(group)))
                    for s, m in self.models.items()
                )
                fields = {"group": group, "needed": count}
                return fields | {"free": stats.free, "evictable": evictable}
        return None

    @initialize()
    def open_two(self) -> None:
        self.open(0)
        self.open(1)

    @rule(priority=st.integers(0, 2))
    def open(self, priority: int) -> None:
        if len(self.models) == MAX_SESSIONS:
            with self.refused(_core.OutOfSessions, max_sessions=MAX_SESSIONS):
                self.table.open(BUDGETS, priority=priority)
            return
        session = self.table.open(BUDGETS, priority=priority)
        assert session not in self.closed
        self.models[session] = Model(GROUPS, BUDGETS)

    @precondition(lambda self: len(self.models) == MAX_SESSIONS)
    @rule(pick=PICK)
    def close(self, pick: int) -> None:
        session = self.pick(pick, None)
        self.table.close(session)
        del self.models[session]
        self.closed.append(session)

    @has("open")
    @rule(pick=PICK, ticks=TICKS, ending=ENDING)
    def live(self, pick: int, ticks: list[tuple[list, list[int]]], ending: str) -> None:
        """Some ticks, which may append less than is reserved; how the last of them ends."""
        session = self.pick(pick)
        for i, (runs, parts) in enumerate(ticks):
            if not self.reserve(session, runs):
                return
            for part in parts or [9] * len(runs):
                self.append(session, part)
            self.agrees()
            if i < len(ticks) - 1 or ending == "commit":
                self.commit(session)
                self.tick(1)
            elif ending == "roll_back":
                self.roll_back(session)

    def reserve(self, session: Session, runs: list[tuple[PageClass, int]]) -> bool:
        model = self.models[session]
        full = model.copy()
        for page_class, tokens in runs:
            full.append(page_class, [0] * tokens)
        for group, spec in enumerate(GROUPS):
            needed, anchors = len(full.pages[group]), full.count(group, ANCHOR)
            over = (needed, spec.columns) if needed > spec.columns else None
            if over is None and spec.window is None and anchors > BUDGETS[ANCHOR]:
                over = (anchors, BUDGETS[ANCHOR])
            if over is not None:
                with self.refused(_core.BudgetExceeded, needed=over[0], limit=over[1]):
                    self.table.reserve(session, runs)
                return False
        grown = zip(full.pages, model.pages, strict=True)
        needed = [len(after) - len(before) for after, before in grown]
        short = self.out_of_pages(needed)
        if short is not None:
            with self.refused(_core.OutOfPages, **short):
                self.table.reserve(session, runs)
            return False
        assert self.table.reserve(session, runs) == needed
        model.begin(runs)
        return True

    def append(self, session: Session, part: int) -> None:
        model = self.models[session]
        while model.runs and model.runs[0][1] == 0:
            del model.runs[0]
        if not model.runs:
            return
        page_class, left = model.runs[-1 if part == 0 else 0]
        tokens = min(part or 1, left)
        # The first run that is long enough takes it, and those before it are given up.
        while model.runs[0][0] != page_class or model.runs[0][1] < tokens:
            del model.runs[0]
        rows_G_T = rows_buffer(len(GROUPS), tokens + 2)
        position = self.table.append(session, page_class, tokens, rows_G_T, column=1)
        assert position == model.length
        model.runs[0] = (page_class, model.runs[0][1] - tokens)
        rows = rows_G_T.tolist()
        assert all(row[0] == row[-1] == -1 for row in rows)
        model.append(page_class, self.device.write([row[1:-1] for row in rows], position))

    @has("reserved")
    @rule(pick=PICK, part=st.integers(0, 9))
    def append_later(self, pick: int, part: int) -> None:
        self.append(self.pick(pick, "reserved"), part)

    @has("reserved")
    @rule(pick=PICK, commits=st.booleans())
    def end_later(self, pick: int, commits: bool) -> None:
        session = self.pick(pick, "reserved")
        self.commit(session) if commits else self.roll_back(session)

    def commit(self, session: Session) -> None:
        self.table.commit(session)
        self.models[session].commit()

    def roll_back(self, session: Session) -> None:
        self.table.roll_back(session)
        self.models[session] = self.models[session].before

    @has("reserved")
    @rule(pick=PICK, page_class=st.sampled_from(CLASSES))
    def append_too_much(self, pick: int, page_class: PageClass) -> None:
        session = self.pick(pick, "reserved")
        left = max((n for c, n in self.models[session].runs if c == page_class), default=0)
        rows_G_T = rows_buffer(len(GROUPS), left + 1)
        with self.refused(_core.ReservationExceeded, tokens=left + 1, left=left):
            self.table.append(session, page_class, left + 1, rows_G_T)
        with self.refused(ValueError):
            self.table.append(session, page_class, max(1, left), rows_G_T, column=2)
        assert all(row == -1 for rows in rows_G_T.tolist() for row in rows)

    @has("open")
    @rule(pick=PICK, pages=st.integers(0, 4))
    def roll(self, pick: int, pages: int) -> None:
        session = self.pick(pick)
        model = self.models[session]
        doomed = model.evictable(0, self.table.pages(session, 0), self.shared(0))[:pages]
        assert self.table.roll(session, 0, pages) == len(doomed)
        model.pages[0] = [p for p in model.pages[0] if p.base not in doomed]

    @has("open")
    @rule(pick=PICK)
    def mark(self, pick: int) -> None:
        session = self.pick(pick)
        model = self.models[session]
        assert self.table.mark(session) == model.length
        model.mark = model.length

    @has("open")
    @rule(pick=PICK, back=st.integers(0, 14), to_mark=st.booleans())
    def rewind(self, pick: int, back: int, to_mark: bool) -> None:
        session = self.pick(pick)
        model = self.models[session]
        position = model.mark if to_mark else max(0, model.length - back)
        given = None if to_mark else position
        if position is None:
            with self.refused(RuntimeError):
                self.table.rewind(session)
            return
        oldest = model.oldest_rewind(1)
        if position < oldest:
            with self.refused(_core.WindowPassed, group=1, position=position, oldest=oldest):
                self.table.rewind(session, given)
            return
        after = model.copy()
        after.rewind(position)
        needed = []
        for group in range(len(GROUPS)):
            page_of = {p.base: p.page for p in self.table.pages(session, group)}
            written = {page_of[p.base] for p in after.open_pages(group)}
            needed.append(len(written & self.shared(group)))
        short = self.out_of_pages(needed)
        if short is not None:
            with self.refused(_core.OutOfPages, **short):
                self.table.rewind(session, given)
            return
        self.device.copy(self.table.rewind(session, given))
        self.models[session] = after

    @has("open")
    @rule(pick=PICK, priority=st.integers(0, 2))
    def fork(self, pick: int, priority: int) -> None:
        session = self.pick(pick)
        if len(self.models) == MAX_SESSIONS:
            with self.refused(_core.OutOfSessions):
                self.table.fork(session)
            return
        model = self.models[session]
        short = self.out_of_pages([len(model.open_pages(g)) for g in range(len(GROUPS))])
        if short is not None:
            with self.refused(_core.OutOfPages, **short):
                self.table.fork(session)
            return
        child, copies = self.table.fork(session, priority=priority)
        self.device.copy(copies)
        self.models[child] = model.copy()
        self.models[child].mark = None

    @has("open")
    @rule(pick=PICK)
    def suspend(self, pick: int) -> None:
        session = self.pick(pick)
        model = self.models[session]
        model.saved = self.device.read(self.table.suspend(session))
        model.phase = "suspended"

    @has("suspended")
    @rule(pick=PICK)
    def resume(self, pick: int) -> None:
        session = self.pick(pick, "suspended")
        model = self.models[session]
        short = self.out_of_pages([len(pages) for pages in model.pages])
        if short is not None:
            with self.refused(_core.OutOfPages, **short):
                self.table.resume(session)
            return
        self.device.restore(self.table.resume(session), model.saved)
        model.phase = "open"

    @has(None)
    @rule(pick=PICK)
    def load_an_image(self, pick: int) -> None:
        """What was kept of a session, through a file's text, is a session again."""
        session = self.pick(pick, None)
        model = self.models[session]
        if model.phase == "reserved":
            with self.refused(RuntimeError):
                self.table.image(session)
            return
        image = self.table.image(session)
        assert (image.length, image.mark) == (model.length, model.mark)
        text = json.loads(json.dumps(image))
        if len(self.models) == MAX_SESSIONS:
            with self.refused(_core.OutOfSessions):
                self.table.restore(text)
            return
        refs = [ref for g in range(len(GROUPS)) for ref in self.table.pages(session, g)]
        child = self.table.restore(text)
        assert self.table.image(child) == image
        self.models[child] = model.copy()
        if model.phase == "open":
            self.models[child].saved = self.device.read(refs)
        self.models[child].phase = "suspended"

    @rule(steps=st.integers(1, 3))
    def tick(self, steps: int) -> None:
        self.take_deltas()
        self.device.tick += steps
        self.table.tick(self.device.tick)

    @precondition(lambda self: self.closed)
    @rule(pick=PICK)
    def stale_handle(self, pick: int) -> None:
        slot, epoch = session = self.closed[-1 - pick % len(self.closed)]
        verbs = ("close", "commit", "roll_back", "mark", "rewind", "fork", "suspend", "image")
        for verb in (*verbs, "resume", "victim", "session_stats"):
            with self.refused(_core.UnknownSession, slot=slot, epoch=epoch):
                getattr(self.table, verb)(session)

    @has(None)
    @rule(pick=PICK)
    def wrong_phase(self, pick: int) -> None:
        session = self.pick(pick, None)
        phase = self.models[session].phase
        verbs = {"commit": "reserved", "roll_back": "reserved", "resume": "suspended"}
        verbs |= dict.fromkeys(("mark", "rewind", "fork", "suspend"), "open")
        for verb, expected in verbs.items():
            if phase != expected:
                with self.refused(RuntimeError):
                    getattr(self.table, verb)(session)

    def take_deltas(self) -> None:
        out = array("q", bytes(8 * 4 * self.table.num_deltas))
        assert self.table.take_deltas(out) * 4 == len(out)
        self.device.apply(out)

    @invariant()
    def agrees(self) -> None:
        self.table.check_invariants()
        assert self.table.num_sessions == len(self.models)
        self.take_deltas()
        groups = range(len(GROUPS))
        refs = [ref for s in self.models for g in groups for ref in self.table.pages(s, g)]
        self.device.forget({(ref.group, ref.page) for ref in refs})
        assert len(self.device.entries) == sum(ref.page >= 0 for ref in refs)
        for session, model in self.models.items():
            stats = self.table.session_stats(session)
            assert stats.length == model.length
            assert stats.suspended == (model.phase == "suspended")
            assert stats.in_transaction == (model.phase == "reserved")
            for group in groups:
                held = zip(
                    self.table.pages(session, group),
                    self.table.positions(session, group),
                    strict=True,
                )
                assert sorted((p.base, p.used, p.page_class, rows) for p, rows in held) == [
                    (p.base, len(p.tokens), p.page_class, [*p.tokens]) for p in model.pages[group]
                ]
                expected = {} if model.phase == "suspended" else model.visible(group)
                assert self.device.visible(session.slot, group, model.length) == expected


class FreeAtOnceMachine(PageTableMachine):
    lag = 0


TestPageTable = PageTableMachine.TestCase
TestPageTable.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)
TestFreeAtOnce = FreeAtOnceMachine.TestCase
TestFreeAtOnce.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)
