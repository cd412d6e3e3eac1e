"""RollingKVCache with contents: every verb in any order, against a dictionary of what was written.

What a row holds is drawn when it is written and remembered by (session, position); what the slot's
other state holds follows from all that the session was ever told. So a misplaced page, a page of
somebody else, and a state that did not travel with its tokens are all seen. Pages that nobody holds
are filled with NaN after every step.
"""

from __future__ import annotations

import copy
import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from tml_kernels.kv_cache import (
    CLASSES,
    BudgetExceeded,
    CacheError,
    CacheGroup,
    NoSnapshot,
    OutOfPages,
    OutOfSessions,
    PageClass,
    RollingKVCache,
    Session,
    SlotTensor,
    WindowPassed,
)

BUDGETS = dict(zip(CLASSES, (1, 2, 2, 2, 2), strict=True))
ROWS, LAYERS = 4, 2
DTYPES = [torch.float32, torch.float8_e4m3fn]
GROUPS = [
    CacheGroup(2, 2, 3, pages=24, columns=14, page_rows=ROWS, span=12),
    CacheGroup(LAYERS, 1, 5, pages=18, columns=9, page_rows=ROWS, window=6, history=8),
]


@dataclass
class Told:
    """What a session should hold."""

    tokens: list[int] = field(default_factory=list)  # the value written at each position
    state: int = 0  # of its slot, a digest of all ticks
    history: dict[int, int] = field(default_factory=lambda: {0: 0})  # state by length
    mark: int | None = None


class Machine(RuleBasedStateMachine):
    sessions = Bundle("sessions")

    @initialize(
        lag=st.sampled_from([0, 2]), dtype=st.sampled_from([torch.float32, torch.float8_e4m3fn])
    )
    def begin(self, lag: int, dtype: torch.dtype) -> None:
        self.counter_N = torch.zeros(3, dtype=torch.int64)
        self.taps_L_N = torch.zeros(LAYERS, 3)
        self.cache = RollingKVCache(
            GROUPS,
            max_sessions=3,
            page_dtype=dtype,
            lag=lag,
            num_snapshots=3,
            slot_tensors={
                "counter": SlotTensor(self.counter_N),
                "taps": SlotTensor(self.taps_L_N, axis=1, reset=0.5),
            },
        )
        self.told: dict[Session, Told] = {}
        self.dice = random.Random(7)
        self.folder = tempfile.TemporaryDirectory()
        self.clock = 0

    def teardown(self) -> None:
        for session in list(self.told):
            self.cache.close(session)
        for _ in range(3):
            self.cache.tick()
        for stats in self.cache.stats().groups:
            assert stats.free == stats.pages - 1, "a page leaked"
        assert self.cache.stats().host_bytes == 0
        self.folder.cleanup()

    def write(self, session: Session, rows: np.ndarray, values: list[int]) -> None:
        """As the layers do: keys and values of each token in every layer of every group."""
        told = self.told[session]
        row_K_T, _ = self.cache.apply(rows, len(told.tokens) + np.arange(len(values)))
        for group, row_T in zip(self.cache.groups, row_K_T, strict=True):
            page_T, place_T = row_T // ROWS, row_T % ROWS
            for x in (group.k_pages_L_P_G_R_C, group.v_pages_L_P_G_R_C):
                for layer in range(x.shape[0]):
                    value_T = torch.tensor([float(content(v, layer)) for v in values])
                    x[layer, page_T, :, place_T] = value_T[:, None, None].to(x.dtype)

    def tell(self, session: Session, values: list[int]) -> None:
        if not values:
            return
        told = self.told[session]
        told.tokens += values
        told.state = (told.state * 31 + sum(values) + len(values)) % 1_000_003
        told.history[len(told.tokens)] = told.state
        self.set_state(session, told.state)

    def set_state(self, session: Session, state: int) -> None:
        self.counter_N[session.slot] = state
        self.taps_L_N[:, session.slot] = 0.5 + state

    @rule(target=sessions, priority=st.integers(0, 1))
    def open(self, priority: int) -> object:
        try:
            session = self.cache.open(BUDGETS, priority=priority)
        except OutOfSessions:
            assert len(self.told) == 3
            return multiple()
        self.told[session] = Told()
        return session

    @rule(session=consumes(sessions))
    def close(self, session: Session) -> None:
        self.cache.close(session)
        del self.told[session]

    @rule(
        session=sessions,
        runs=st.lists(st.tuples(st.sampled_from(CLASSES[1:]), st.integers(0, 6)), max_size=4),
        end=st.sampled_from(["commit", "commit", "commit", "roll back", "fail"]),
    )
    def tick_of(self, session: Session, runs: list[tuple[PageClass, int]], end: str) -> None:
        if session not in self.told:
            return
        if self.cache.is_suspended(session):
            self.resume(session)
            return
        before = copy.deepcopy(self.told[session])
        try:
            self.cache.reserve(session, runs)
        except (OutOfPages, BudgetExceeded):
            return
        total = sum(tokens for _, tokens in runs)
        rows = np.full((len(GROUPS), total), -1)
        column = 0
        for page_class, tokens in runs:
            position = self.cache.append(session, page_class, tokens, rows, column)
            assert position == len(before.tokens) + column
            column += tokens
        values = [self.dice.randrange(1, 1 << 20) for _ in range(total)]
        if end != "fail":  # else the layers never ran
            self.write(session, rows, values)
        self.tell(session, values)
        if end == "commit":
            self.cache.commit(session)
            self.cache.tick()
            self.clock += 1
        else:
            self.told[session] = before
            self.cache.roll_back(session)

    @rule(session=sessions, seed=st.integers(0, 999))
    def many_ticks(self, session: Session, seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(8):
            sizes = dice.choices((0, 1, 2, 3), k=4)
            self.tick_of(session, list(zip(CLASSES[1:], sizes, strict=True)), "commit")

    @rule()
    def empty_tick(self) -> None:
        self.clock += 1
        assert self.cache.tick() == self.clock

    @rule(session=sessions)
    def mark(self, session: Session) -> None:
        if session in self.told and not self.cache.is_suspended(session):
            told = self.told[session]
            told.mark = self.cache.mark(session)
            assert told.mark == len(told.tokens)

    @rule(session=sessions, back=st.integers(0, 14))
    def rewind(self, session: Session, back: int) -> None:
        if session not in self.told or self.cache.is_suspended(session):
            return
        told = self.told[session]
        target = max(0, len(told.tokens) - back)
        try:
            self.cache.rewind(session, target)
        except NoSnapshot as error:
            assert error.position == target and target not in error.kept
            return
        except (WindowPassed, OutOfPages):
            return
        self.forget_from(session, target)

    @rule(session=sessions)
    def rewind_to_mark(self, session: Session) -> None:
        if session not in self.told or self.cache.is_suspended(session):
            return
        told = self.told[session]
        try:
            assert self.cache.rewind(session) == told.mark
        except CacheError as error:
            assert isinstance(error, (WindowPassed, OutOfPages))
            return
        except RuntimeError as error:
            assert "has no mark" in str(error) and told.mark is None
            return
        assert told.mark is not None
        self.forget_from(session, told.mark)

    def forget_from(self, session: Session, position: int) -> None:
        told = self.told[session]
        del told.tokens[position:]
        told.history = {at: state for at, state in told.history.items() if at <= position}
        told.state = told.history[position]
        if told.mark is not None and told.mark > position:
            told.mark = None

    @rule(target=sessions, session=sessions)
    def fork(self, session: Session) -> object:
        if session not in self.told or self.cache.is_suspended(session):
            return multiple()
        try:
            child = self.cache.fork(session)
        except (OutOfSessions, OutOfPages):
            return multiple()
        self.told[child] = copy.deepcopy(self.told[session])
        self.told[child].mark = None
        return child

    @rule(session=sessions)
    def suspend(self, session: Session) -> None:
        if session in self.told and not self.cache.is_suspended(session):
            self.cache.suspend(session)
            assert self.cache.is_suspended(session)

    @rule(session=sessions)
    def resume(self, session: Session) -> None:
        if session in self.told and self.cache.is_suspended(session):
            try:
                self.cache.resume(session)
            except OutOfPages:
                assert self.cache.is_suspended(session)

    @rule(target=sessions, session=sessions)
    def save_and_load(self, session: Session) -> object:
        if session not in self.told:
            return multiple()
        path = Path(self.folder.name) / "session"
        self.cache.save(session, path)
        try:
            twin = self.cache.load(path)
        except (OutOfSessions, OutOfPages):
            return multiple()
        told = copy.deepcopy(self.told[session])
        told.history = {0: 0, len(told.tokens): told.state}
        told.mark = None
        self.told[twin] = told
        return twin

    @rule(session=sessions, pages=st.integers(0, 3))
    def roll(self, session: Session, pages: int) -> None:
        if session in self.told and not self.cache.is_suspended(session):
            assert 0 <= self.cache.roll(session, 0, pages) <= pages

    @invariant()
    def everything_is_in_its_place(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_invariants()
        assert self.cache.stats().sessions == len(self.told)
        held: list[set[int]] = [set() for _ in GROUPS]
        for session, told in self.told.items():
            assert self.cache.length(session) == len(told.tokens)
            assert self.counter_N[session.slot] == told.state
            assert (self.taps_L_N[:, session.slot] == 0.5 + told.state).all()
            if self.cache.is_suspended(session):
                continue
            for g in range(len(GROUPS)):
                self.check_pages(session, told, g)
                held[g] |= {ref.page for ref in self.cache.pages(session, g)}
        for group, pages in zip(self.cache.groups, held, strict=True):
            idle = [p for p in range(group.spec.pages) if p not in pages]
            for x in (group.k_pages_L_P_G_R_C, group.v_pages_L_P_G_R_C):
                x[:, idle] = float("nan")

    def check_pages(self, session: Session, told: Told, g: int) -> None:
        group = self.cache.groups[g]
        seen: list[int] = []
        refs, positions = self.cache.pages(session, g), self.cache.positions(session, g)
        for ref, row_positions in zip(refs, positions, strict=True):
            seen += row_positions
            for layer in range(group.k_pages_L_P_G_R_C.shape[0]):
                values = [content(told.tokens[p], layer) for p in row_positions]
                expected = torch.tensor(values, dtype=torch.float32)
                for x in (group.k_pages_L_P_G_R_C, group.v_pages_L_P_G_R_C):
                    found = x[layer, ref.page, :, : len(values)].float()
                    assert torch.equal(
                        found, expected.to(x.dtype).float()[:, None].expand_as(found)
                    )
        assert len(set(seen)) == len(seen)
        window = group.spec.window
        if window is not None:
            # The next token sees itself and window - 1 before it; a rewind may leave just these.
            newest = range(max(0, len(told.tokens) - window + 1), len(told.tokens))
            assert set(newest) <= set(seen)


def content(value: int, layer: int) -> int:
    """What a token's row holds in a layer: a number that fp8 has too."""
    return (value // 16**layer) % 16


TestRollingCache = Machine.TestCase
TestRollingCache.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
