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
from page_oracle import ANCHOR, CLASSES, Device, Model, rows_buffer, rows_of

from tml_kernels import _core
from tml_kernels._core import LayerGroup, PageClass, PageTable, Session

BUDGETS: dict[PageClass, int] = dict(zip(CLASSES, (3, 2, 3, 3, 2), strict=True))
MAX_SESSIONS = 4
GROUPS = (
    LayerGroup(pages=20, columns=13, page_rows=4, span=9),
    LayerGroup(pages=19, columns=8, page_rows=4, window=5, history=9),
)
RUNS = st.lists(st.tuples(st.sampled_from(CLASSES), st.integers(0, 9)), min_size=1, max_size=3)
PICK = st.integers(0, 3)
BACK = st.integers(0, 14)
TICKS = st.lists(st.tuples(RUNS, st.lists(st.integers(0, 9), max_size=5)), min_size=1, max_size=8)
ENDING = st.sampled_from(["commit", "commit", "commit", "roll_back", "later"])


def has(phase: str | None):
    """Only when some session is in the phase: no step is spent on nothing."""
    return precondition(
        lambda self: any(phase in (None, model.phase) for model in self.models.values())
    )


def room(is_there: bool):
    """Only while another session can be opened, or only while none can."""
    return precondition(lambda self: (len(self.models) < MAX_SESSIONS) == is_there)


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

    @initialize(ticks=st.tuples(TICKS, TICKS))
    def open_two(self, ticks: tuple[list, list]) -> None:
        for pick, its_ticks in enumerate(ticks):
            self.open(pick)
            self.live(pick, its_ticks, "commit")

    @room(True)
    @has("open")
    @rule(how=st.sampled_from(["fork", "fork", "load", "open"]), pick=PICK, back=BACK)
    def begin(self, how: str, pick: int, back: int) -> None:
        if how == "open":
            self.open(back % 3)
        elif how == "fork":
            session = self.pick(pick)
            if self.fork(session, back % 3):
                self.rewind_to(session, max(0, self.models[session].length - back))
        else:
            suspended = any(model.phase == "suspended" for model in self.models.values())
            self.load_an_image(self.pick(pick, "suspended" if suspended else "open"))

    def open(self, priority: int) -> None:
        session = self.table.open(BUDGETS, priority=priority)
        assert session not in self.closed
        self.models[session] = Model(GROUPS, BUDGETS)

    @room(False)
    @rule(pick=PICK)
    def close_after_no_room(self, pick: int) -> None:
        session = self.pick(pick, None)
        with self.refused(_core.OutOfSessions, max_sessions=MAX_SESSIONS):
            self.table.open(BUDGETS)
        phase = self.models[session].phase
        if phase == "open":
            with self.refused(_core.OutOfSessions):
                self.table.fork(session)
        if phase != "reserved":
            image = self.table.image(session)
            with self.refused(_core.OutOfSessions):
                self.table.restore(image)
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
                continue
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
        # The first run that is long enough takes it, and those before it are given up; for nothing,
        # nothing is.
        while tokens and (model.runs[0][0] != page_class or model.runs[0][1] < tokens):
            del model.runs[0]
        rows_G_T = rows_buffer(len(GROUPS), tokens + 2)
        position = self.table.append(session, page_class, tokens, rows_G_T, column=1)
        assert position == model.length
        if tokens:
            model.runs[0] = (page_class, model.runs[0][1] - tokens)
        rows = rows_of(rows_G_T)
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
        assert all(row == -1 for rows in rows_of(rows_G_T) for row in rows)

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
    @rule(pick=PICK, back=BACK, to_mark=st.booleans())
    def rewind(self, pick: int, back: int, to_mark: bool) -> None:
        session = self.pick(pick)
        model = self.models[session]
        self.rewind_to(session, None if to_mark else max(0, model.length - back))

    def rewind_to(self, session: Session, given: int | None) -> None:
        """To the mark, where no position is given."""
        model = self.models[session]
        position = model.mark if given is None else given
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

    def fork(self, session: Session, priority: int) -> bool:
        model = self.models[session]
        short = self.out_of_pages([len(model.open_pages(g)) for g in range(len(GROUPS))])
        if short is not None:
            with self.refused(_core.OutOfPages, **short):
                self.table.fork(session)
            return False
        child, copies = self.table.fork(session, priority=priority)
        self.device.copy(copies)
        self.models[child] = model.copy()
        self.models[child].mark = None
        return True

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

    def load_an_image(self, session: Session) -> None:
        """What was kept of a session, through a file's text, is a session again."""
        model = self.models[session]
        image = self.table.image(session)
        assert (image.length, image.mark) == (model.length, model.mark)
        text = json.loads(json.dumps(image))
        refs = [ref for g in range(len(GROUPS)) for ref in self.table.pages(session, g)]
        child = self.table.restore(text)
        assert self.table.image(child) == image
        self.models[child] = model.copy()
        if model.phase == "open":
            self.models[child].saved = self.device.read(refs)
        self.models[child].phase = "suspended"

    @rule(steps=st.integers(1, 3), pick=PICK)
    def step(self, steps: int, pick: int) -> None:
        self.refuse_wrong_calls(pick)
        self.tick(steps)

    def tick(self, steps: int) -> None:
        self.take_deltas()
        self.device.tick += steps
        self.table.tick(self.device.tick)

    def refuse_wrong_calls(self, pick: int) -> None:
        slot, epoch = stale = (Session(MAX_SESSIONS, 1), *self.closed)[-1]
        verbs = ("close", "commit", "roll_back", "mark", "rewind", "fork", "suspend", "image")
        for verb in (*verbs, "resume", "victim", "session_stats"):
            with self.refused(_core.UnknownSession, slot=slot, epoch=epoch):
                getattr(self.table, verb)(stale)
        session = self.pick(pick, None)
        phase = self.models[session].phase
        verbs = {"commit": "reserved", "roll_back": "reserved", "resume": "suspended"}
        verbs |= dict.fromkeys(("mark", "rewind", "fork", "suspend"), "open")
        for verb, phases in (verbs | {"image": "open suspended"}).items():
            if phase not in phases:
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
                positions = self.table.positions(session, group)
                held = zip(self.table.pages(session, group), positions, strict=True)
                assert sorted((p.base, p.used, p.page_class, rows) for p, rows in held) == [
                    (p.base, len(p.tokens), p.page_class, [*p.tokens]) for p in model.pages[group]
                ]
                expected = {} if model.phase == "suspended" else model.visible(group)
                assert self.device.visible(session.slot, group, model.length) == expected


class FreeAtOnceMachine(PageTableMachine):
    lag = 0


TestPageTable = PageTableMachine.TestCase
TestPageTable.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
TestFreeAtOnce = FreeAtOnceMachine.TestCase
TestFreeAtOnce.settings = settings(max_examples=30, stateful_step_count=60, deadline=None)
