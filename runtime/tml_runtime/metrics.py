"""What every tick cost: a fixed ring of records, and percentiles of them. Never a mean alone.

The tick thread is the only writer. Readers copy, and drop what may have been overwritten meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ._tick import now_ns

MAX_STAGES = 24
CLASS_NAMES = ("anchor", "text", "audio", "video", "reply")

# A miss is a tick not done before the next one was due: it ran too long (`missed`), or its time had
# wholly passed and it never ran (`skipped`, counted in the record of the tick that ran next).
RECORD = np.dtype(
    [
        ("tick", np.int64),
        ("scheduled_ns", np.int64),  # when its media window closed
        ("woke_ns", np.int64),
        ("done_ns", np.int64),  # woke and done are on the runtime's clock, virtual or real
        ("busy_ns", np.int64),  # real time the step took, on either clock
        ("skipped", np.int32),  # ticks before this one that never ran
        ("rows", np.int32),  # sessions in the batch
        ("missing", np.int32),  # of these, sessions whose audio window was not whole
        ("dropped_samples", np.int32),
        ("shed_frames", np.int32),
        ("lost_outputs", np.int32),  # sessions whose output queue was full
        ("faults", np.int32),  # sessions ended by this tick
        ("missed", np.bool_),
        ("kv_pages", np.int32, (len(CLASS_NAMES),)),  # held in global layers, by class
        ("kv_dropped", np.int32, (len(CLASS_NAMES),)),  # of those, since the record before
        ("stage_ns", np.int64, (MAX_STAGES,)),  # columns as in `Metrics.stages`
    ]
)

_BLANK = np.zeros((), RECORD)
COUNTS = (
    "skipped",
    "rows",
    "missing",
    "dropped_samples",
    "shed_frames",
    "lost_outputs",
    "faults",
)


def percentiles_ms(values_ns: np.ndarray) -> dict[str, float | None]:
    """p50, p99, p99.9 and max in milliseconds; each is a value that occurred (nearest rank)."""
    if values_ns.size == 0:
        return {"p50": None, "p99": None, "p999": None, "max": None}
    quantiles = np.quantile(values_ns, [0.5, 0.99, 0.999, 1.0], method="inverted_cdf")
    p50, p99, p999, largest = (float(value) / 1e6 for value in quantiles)
    return {"p50": p50, "p99": p99, "p999": p999, "max": largest}


def by_class(pages: Iterable[int]) -> dict[str, int]:
    return dict(zip(CLASS_NAMES, map(int, pages), strict=True))


class Metrics:
    """The last `capacity` records, and totals over all ticks. 18,000 ticks are an hour of 200 ms.

    The tick thread calls `open`, then `lap` after each stage and `add` for what it counts, then
    `close`, which makes the record visible. Nothing is allocated per tick.
    """

    def __init__(self, capacity: int = 18_000) -> None:
        assert capacity > 0
        self._records = np.zeros(capacity + 1, RECORD)  # one more: the record being written
        self._record = self._records[0]
        self._stages: dict[str, int] = {}
        self._totals: dict[str, int] = dict.fromkeys(COUNTS, 0)
        self._missed = 0
        self._kv_most = np.zeros(len(CLASS_NAMES), np.int64)
        self._kv_dropped = np.zeros(len(CLASS_NAMES), np.int64)
        self._begin_ns = self._lap_ns = 0
        self.count = 0  # ticks that ran

    @property
    def stages(self) -> tuple[str, ...]:
        """Columns of `stage_ns`, in the order in which they appeared; "a.b" is part of "a"."""
        return tuple(self._stages)

    def open(self, tick: int, *, scheduled_ns: int, woke_ns: int) -> None:
        self._begin_ns = self._lap_ns = now_ns()
        row = self.count % len(self._records)
        self._records[row] = _BLANK
        self._record = record = self._records[row]
        record["tick"], record["scheduled_ns"], record["woke_ns"] = tick, scheduled_ns, woke_ns

    def lap(self, stage: str) -> None:
        """The time since the last lap, or since `open`, went to `stage`."""
        lap_ns = now_ns()
        self.set_stage(stage, lap_ns - self._lap_ns)
        self._lap_ns = lap_ns

    def set_stage(self, stage: str, ns: int) -> None:
        column = self._stages.get(stage)
        if column is None:
            column = self._stages[stage] = len(self._stages)
            assert column < MAX_STAGES, f"more than {MAX_STAGES} stages: {self.stages}"
        self._record["stage_ns"][column] = ns

    def set_kv_pages(self, held: Sequence[int], dropped: Sequence[int]) -> None:
        """Pages that the tick's sessions hold and have lost, in the order of CLASS_NAMES."""
        self._record["kv_pages"], self._record["kv_dropped"] = held, dropped
        np.maximum(self._kv_most, held, out=self._kv_most)
        self._kv_dropped += dropped

    def add(self, name: str, amount: int) -> None:
        """Add to one of COUNTS."""
        self._record[name] += amount
        self._totals[name] += amount

    def close(self, *, done_ns: int, deadline_ns: int) -> None:
        record = self._record
        record["done_ns"], record["busy_ns"] = done_ns, now_ns() - self._begin_ns
        record["missed"] = done_ns > deadline_ns
        self._missed += done_ns > deadline_ns
        self.count += 1

    def records(self) -> np.ndarray:
        """Copy of the records kept, oldest first: a structured array of dtype `RECORD`."""
        before = self.count
        copy = self._records.copy()
        capacity = len(copy) - 1
        oldest = max(0, self.count - capacity)  # older ones may have changed during the copy
        return copy[np.arange(oldest, max(oldest, before)) % len(copy)]

    def report(self) -> dict:
        """Totals over all ticks; percentiles over the records kept.

        `tick_ms` is from the moment a tick was due to the moment its output was out, `wake_ms` how
        late it began. On a virtual clock a tick begins when due and its real duration is reported.
        `kv_pages` is what the newest tick's sessions hold, `kv_pages_most` the most of each class
        that any tick's did, over all sessions.
        """
        records = self.records()
        wake_ns = records["woke_ns"] - records["scheduled_ns"]
        return {
            "ticks": self.count,
            "misses": self._missed + self._totals["skipped"],
            "records": len(records),
            "tick_ms": percentiles_ms(wake_ns + records["busy_ns"]),
            "wake_ms": percentiles_ms(wake_ns),
            "stages_ms": {
                name: percentiles_ms(records["stage_ns"][:, column])
                for name, column in list(self._stages.items())
            },
            "kv_pages": by_class(records["kv_pages"][-1] if len(records) else _BLANK["kv_pages"]),
            "kv_pages_most": by_class(self._kv_most),
            "kv_pages_dropped": by_class(self._kv_dropped),
            **self._totals,
        }
