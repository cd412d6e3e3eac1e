"""RollingKVCache: pages of many sessions that roll for ever within fixed budgets.

The host decides and the device obeys: `tml_kernels._core.PageTable` keeps the books in O(new
tokens) whatever a session's age; `apply` sends what changed to the device tables, once a tick.
"""

# Dimension key: T tokens, K layer groups, N session slots, U deltas.

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._core import (
    GroupStats,
    OutOfPages,
    PageClass,
    PageRef,
    PageTable,
    Session,
    SessionStats,
)
from .checks import check_device_tables
from .pools import CacheGroup, GroupPages, Pools
from .saved import check_positions, read_contents, restore_image, write_session
from .session_file import read_session_file
from .slot_state import NUM_SNAPSHOTS, SlotState, SlotTensor
from .transfer import Contents, copy_pages, gather, scatter, to_device

CLASSES = (PageClass.ANCHOR, PageClass.TEXT, PageClass.AUDIO, PageClass.VIDEO, PageClass.REPLY)


class CacheStats(NamedTuple):
    groups: list[GroupStats]
    sessions: int
    suspended: int
    host_bytes: int  # contents of suspended sessions
    ticks: int


class Rows(NamedTuple):
    """Where the tokens of a tick go, on the device; as `attention_prologue` takes it."""

    row_K_T: Tensor  # int64, page * R + row of each token in each group, -1: nowhere
    position_T: Tensor  # int64


class RollingKVCache:
    """Keys, values and the other state of up to `max_sessions` sessions, all of it preallocated.

    A tick of a session is a transaction: `reserve` the worst case, `append` what comes, run the
    layers, then `commit`, or `roll_back` to leave no trace. `tick` ends a tick of all sessions:
    snapshots of `slot_tensors` are taken (a rewind can go to any of the last `num_snapshots`) and
    pages that were freed `lag` ticks ago may be used again. lag: ticks the device may be behind the
    host on other streams; 0 where all work is queued on one stream.

    Where pages run out, `reserve` and `resume` make room: they roll the session's own window and
    then suspend sessions of lower priority, or of the same and idle, to host memory, the idlest
    first. When that is not enough they raise OutOfPages with figures. Whatever raises has changed
    nothing but that room. For one thread. Page dtype: float32, bfloat16, float16 or
    float8_e4m3fn with one float32 scale per token and head.

    >>> group = CacheGroup(num_layers=2, num_kv_heads=2, head_width=64, pages=32, columns=16)
    >>> cache = RollingKVCache([group], max_sessions=4, page_dtype=torch.bfloat16)
    >>> session = cache.open({c: 2 for c in CLASSES})
    >>> cache.reserve(session, [(PageClass.AUDIO, 4), (PageClass.REPLY, 4)])
    >>> rows = np.full((1, 8), -1)
    >>> cache.append(session, PageClass.AUDIO, 4, rows)
    0
    >>> cache.append(session, PageClass.REPLY, 4, rows, column=4)
    4
    >>> cache.apply(rows, np.arange(8)).row_K_T.tolist()
    [[64, 65, 66, 67, 128, 129, 130, 131]]
    >>> cache.commit(session)
    >>> cache.tick()
    1
    """

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        *,
        max_sessions: int,
        page_dtype: torch.dtype,
        device: torch.device | str = "cpu",
        lag: int = 0,
        slot_tensors: Mapping[str, SlotTensor] | None = None,
        num_snapshots: int = NUM_SNAPSHOTS,
    ) -> None:
        self.device = torch.device(device)
        self.page_dtype, self.max_sessions = page_dtype, max_sessions
        specs = [spec.layer_group() for spec in groups]
        self._table = PageTable(specs, max_sessions=max_sessions, lag=lag)
        self._pools = Pools(
            groups, max_sessions=max_sessions, page_dtype=page_dtype, device=self.device
        )
        self._state = SlotState(
            slot_tensors or {}, max_sessions=max_sessions, num_snapshots=num_snapshots
        )
        self._sessions: dict[int, Session] = {}  # by slot
        self._suspended: dict[Session, Contents] = {}
        self._retired: deque[tuple[torch.cuda.Event, Contents]] = deque()
        self._last_commit = [0] * max_sessions  # by slot, the tick
        self._committed: set[int] = set()  # slots of which no tick has taken a snapshot since
        self.num_keys = self._table.num_keys  # entries of page lists: the most a tick can change
        self._lag, self._tick = lag, 0
        self._full_tick = 0  # the last one of all sessions

    @property
    def groups(self) -> list[GroupPages]:
        return self._pools.groups

    # A session's life

    def open(self, budgets: Mapping[PageClass, int], *, priority: int = 0) -> Session:
        """budgets: the most pages of each class, in each group without a window. Raises
        OutOfSessions."""
        return self._opened(self._table.open(dict(budgets), priority=priority))

    def fork(self, session: Session, *, priority: int = 0) -> Session:
        """Another session that begins as this one is: full pages are shared, open ones copied.
        Raises OutOfSessions or OutOfPages."""
        child, copies = self._table.fork(session, priority=priority)
        try:
            copy_pages(self.groups, copies, self.device)
            self._state.copy(session.slot, child.slot)
            self._state.remember_once(child.slot, self.length(child))
        except BaseException:
            self._table.close(child)
            raise
        self._sessions[child.slot] = child
        self._last_commit[child.slot] = self._tick
        self._committed.discard(child.slot)  # it remembers what it begins as
        return child

    def close(self, session: Session) -> None:
        """Gives back all that the session holds, in a transaction or suspended too."""
        self._table.close(session)
        if (contents := self._suspended.pop(session, None)) is not None:
            self._retire(contents)
        del self._sessions[session.slot]
        self._state.reset(session.slot)

    # A tick

    def reserve(self, session: Session, runs: Sequence[tuple[PageClass, int]]) -> None:
        """Begin a transaction of at most these tokens, of these classes in this order.

        Raises OutOfPages, BudgetExceeded (anchors, or more pages than columns), and RuntimeError
        where the session is suspended or has had its transaction of this tick.
        """
        if self._has_committed(session):
            self._table.session_stats(session)  # UnknownSession comes first
            raise RuntimeError(f"reserve: slot={session.slot} has committed in this tick already")
        while True:
            try:
                self._table.reserve(session, list(runs))
                return
            except OutOfPages as error:
                if not self._make_room(session, error, roll=True):
                    raise

    def append(
        self, session: Session, page_class: PageClass, tokens: int, rows: np.ndarray,
        column: int = 0,
    ) -> int:  # fmt: skip
        """The position of the first of `tokens` new tokens; rows[:, column:] says where they go.

        rows: int64 [groups, T], page * page_rows + row in the group's pages. Raises
        ReservationExceeded.
        """
        return self._table.append(session, page_class, tokens, rows.data, column)

    def reserve_all(
        self, sessions: Sequence[Session], classes: Sequence[PageClass], tokens_S_R: np.ndarray
    ) -> int:
        """`reserve` for one session after the other, int64 tokens [S, R] of R classes: how many
        have begun a transaction. The next one would have to be made room for, or is refused."""
        if self._committed:
            first = next((s for s, x in enumerate(sessions) if self._has_committed(x)), None)
            sessions, tokens_S_R = sessions[:first], tokens_S_R[:first]
        return self._table.reserve_all(sessions, classes, tokens_S_R.data)

    def append_all(
        self, sessions: Sequence[Session], classes: Sequence[PageClass],
        tokens_S_R: np.ndarray, column_S_R: np.ndarray, rows: np.ndarray, position_T: np.ndarray,
    ) -> None:  # fmt: skip
        """`append` for all runs of all sessions, each from its own column of `rows` on, and their
        positions to `position_T`. All int64. What raises is undone by rolling all of them back."""
        self._table.append_all(
            sessions, classes, tokens_S_R.data, column_S_R.data, rows.data, position_T.data
        )

    def apply(self, rows: np.ndarray, positions: np.ndarray) -> Rows:
        """Bring the device's tables up to date, before the layers run.

        rows, positions: of this tick's tokens, int64 [groups, T] and [T], -1 in rows for tokens of
        nobody. Queues one copy and one launch; waits for nothing.
        """
        num_groups, num_tokens = len(self.groups), positions.size
        for name, x, shape in (
            ("rows", rows, (num_groups, num_tokens)),
            ("positions", positions, (num_tokens,)),
        ):
            if x.dtype != np.int64 or x.shape != shape:
                raise ValueError(f"{name}: expected int64 {shape}, got {x.dtype} {x.shape}")
        row_Z, position_Z = np.empty((2, self._table.num_placed * num_tokens), np.int64)
        delta_U_4 = np.empty((self._table.num_deltas, 4), np.int64)
        self.stage(rows, positions, delta_U_4, row_Z, position_Z)
        parts = (delta_U_4, rows, positions, row_Z, position_Z)
        try:
            staged = to_device(np.concatenate([part.ravel() for part in parts]), self.device)
            delta, row, position_T, row_Z, position_Z = staged.split([part.size for part in parts])
            self.write(delta.view(-1, 4), row_Z, position_Z)
        except BaseException:
            self.send_again()
            raise
        return Rows(row.view(num_groups, num_tokens), position_T)

    def stage(
        self, rows: np.ndarray, positions: np.ndarray,
        delta_U_4: np.ndarray, row_Z: np.ndarray, position_Z: np.ndarray,
    ) -> None:  # fmt: skip
        """The host's half of `apply`: what `write` takes, into int64 arrays of sizes that no tick
        changes. delta: `num_keys` rows, padded; row and position: T of each group that has no
        window. Where `write` does not follow, `send_again` must."""
        self._table.place(rows.data, positions.data, row_Z.data, position_Z.data)
        self._table.take_deltas(delta_U_4.data)

    def send_again(self) -> None:
        """What the device was to be told may not have reached it: all of its tables are written
        anew by the next `apply` or `stage`."""
        self._table.send_again()

    def write(self, delta_U_4: Tensor, row_Z: Tensor, position_Z: Tensor) -> None:
        """The device's half of `apply`: one launch, which a captured graph can hold."""
        self._pools.write(delta_U_4, row_Z, position_Z)

    def commit(self, session: Session) -> None:
        """Keep what was appended. Classes over their budget lose their oldest pages, windows what
        has left them. Raises RuntimeError outside of a transaction."""
        self.commit_all([session])

    def commit_all(self, sessions: Sequence[Session]) -> None:
        """`commit` for each of them, given once."""
        self._table.commit_all(sessions)
        for session in sessions:
            self._last_commit[session.slot] = self._tick + 1
            self._committed.add(session.slot)

    def roll_back(self, session: Session) -> None:
        """Forget the transaction: pages, positions and the slot's state are those before it."""
        self._table.roll_back(session)
        self._state.restore(session.slot, self.length(session))

    def tick(self, only: Sequence[Session] | None = None, *, ago: int = 0) -> int:
        """End a tick of all sessions; returns its number, from 1.

        only: the sessions that had this one, between ticks of all: it counts for them as the last
        of those, or as one `ago` ticks before, and what others can be rewound to stays.
        """
        ended = None if only is None else [(x.slot, self.length(x)) for x in only]
        self._tick += 1
        self._table.tick(self._tick)
        if ended is None:
            self._full_tick = self._tick
            self._state.snapshot(self._table.lengths())
            self._committed.clear()
        else:
            for slot, length in ended:
                self._state.remember(slot, length, ago)
                self._committed.discard(slot)
        while self._retired and self._retired[0][0].query():
            self._retired.popleft()
        return self._tick

    # Time travel and room

    def roll(self, session: Session, group: int, pages: int) -> int:
        """Drop up to `pages` of the session's oldest pages: video, audio, reply, text, never an
        anchor, an open page or one that is shared. Returns how many."""
        return self._table.roll(session, group, pages)

    def mark(self, session: Session) -> int:
        """Remember this point, until the next mark; returns its position."""
        position = self._table.mark(session)
        self._state.mark(session.slot, position)
        return position

    def rewind(self, session: Session, position: int | None = None) -> int:
        """Drop every token from `position` on, or from the mark; returns the position.

        Raises NoSnapshot where no tick ended there that is still remembered (without slot tensors
        there is nothing to remember, and any position will do), WindowPassed where a window has
        lost keys that it needs, OutOfPages where there is no page for a copy of a shared one. After
        any other error, of the device, the session is of no use: close it.
        """
        length = self.length(session)
        target = self._state.marked(session.slot) if position is None else position
        if target < 0 and position is None:
            raise RuntimeError(f"rewind: slot={session.slot} has no mark")
        if 0 <= target < length:
            self._state.check_snapshot(session.slot, target)
        copy_pages(self.groups, self._table.rewind(session, target), self.device)
        if target < length:
            self._state.restore(session.slot, target)
        return target

    def suspend(self, session: Session) -> None:
        """Move the session's pages to pinned host memory; its slot and slot tensors stay."""
        contents = gather(self.groups, self._refs(session), self.device, to_host=True)
        try:
            self._table.suspend(session)  # last: host memory may not be had
        except BaseException:
            self._retire(contents)
            raise
        self._suspended[session] = contents

    def resume(self, session: Session) -> None:
        """Bring a suspended session's pages back. Raises OutOfPages."""
        while True:
            try:
                refs = self._table.resume(session)
                break
            except OutOfPages as error:
                if not self._make_room(session, error, roll=False):
                    raise
        contents = self._suspended[session]
        try:
            scatter(self.groups, refs, contents, self.device)
        except BaseException:
            self._table.suspend(session)  # as it was
            raise
        del self._suspended[session]
        self._retire(contents)

    def is_suspended(self, session: Session) -> bool:
        """Whether its pages are in host memory."""
        return session in self._suspended

    # Files

    def save(self, session: Session, path: str | Path) -> None:
        """Write the session, at rest or suspended, to one file. Waits for the device."""
        image = self._table.image(session)
        contents = self._suspended.get(session)
        if contents is None:
            contents = gather(self.groups, self._refs(session), self.device, to_host=False)
        elif self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the copies to the host may not have run yet
        write_session(self, Path(path), session.slot, image, contents)

    def load(
        self,
        path: str | Path,
        *,
        budgets: Mapping[PageClass, int] | None = None,
        priority: int | None = None,
    ) -> Session:
        """A new session from a file; by default with the budgets and priority that it was saved
        with, else with as many of its newest pages as `budgets` keep.

        Raises SessionFileError for a file that was altered, is of a cache of another shape or has
        more anchors than are kept, OutOfSessions, OutOfPages.
        """
        if budgets is not None and set(budgets) != set(CLASSES):
            raise ValueError(f"budgets: expected one of each class, got {len(budgets)}")
        by_class = None if budgets is None else [budgets[page_class] for page_class in CLASSES]
        file, description = read_session_file(Path(path))
        saved = read_contents(self, file, description, by_class)
        image = saved.image if priority is None else saved.image._replace(priority=priority)
        session = restore_image(self._table, Path(path), image)
        self._opened(session)
        try:
            self._suspended[session] = saved.contents
            self.resume(session)
            places = [self.positions(session, g) for g in range(len(self.groups))]
            check_positions(Path(path), saved.contents, places)
            for name, row in self.slot_rows(session.slot).items():
                row.copy_(saved.state[name])
            self._state.remember(session.slot, self.length(session))
        except BaseException:
            self.close(session)
            raise
        return session

    # What there is

    def length(self, session: Session) -> int:
        """Tokens since the session was opened: the position of the next one."""
        return self._table.length(session)

    def pages(self, session: Session, group: int) -> list[PageRef]:
        """What the session holds of a group, in the order of its page list."""
        return self._table.pages(session, group)

    def positions(self, session: Session, group: int) -> list[list[int]]:
        """Of each page of `pages`, the positions that its rows hold."""
        return self._table.positions(session, group)

    def session_stats(self, session: Session) -> SessionStats:
        """Raises UnknownSession."""
        return self._table.session_stats(session)

    def held(self, sessions: Sequence[Session], group: int) -> list[int]:
        """Pages of a group by class, of all these sessions together."""
        return self._table.held(sessions, group)

    def dropped(self, group: int) -> list[int]:
        """Pages by class that sessions ever lost to budgets, or so that there was room."""
        return self._table.dropped[group]

    @property
    def work(self) -> int:
        """Elementary changes of the books so far: what a tick costs, without a clock."""
        return self._table.work

    def slot_rows(self, slot: int) -> dict[str, Tensor]:
        """A slot's rows of the slot tensors, by name, as views."""
        return self._state.rows(slot)

    def stats(self) -> CacheStats:
        """Pages of every group, sessions, and the bytes of those in host memory."""
        host = sum(x.nbytes for c in self._suspended.values() for part in c for x in part.values())
        return CacheStats(
            self._table.stats(), len(self._sessions), len(self._suspended), host, self._tick
        )

    def check_invariants(self) -> None:
        """Raises RuntimeError unless every page is free or owned, counts equal owners, and the
        device's tables, once brought up to date, say the same. Waits for the device."""
        self._table.check_invariants()
        self.apply(np.empty((len(self.groups), 0), np.int64), np.empty(0, np.int64))
        check_device_tables(self, self._sessions.values())

    # Inside

    def _has_committed(self, session: Session) -> bool:
        """In this tick, where that is one too many."""
        return bool(self._state.tensors) and session.slot in self._committed

    def _refs(self, session: Session) -> list[PageRef]:
        return [ref for g in range(len(self.groups)) for ref in self._table.pages(session, g)]

    def _retire(self, contents: Contents) -> None:
        """Keep pinned memory until the copies from or to it that are queued have run."""
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            self._retired.append((event, contents))

    def _opened(self, session: Session) -> Session:
        self._sessions[session.slot] = session
        self._state.reset(session.slot)
        self._last_commit[session.slot] = self._tick
        self._committed.discard(session.slot)
        return session

    def _make_room(self, session: Session, error: OutOfPages, *, roll: bool) -> bool:
        """Whether anything was freed. What would not be enough is not rolled: that is a loss, while
        a suspended session loses nothing."""
        missing = error.needed - error.free
        if self._table.stats()[error.group].waiting >= missing:
            return False  # there will be room when the fence has passed
        if roll and 0 < missing <= self._table.evictable(session, error.group):
            return self._table.roll(session, error.group, missing) > 0 and self._lag == 0
        victim = self._table.victim(session)
        if victim == session:
            return False
        mine, other = self.session_stats(session), self.session_stats(victim)
        if other.priority == mine.priority and self._last_commit[victim.slot] >= self._full_tick:
            return False  # it is not idle
        self.suspend(victim)
        return self._lag == 0
