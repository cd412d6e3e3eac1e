"""Sessions in a fixed table of slots, from the tick thread's side.

Clients take free slots and set flags; only the tick thread gives a slot back, between two ticks, so
no lock is needed: what two threads touch is one reference, one flag or one deque end at a time.
"""

# Dimension key: S session rows of a tick, N samples in a window, K output steps.

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from itertools import count
from typing import NamedTuple

import numpy as np
import torch

from .admission import Admission
from .checks import Sampling
from .errors import ResourceExhausted, SessionFault
from .mailbox import Inbox, MailboxSpec, Outbox, Pair, Window
from .metrics import Metrics
from .model import TickInput
from .recall import Recall


@dataclass
class SessionStats:
    """What became of a session's media. Written by the tick thread alone."""

    ticks: int = 0  # that ran for this session
    skipped_ticks: int = 0  # that did not; their windows were dropped
    missing_windows: int = 0  # flagged to the model: samples were missing, or ticks were skipped
    dropped_samples: int = 0
    shed_frames: int = 0
    lost_outputs: int = 0  # ticks whose output found the queue full
    absent_ticks: int = 0  # that the session sat out: paused, or its prompt was not read yet
    interruptions: int = 0  # that have reached the model
    unforgotten: int = 0  # of these, those whose unheard speech it could not take back
    fenced_outputs: int = 0  # ticks whose output an interruption overtook; counted by the client


class Interruption(NamedTuple):
    """The client stopped playing. What it had not heard by `played_ns` was never said."""

    epoch: int
    played_ns: int  # media time


NOTHING = Interruption(0, 0)


_numbers = count()


@dataclass(eq=False)
class Seat:
    """One session, as its client and the tick thread share it.

    Its window w is tick `open_tick + w`. `closed`, `paused` and `interruption` are written by the
    client, all else that changes by the tick thread.
    """

    spec: MailboxSpec
    sampling: Sampling
    open_tick: int
    prompt: list[int] = field(default_factory=list)  # token ids
    priority: int = 0
    slot: int = -1
    closed: bool = False
    paused: bool = False
    interruption: Interruption = NOTHING
    admitted: bool = False
    num_read: int = 0  # tokens of the prompt
    num_waited: int = 0  # ticks since then that left no time for more of it
    put_away: bool = False  # its keys are in host memory
    was_absent: bool = False  # from the tick before
    epoch: int = 0  # of the newest interruption that the tick thread has seen
    played_ns: int = 0  # how far its speech was heard before that
    position: int = 0  # tokens that the model's memory of the session counts
    open_window: int = 0  # the oldest that input may still be pushed for
    fault: SessionFault | None = None
    stats: SessionStats = field(default_factory=SessionStats)
    number: int = field(default_factory=_numbers.__next__)  # names the session in this process

    def __post_init__(self) -> None:
        self.inbox = Inbox(self.spec)
        self.outbox = Outbox(self.spec)
        self.recall = Recall(self.spec)

    @property
    def over(self) -> bool:
        return self.closed or self.fault is not None

    @property
    def present(self) -> bool:
        """Whether it takes part in ticks."""
        return not self.paused and self.num_read == len(self.prompt)

    def take(self, tick: int, pcm_N: np.ndarray, shed: int = 0) -> tuple[Window, bool]:
        """The tick's window, and whether to flag it missing. shed: see `Inbox.take`."""
        window = tick - self.open_tick
        skipped = window - self.open_window
        self.open_window = window + 1  # first of all: from here on the window is closed to clients
        taken = self.inbox.take(window, pcm_N, shed)
        missing = taken.missing_samples > 0 or skipped > 0 or self.was_absent
        self.was_absent = self.put_away = False
        self.recall.hear(window, pcm_N, missing, taken)
        self.stats.ticks += 1
        self.stats.skipped_ticks += skipped
        self.stats.missing_windows += missing
        self.stats.dropped_samples += taken.dropped_samples
        self.stats.shed_frames += taken.shed_frames
        return taken, missing

    def sit_out(self, tick: int) -> None:
        """The tick's window passes unheard."""
        window = tick - self.open_tick
        self.stats.skipped_ticks += window - self.open_window
        self.open_window = window + 1
        dropped, shed = self.inbox.pass_by(window)
        self.stats.dropped_samples += dropped
        self.stats.shed_frames += shed
        self.stats.absent_ticks += 1
        self.was_absent = True

    def publish(self, tick: int, token_K: np.ndarray, pcm: np.ndarray) -> bool:
        """Whether the output found room; if not, it is lost and counted."""
        window = tick - self.open_tick
        published = self.outbox.put(window, self.epoch, token_K, pcm)
        if self.inbox.line is not None:
            self.inbox.line.said(window, token_K)
        self.stats.lost_outputs += not published
        return published

    def remember(self, token_K: np.ndarray, mel_M_B: np.ndarray, position: int) -> None:
        """What the tick said, and the session's position after it."""
        self.recall.say(self.position, token_K, mel_M_B)
        self.position = position

    def fail(self, tick: int, error: Exception) -> None:
        t = (tick - self.open_tick) * self.spec.window_ns / 1e9
        self.fault = SessionFault(f"the tick at {t=} ended this session: {error!r}", t=t)

    def copy_stats(self, fenced_outputs: int = 0) -> SessionStats:
        return replace(self.stats, fenced_outputs=fenced_outputs)


class Slots:
    """The table. `claim` is for clients, one at a time; `sweep` for the tick thread."""

    def __init__(self, num_slots: int) -> None:
        self._seats: list[Seat | None] = [None] * num_slots
        self._free = deque(range(num_slots))
        self.num_refused = 0

    def __len__(self) -> int:
        return len(self._seats)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def claim(self, seat: Seat, admission: Admission) -> None:
        """Give `seat` a slot. Raises ResourceExhausted, with figures, when there is none for it."""
        seats = list(self._seats)
        held = [s for s in seats if s is not None]
        try:
            # of one moment: the tick thread may free slots meanwhile, and these count as held
            admission.check(len(held), sum(s.over for s in held))
        except ResourceExhausted:
            self.num_refused += 1
            raise
        seat.slot = self._free.popleft()
        self._seats[seat.slot] = seat

    def sweep(self) -> list[int]:
        """Free the slots of sessions that are over, and return them: the caller releases what they
        hold, before the next session's first tick."""
        freed = [slot for slot, seat in enumerate(self._seats) if seat is not None and seat.over]
        for slot in freed:
            self._seats[slot] = None
            self._free.append(slot)
        return freed

    def seats(self) -> list[Seat]:
        """Everybody who holds a slot now, by slot; any thread may ask."""
        return [seat for seat in self._seats if seat is not None]

    def due(self, tick: int) -> tuple[list[Seat], list[Seat]]:
        """The sessions that take part in `tick`, and those for which it passes, by slot."""
        due: list[Seat] = []
        absent: list[Seat] = []
        for seat in self._seats:
            if seat is not None and seat.open_tick <= tick:
                (due if seat.present else absent).append(seat)
        return due, absent


class Batch:
    """The rows of one tick, in arrays made once; its `TickInput` is valid until the next one."""

    def __init__(self, num_slots: int, window_samples: int) -> None:
        self._slot_S = np.full(num_slots, -1, np.int32)
        self._pcm_S_N = np.zeros((num_slots, window_samples), np.float32)
        self._missing_S = np.zeros(num_slots, np.bool_)
        self._frames: list[list[Pair] | None] = [None] * num_slots
        self._text: list[list[int]] = [[]] * num_slots

    def fill(
        self, seats: list[Seat], tick: int, metrics: Metrics, shed: int = 0
    ) -> tuple[list[Seat], TickInput]:
        """Row s is that of the s-th seat returned: its window of `tick`, which is closed from here
        on. Those whose window could not be taken are left out, and have failed."""
        dropped_samples = shed_frames = 0
        taken: list[Seat] = []
        for seat in seats:
            row = len(taken)
            try:
                window, missing = seat.take(tick, self._pcm_S_N[row], shed)
            except Exception as error:
                seat.fail(tick, error)
                continue
            taken.append(seat)
            self._missing_S[row] = missing
            self._frames[row] = window.pairs
            self._text[row] = window.text
            dropped_samples += window.dropped_samples
            shed_frames += window.shed_frames
        self._slot_S[: len(taken)] = [seat.slot for seat in taken]
        metrics.add("faults", len(seats) - len(taken))
        metrics.add("missing", int(self._missing_S[: len(taken)].sum()))
        metrics.add("dropped_samples", dropped_samples)
        metrics.add("shed_frames", shed_frames)
        metrics.add("rows", len(taken))
        return taken, self._input(len(taken))

    def silent(self, num_rows: int | None = None) -> TickInput:
        """The first slots, or all of them, hearing a whole window of zeros."""
        num_rows = len(self._slot_S) if num_rows is None else num_rows
        self._slot_S[:num_rows] = np.arange(num_rows)
        self._pcm_S_N[:] = 0.0
        self._missing_S[:] = False
        self._frames[:num_rows], self._text[:num_rows] = [None] * num_rows, [[]] * num_rows
        return self._input(num_rows)

    def _input(self, num_rows: int) -> TickInput:
        return TickInput(
            torch.from_numpy(self._slot_S[:num_rows]),
            torch.from_numpy(self._pcm_S_N[:num_rows]),
            torch.from_numpy(self._missing_S[:num_rows]),
            self._frames[:num_rows],
            self._text[:num_rows],
        )
