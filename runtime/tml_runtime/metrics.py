"""What every tick cost: a fixed ring of records, and percentiles of them. Never a mean alone.

The tick thread is the only writer. Readers copy, and drop what may have been overwritten meanwhile.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ._tick import now_ns
from .clock import garbage_collections
from .misses import Reason, parts_ns, skipped_behind, why_missed, why_slept
from .nvtx import Ranges

if TYPE_CHECKING:
    from .model import TickOutput

MAX_STAGES = 24
CLASS_NAMES = ("anchor", "text", "audio", "video", "reply")

# A miss is a tick not done before the next one was due: it ran too long (`missed`), or its time had
# wholly passed and it never ran (`skipped`, counted in the record of the tick that ran next).
# Times are on the runtime's clock, virtual or real; launch, GPU and collections are placed by the
# real time that had passed since `woke_ns`.
RECORD = np.dtype(
    [
        ("tick", np.int64),
        ("scheduled_ns", np.int64),  # when its media window closed
        ("before_done_ns", np.int64),  # when the tick that ran before was done; 0: none did
        ("woke_ns", np.int64),
        ("launched_ns", np.int64),  # when the model's step began; 0: there were no sessions
        ("gpu_start_ns", np.int64),  # 0 on a CPU, and so is the end
        ("gpu_end_ns", np.int64),
        ("done_ns", np.int64),
        ("busy_ns", np.int64),  # real time the step took, on either clock
        ("skipped", np.int32),  # ticks before this one that never ran
        ("rows", np.int32),  # sessions in the batch
        ("bucket_rows", np.int32),  # of the graph that ran, which is padded to them; 0: no graph
        ("bucket_tokens", np.int32),
        ("missing", np.int32),  # of these, sessions whose audio window was not whole
        ("dropped_samples", np.int32),
        ("shed_frames", np.int32),
        ("lost_outputs", np.int32),  # sessions whose output queue was full
        ("faults", np.int32),  # sessions ended by this tick
        ("passes", np.int32),  # over the model's layers
        ("drafts", np.int32),  # output steps that were drafted, of all sessions
        ("drafts_kept", np.int32),  # of these, those that were right
        ("missed", np.bool_),
        ("reason", np.int8),  # of this tick alone: a `misses.Reason`
        ("skip_reason", np.int8),  # of those skipped ticks that the tick before did not hold up
        ("gc_runs", np.int32),  # Python's garbage collections between scheduled and done
        ("gc_ns", np.int64),  # and the time they took there
        ("gc_end_ns", np.int64),  # when the last one ended; 0: there were none
        ("throttle", np.uint64),  # what held the GPU's clocks down when last asked, as NVML says
        ("tokens", np.int32, (len(CLASS_NAMES),)),  # appended in this tick, by class
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
    "passes",
    "drafts",
    "drafts_kept",
)


def percentiles_ms(values_ns: np.ndarray) -> dict[str, float | None]:
    """p50, p99, p99.9 and max in milliseconds; each is a value that occurred (nearest rank)."""
    if values_ns.size == 0:
        return {"p50": None, "p99": None, "p999": None, "max": None}
    quantiles = np.quantile(values_ns, [0.5, 0.99, 0.999, 1.0], method="inverted_cdf")
    p50, p99, p999, largest = (float(value) / 1e6 for value in quantiles)
    return {"p50": p50, "p99": p99, "p999": p999, "max": largest}


def by_class(counts: Iterable[int]) -> dict[str, int]:
    return dict(zip(CLASS_NAMES, map(int, counts), strict=True))


# Upper bounds of the tick histogram, in periods: narrow where the deadline is.
TICK_BOUNDS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0, 1.25, 1.5, 2.0)
WAKE_BOUNDS_MS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)


class Histogram:
    """Counts of values up to each bound, and in the last place of those above all of them.

    >>> histogram = Histogram([10, 20])
    >>> for ns in (10, 11, 21, 35):
    ...     histogram.add(ns)
    >>> histogram.counts.tolist(), histogram.sum_ns
    ([1, 1, 2], 77)
    """

    def __init__(self, bounds_ns: Iterable[int]) -> None:
        self.bounds_ns = tuple(bounds_ns)
        self.counts = np.zeros(len(self.bounds_ns) + 1, np.int64)
        self.sum_ns = 0

    def add(self, ns: int) -> None:
        self.counts[bisect_left(self.bounds_ns, ns)] += 1
        self.sum_ns += ns


class Metrics:
    """The last `capacity` records, and totals over all ticks. 18,000 ticks are an hour of 200 ms.

    The tick thread calls `open`, then `lap` after each stage, `add` and `set_*` for what it counts,
    then `close`, which makes the record visible. Nothing is allocated per tick that stays.
    """

    USUAL = 128  # ticks before a missed one, whose medians tell what is usual

    def __init__(
        self,
        capacity: int = 18_000,
        *,
        period_ns: int = 200_000_000,
        ranges: Ranges | None = None,
    ) -> None:
        assert capacity > 0
        self._records = np.zeros(capacity + 1, RECORD)  # one more: the record being written
        self._record = self._records[0]
        self._period_ns = period_ns
        self._ranges = ranges
        self._stages: dict[str, int] = {}
        self._totals: dict[str, int] = dict.fromkeys(COUNTS, 0)
        self._reasons = np.zeros(len(Reason), np.int64)
        self._tokens = np.zeros(len(CLASS_NAMES), np.int64)
        self._kv_most = np.zeros(len(CLASS_NAMES), np.int64)
        self._kv_dropped = np.zeros(len(CLASS_NAMES), np.int64)
        self._collections = garbage_collections()
        self._gc_before = self._gc_seen = 0  # collections begun by the last close; looked at
        self._begin_ns = self._lap_ns = self._woke_ns = self._done_ns = 0
        self.tick_times = Histogram(round(share * period_ns) for share in TICK_BOUNDS)
        self.wake_times = Histogram(round(ms * 1e6) for ms in WAKE_BOUNDS_MS)
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
        record["before_done_ns"], self._woke_ns = self._done_ns, woke_ns
        self._gc_before = self._gc_seen
        self._note_collections(self._begin_ns - (woke_ns - scheduled_ns), self._begin_ns)
        if self._ranges is not None:
            self._ranges.open(tick)

    def launch(self) -> None:
        """The model's step begins."""
        self._record["launched_ns"] = self._placed(now_ns())
        if self._ranges is not None:
            self._ranges.begin("model")

    def lap(self, stage: str) -> None:
        """The time since the last lap, or since `open`, went to `stage`."""
        lap_ns = now_ns()
        self.set_stage(stage, lap_ns - self._lap_ns)
        self._lap_ns = lap_ns
        if self._ranges is not None:
            self._ranges.lap(stage)

    def set_stage(self, stage: str, ns: int) -> None:
        column = self._stages.get(stage)
        if column is None:
            column = self._stages[stage] = len(self._stages)
            assert column < MAX_STAGES, f"more than {MAX_STAGES} stages: {self.stages}"
        self._record["stage_ns"][column] = ns

    def set_output(self, out: TickOutput) -> None:
        """What the model says of its step."""
        for stage, ns in out.stage_ns.items():
            self.set_stage(f"model.{stage}", ns)
        self.set_tokens(out.tokens)
        self.add("shed_frames", sum(out.shed.values()))
        self.add("passes", out.passes)
        self.add("drafts", out.drafts)
        self.add("drafts_kept", out.drafts_kept)
        if out.gpu_ns is not None and out.bucket is not None:
            self.set_gpu(*out.gpu_ns)
            self.set_bucket(out.bucket.rows, out.bucket.tokens)
        self.set_kv_pages(out.kv_pages, out.kv_dropped)

    def set_gpu(self, start_ns: int, end_ns: int) -> None:
        """When the GPU began and ended the tick's work, on the clock of `_tick.now_ns`."""
        self._record["gpu_start_ns"] = self._placed(start_ns)
        self._record["gpu_end_ns"] = self._placed(end_ns)

    def set_bucket(self, rows: int, tokens: int) -> None:
        """What the graph that ran was captured for."""
        self._record["bucket_rows"], self._record["bucket_tokens"] = rows, tokens

    def set_tokens(self, appended: Sequence[int]) -> None:
        """Tokens that the tick appended to its sessions, in the order of CLASS_NAMES."""
        self._record["tokens"] = appended
        self._tokens += appended

    def set_kv_pages(self, held: Sequence[int], dropped: Sequence[int]) -> None:
        """Pages that the tick's sessions hold and have lost, in the order of CLASS_NAMES."""
        self._record["kv_pages"], self._record["kv_dropped"] = held, dropped
        np.maximum(self._kv_most, held, out=self._kv_most)
        self._kv_dropped += dropped

    def add(self, name: str, amount: int) -> None:
        """Add to one of COUNTS."""
        if amount:
            self._record[name] += amount
            self._totals[name] += amount

    def close(self, *, done_ns: int, deadline_ns: int, throttle: int = 0) -> str | None:
        """Returns what went wrong: "fault", "miss" (also of ticks skipped before), or None."""
        record = self._record
        busy_ns = now_ns() - self._begin_ns
        record["done_ns"], record["busy_ns"], record["throttle"] = done_ns, busy_ns, throttle
        missed = done_ns > deadline_ns
        record["missed"] = missed
        self._note_collections(self._begin_ns, self._begin_ns + busy_ns)
        late_ns = self._woke_ns - int(record["scheduled_ns"])
        self.wake_times.add(late_ns)
        self.tick_times.add(late_ns + busy_ns)
        if missed:
            record["reason"] = reason = self._why_missed()
            self._reasons[reason] += 1
        skipped = int(record["skipped"])
        if skipped:
            self._note_skipped(skipped)
        if self._ranges is not None:
            self._ranges.close()
        self._done_ns = done_ns
        self.count += 1
        return "fault" if record["faults"] else ("miss" if missed or skipped else None)

    def _placed(self, real_ns: int) -> int:
        return self._woke_ns + real_ns - self._begin_ns

    def _note_collections(self, from_ns: int, to_ns: int) -> None:
        """Those begun since the last look, as far as they lie in that stretch of real time."""
        if self._collections.begun == self._gc_seen:
            return
        runs, took_ns, ended_ns = self._collections.between(self._gc_seen, from_ns, to_ns)
        self._gc_seen = self._collections.begun
        if runs:
            self._record["gc_runs"] += runs
            self._record["gc_ns"] += took_ns
            self._record["gc_end_ns"] = self._placed(ended_ns)

    def _why_missed(self) -> Reason:
        num_rows = len(self._records)
        first = max(0, self.count - min(self.USUAL, num_rows - 1))
        rows = slice(first % num_rows, self.count % num_rows + 1)
        if rows.start >= rows.stop:  # the ring has wrapped in between
            rows = np.arange(first, self.count + 1) % num_rows
        records = self._records[rows]  # the last is the record being written
        part_N_A = parts_ns(records, self._stages)
        in_time_N_A = np.sort(part_N_A[~records["missed"]], axis=0)
        middle = len(in_time_N_A) // 2
        usual_A = in_time_N_A[middle] if len(in_time_N_A) else np.zeros_like(part_N_A[-1])
        gc_ns, throttle = int(self._record["gc_ns"]), int(self._record["throttle"])
        return why_missed(part_N_A[-1], usual_A, gc_ns=gc_ns, throttle=throttle)

    def _note_skipped(self, skipped: int) -> None:
        scheduled_ns = int(self._record["scheduled_ns"])
        behind = skipped_behind(
            skipped,
            scheduled_ns=scheduled_ns,
            before_done_ns=int(self._record["before_done_ns"]),
            period_ns=self._period_ns,
        )
        slept_ns = (skipped - behind) * self._period_ns
        due_ns = self._begin_ns - (self._woke_ns - scheduled_ns)  # in real time
        _, gc_ns, _ = self._collections.between(self._gc_before, due_ns - slept_ns, due_ns)
        reason = why_slept(slept_ns, gc_ns)
        self._record["skip_reason"] = reason
        self._reasons[Reason.OVERRUN] += behind
        self._reasons[reason] += skipped - behind

    def records(self, newest: int | None = None) -> np.ndarray:
        """Copy of the records kept, oldest first, or of the `newest` of them: dtype `RECORD`."""
        before, capacity = self.count, len(self._records) - 1
        kept = capacity if newest is None else min(newest, capacity)
        first = max(0, before - kept)
        copy = self._records[np.arange(first, before) % len(self._records)]
        oldest = self.count - capacity  # older ones may have changed during the copy
        return copy[max(0, oldest - first) :]

    def recent_ms(self, newest: int = 120) -> list[float]:
        """What the newest ticks took, oldest first, as `tick_ms` of `report`."""
        records = self.records(newest)
        tick_ns = records["woke_ns"] - records["scheduled_ns"] + records["busy_ns"]
        return (tick_ns / 1e6).round(3).tolist()

    def totals(self) -> dict:
        """What `report` counts over all ticks, without its percentiles."""
        newest, reasons = self.records(newest=1), self._reasons.tolist()
        return {
            "ticks": self.count,
            "misses": sum(reasons),
            "misses_by_reason": {
                reason.name.lower(): reasons[reason] for reason in Reason if reason
            },
            "tokens": by_class(self._tokens),
            "kv_pages": by_class(newest["kv_pages"][-1] if len(newest) else _BLANK["kv_pages"]),
            "kv_pages_most": by_class(self._kv_most),
            "kv_pages_dropped": by_class(self._kv_dropped),
            **self._totals,
        }

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
            **self.totals(),
            "records": len(records),
            "tick_ms": percentiles_ms(wake_ns + records["busy_ns"]),
            "wake_ms": percentiles_ms(wake_ns),
            "stages_ms": {
                name: percentiles_ms(records["stage_ns"][:, column])
                for name, column in list(self._stages.items())
            },
        }
