"""Sessions in a fixed table of slots, from the tick thread's side.

Clients take free slots and set flags; only the tick thread gives a slot back, between two ticks, so
no lock is needed: what two threads touch is one reference, one flag or one deque end at a time.
"""

# Dimension key: S session rows of a tick, N samples in a window, K output steps.

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from .checks import Sampling
from .errors import ResourceExhausted, SessionFault
from .mailbox import Inbox, MailboxSpec, Outbox, Window
from .metrics import Metrics
from .model import TickInput


@dataclass
class SessionStats:
    """What became of a session's media. Written by the tick thread alone."""

    ticks: int = 0  # that ran for this session
    skipped_ticks: int = 0  # that did not; their windows were dropped
    missing_windows: int = 0  # flagged to the model: samples were missing, or ticks were skipped
    dropped_samples: int = 0
    shed_frames: int = 0
    lost_outputs: int = 0  # ticks whose output found the queue full


@dataclass(eq=False)
class Seat:
    """One session, as its client and the tick thread share it.

    Its window w is tick `open_tick + w`. `closed` is written by the client, all else that changes
    by the tick thread.
    """

    spec: MailboxSpec
    sampling: Sampling
    open_tick: int
    slot: int = -1
    closed: bool = False
    admitted: bool = False
    open_window: int = 0  # the oldest that input may still be pushed for
    fault: SessionFault | None = None
    stats: SessionStats = field(default_factory=SessionStats)

    def __post_init__(self) -> None:
        self.inbox = Inbox(self.spec)
        self.outbox = Outbox(self.spec)

    @property
    def over(self) -> bool:
        return self.closed or self.fault is not None

    def take(self, tick: int, pcm_N: np.ndarray) -> tuple[Window, bool]:
        """The tick's window, and whether to flag it missing."""
        window = tick - self.open_tick
        skipped = window - self.open_window
        self.open_window = window + 1  # first of all: from here on the window is closed to clients
        taken = self.inbox.take(window, pcm_N)
        missing = taken.missing_samples > 0 or skipped > 0
        self.stats.ticks += 1
        self.stats.skipped_ticks += skipped
        self.stats.missing_windows += missing
        self.stats.dropped_samples += taken.dropped_samples
        self.stats.shed_frames += taken.shed_frames
        return taken, missing

    def publish(self, tick: int, token_K: np.ndarray, pcm: np.ndarray) -> bool:
        """Whether the output found room; if not, it is lost and counted."""
        published = self.outbox.put(tick - self.open_tick, token_K, pcm)
        self.stats.lost_outputs += not published
        return published

    def fail(self, tick: int, error: Exception) -> None:
        t = (tick - self.open_tick) * self.spec.window_ns / 1e9
        self.fault = SessionFault(f"the tick at {t=} ended this session: {error!r}", t=t)

    def copy_stats(self) -> SessionStats:
        return replace(self.stats)


class Slots:
    """The table. `claim` is for clients, one at a time; `sweep` for the tick thread."""

    def __init__(self, num_slots: int) -> None:
        self._seats: list[Seat | None] = [None] * num_slots
        self._free = deque(range(num_slots))

    def __len__(self) -> int:
        return len(self._seats)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def claim(self, seat: Seat) -> None:
        """Give `seat` a slot. Raises ResourceExhausted, with figures, when there is none."""
        try:
            seat.slot = self._free.popleft()
        except IndexError:
            capacity = len(self._seats)
            closing = sum(s is not None and s.over for s in list(self._seats))
            raise ResourceExhausted(
                f"all {capacity} slots are taken, {closing} of them by sessions that close with "
                "the next tick: close a session, or build the Runtime with a larger num_slots",
                in_use=capacity,
                closing=closing,
                capacity=capacity,
            ) from None
        self._seats[seat.slot] = seat

    def sweep(self) -> list[int]:
        """Free the slots of sessions that are over, and return them: the caller releases what they
        hold, before the next session's first tick."""
        freed = [slot for slot, seat in enumerate(self._seats) if seat is not None and seat.over]
        for slot in freed:
            self._seats[slot] = None
            self._free.append(slot)
        return freed

    def due(self, tick: int) -> list[Seat]:
        """The sessions that take part in `tick`, by slot."""
        return [s for s in self._seats if s is not None and s.open_tick <= tick]


class Batch:
    """The rows of one tick, in arrays made once; its `TickInput` is valid until the next one."""

    def __init__(self, num_slots: int, window_samples: int, device: torch.device) -> None:
        self._slot_S = np.full(num_slots, -1, np.int32)
        self._pcm_S_N = np.zeros((num_slots, window_samples), np.float32)
        self._missing_S = np.zeros(num_slots, np.bool_)
        self._frames: list[np.ndarray | None] = [None] * num_slots
        self._text: list[list[int]] = [[]] * num_slots
        self._device = device

    def fill(self, seats: list[Seat], tick: int, metrics: Metrics) -> TickInput:
        """Row s is `seats[s]`: its window of `tick`, which is closed from here on."""
        for row, seat in enumerate(seats):
            window, missing = seat.take(tick, self._pcm_S_N[row])
            self._slot_S[row] = seat.slot
            self._missing_S[row] = missing
            self._frames[row] = window.pairs
            self._text[row] = window.text
            metrics.add("missing", missing)
            metrics.add("dropped_samples", window.dropped_samples)
            metrics.add("shed_frames", window.shed_frames)
        metrics.add("rows", len(seats))
        return self._input(len(seats))

    def silent(self) -> TickInput:
        """Every slot, hearing a whole window of zeros."""
        num_rows = len(self._slot_S)
        self._slot_S[:] = np.arange(num_rows)
        self._pcm_S_N[:] = 0.0
        self._missing_S[:] = False
        self._frames, self._text = [None] * num_rows, [[]] * num_rows
        return self._input(num_rows)

    def _input(self, num_rows: int) -> TickInput:
        return TickInput(
            torch.from_numpy(self._slot_S[:num_rows]).to(self._device),
            torch.from_numpy(self._pcm_S_N[:num_rows]).to(self._device),
            torch.from_numpy(self._missing_S[:num_rows]).to(self._device),
            self._frames[:num_rows],
            self._text[:num_rows],
        )
