"""The tick thread's parts: clock, rings, layout, patches, schedule, thread.

Times are CLOCK_MONOTONIC ns.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from typing_extensions import Buffer

def now_ns() -> int: ...

class Ring:
    """A bounded queue of byte messages, lock-free between one producer and one consumer thread.

    Holds `capacity_bytes` rounded up to a power of two (at most 2**31); a message costs its length
    and 4 bytes. Neither side waits. Python threads may share a side: the GIL makes them take turns.
    """

    def __init__(self, capacity_bytes: int) -> None: ...
    def push(self, *data: Buffer) -> bool:
        """Copies the bytes in as one message; False, and `dropped` counts it, where there is no
        room now.

        ValueError for more than `max_message` bytes, which would never fit.
        """

    def pop(self) -> bytes | None:
        """The oldest message, or None."""

    def __len__(self) -> int:
        """Messages inside."""

    @property
    def capacity(self) -> int: ...
    @property
    def max_message(self) -> int: ...
    @property
    def dropped(self) -> int: ...

class AudioWindows:
    """Samples (float32) of one session by media time, in windows of `num_samples`; `num_windows` of
    them are open, from the oldest one not taken on. Where pieces overlap, the one written last
    wins. For one thread. ValueError for what lies beyond the open windows.
    """

    def __init__(self, num_windows: int, num_samples: int) -> None: ...
    def forget_before(self, window: int) -> int:
        """Close the windows before `window` untaken; returns how many samples that drops."""

    def write(self, start: int, pcm: Buffer) -> int:
        """Put samples at sample `start`; returns how many of them fall in a closed window."""

    def drain(self, ring: Ring, max_pieces: int) -> int:
        """`write` for the messages in a ring: each is its first sample, int64, and its samples."""

    def take(self, pcm: Buffer, have: Buffer) -> int:
        """Copy the oldest open window out and close it; returns how many samples nobody wrote.

        have: one byte a sample, 1 where somebody wrote it. The others are zeros.
        """

class TickLayout:
    """Writes where a tick's tokens lie to arrays that `tml_runtime.model.buffers` describes, int32
    and int64 as there; csrc/tick/tick_layout.h has an example. For one thread.

    kinds: the TokenKind of a row's runs in the first pass over the layers, the output step last.
    ValueError for arrays whose sizes or types do not go together.
    """

    def __init__(
        self,
        kinds: Sequence[int],
        *,
        kind_T: np.ndarray,
        index_T: np.ndarray,
        slot_S: np.ndarray,
        start_S1: np.ndarray,
        at_S: np.ndarray,
        last_S: np.ndarray,
        length_O_S: np.ndarray,
        said_N: np.ndarray,
        steps_N: np.ndarray,
        tokens_S_A: np.ndarray,
        column_S_A: np.ndarray,
        position_Z: np.ndarray,
    ) -> None: ...
    def fill(self, slots: Sequence[int], counts: np.ndarray, ids: Sequence[int]) -> None:
        """All arrays but `length_O_S`, of rows in these slots. counts: int64 [S, R], tokens of each
        run, the last of which are all output steps. ids: of the text of all rows.

        ValueError, with nothing changed, for more than there is room for.
        """

    def set_lengths(self) -> None:
        """`length_O_S`, once `position_Z` has the positions of the tokens of the last `fill`."""

def cut_patches(frames: Sequence[np.ndarray], columns: int, out: np.ndarray) -> None:
    """Cut frames, contiguous uint8 [H, W, 3], into rows of `columns` patches, to contiguous uint8
    [P, L, side, side, 3]: by groups of L frames, by row, then by column. What lies beyond a frame
    is 0.

    ValueError for shapes that do not go together; pixels beyond the patches are left out.
    """

class Schedule:
    """When ticks run and which are late, for any clock: the caller says what time it is.

    Tick n runs at start + (n + 1) * period and is missed when not done by start + (n + 2) * period.
    A tick whose time has wholly passed before it began is skipped, and is a miss.
    """

    def __init__(self, start_ns: int, period_ns: int) -> None: ...
    def wake_ns(self, tick: int) -> int: ...
    def deadline_ns(self, tick: int) -> int: ...
    def begin(self, now_ns: int) -> tuple[int, int]:
        """(tick to run now, how many directly before it are skipped).

        ValueError before `next_wake_ns`; RuntimeError while a tick has not ended.
        """

    def end(self, now_ns: int, failed: bool = False) -> bool:
        """Whether the tick that began last is missed: late or failed."""

    @property
    def start_ns(self) -> int: ...
    @property
    def period_ns(self) -> int: ...
    @property
    def next_wake_ns(self) -> int: ...
    @property
    def next_tick(self) -> int: ...
    @property
    def ticks(self) -> int:
        """All that are over: run or skipped."""

    @property
    def misses(self) -> int:
        """Of these: late, failed or skipped."""

    @property
    def skipped(self) -> int:
        """Of these: never run."""

class TickRecord(NamedTuple):
    """One tick that ran. Ticks `tick - skipped` to `tick - 1` never ran, and are missed too."""

    tick: int
    scheduled_ns: int  # start + (tick + 1) * period, exactly
    woke_ns: int  # >= scheduled_ns; the step begins once it also has the GIL
    done_ns: int
    missed: bool  # done after scheduled_ns + period, or failed
    skipped: int

class TickThread:
    """Calls `step(tick)` on a thread of its own, at the times of a Schedule that starts at start().

    The thread sleeps until `spin_ns` before the time, then spins. `priority` 1..99 asks for
    SCHED_FIFO, or else for a lower nice value; `scheduling` tells what was granted. At least
    `max_records` records wait for drain(); newer ones that find no room are dropped and counted in
    `records_dropped`, while the counters go on.

    A step that raises ends the thread: stop() raises its exception, and so does drain() once the
    records are drained.
    """

    def __init__(
        self,
        step: Callable[[int], object],
        period_ns: int,
        *,
        spin_ns: int = 500_000,
        priority: int = 0,
        max_records: int = 4096,
    ) -> None: ...
    def start(self) -> None:
        """Once in a lifetime: RuntimeError after that, and after stop()."""

    def stop(self) -> None:
        """From any thread, any number of times: no step runs after it returned.

        Within the step it only asks. The interpreter stops a running thread when it exits.
        """

    def drain(self) -> list[TickRecord]:
        """Takes the records of the ticks that ran since the last call."""

    @property
    def start_ns(self) -> int: ...
    @property
    def ticks(self) -> int:
        """All that are over: run or skipped."""

    @property
    def misses(self) -> int:
        """Of these: late, failed or skipped."""

    @property
    def skipped(self) -> int:
        """Of these: never run."""

    @property
    def records_dropped(self) -> int: ...
    @property
    def running(self) -> bool: ...
    @property
    def scheduling(self) -> str: ...
