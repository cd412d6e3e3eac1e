"""Ticks as Chrome trace events, which Perfetto and chrome://tracing show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .blackbox import BlackBox
from .gpu import throttle_names
from .loop import Runtime
from .metrics import by_class
from .misses import Reason, skipped_behind

Event = dict[str, Any]

_PROCESS = 1
TICKS, GPU, COLLECTIONS = 1, 2, 3  # thread ids; those from FIRST_FREE on are a caller's
FIRST_FREE = 10
_NAMES = {TICKS: "ticks", GPU: "GPU", COLLECTIONS: "garbage collections"}
_COUNTS = ("rows", "missing", "dropped_samples", "shed_frames", "lost_outputs", "faults")
_READINGS = {  # counter: (field of a sample, its unit)
    "GPU power": ("power_w", "W"),
    "GPU clock": ("sm_mhz", "MHz"),
    "GPU temperature": ("temperature_c", "°C"),
    "GPU memory": ("memory_used_bytes", "bytes"),
}


def span(name: str, ts: int, dur: int, tid: int, args: dict[str, Any]) -> Event:
    """Times of events are ns until `write_trace` writes them."""
    return {"ph": "X", "name": name, "ts": ts, "dur": dur / 1000, "tid": tid, "args": args}


def instant(name: str, ts: int, tid: int, args: dict[str, Any]) -> Event:
    return {"ph": "i", "s": "t", "name": name, "ts": ts, "tid": tid, "args": args}


def counter(name: str, ts: int, values: Mapping[str, float]) -> Event:
    return {"ph": "C", "name": name, "ts": ts, "args": dict(values)}


def write_trace(
    path: Path,
    events: Iterable[Event],
    *,
    about: dict[str, Any],
    process: str = "tml-runtime",
    threads: Mapping[int, str] | None = None,
) -> None:
    """Write `path`. Times are microseconds from the earliest event, in ascending order.

    threads: names of a caller's own, by id. Raises OSError.
    """
    found = list(events)
    origin_ns = min((event["ts"] for event in found), default=0)
    for event in found:
        event["ts"] = (event["ts"] - origin_ns) / 1000
        event["pid"] = _PROCESS
    found.sort(key=lambda event: (event["ts"], -event.get("dur", 0)))  # a tick before its stages
    used = {TICKS, *(event["tid"] for event in found if "tid" in event)}
    names = {thread: name for thread, name in _NAMES.items() if thread in used} | dict(
        threads or {}
    )
    trace = {
        "displayTimeUnit": "ms",
        "otherData": about,
        "traceEvents": [*_meta_events(process, names), *found],
    }
    path.write_text(json.dumps(trace), encoding="utf-8")


def write_runtime(path: Path, runtime: Runtime) -> None:
    """Write the trace of all ticks that `runtime` has records of. Raises OSError."""
    period_ns = runtime.layout.period_ms * 1_000_000
    ticks = tick_events(runtime.metrics.records(), runtime.metrics.stages, period_ns)
    write_trace(path, [*ticks, *sample_events(runtime.gpu_samples)], about=runtime.status())


def write_black_box(path: Path, box: BlackBox) -> None:
    """Write the trace of a black box. Raises OSError."""
    about = {"cause": box.cause, "tick": box.tick, "error": box.error}
    write_trace(
        path,
        [*tick_events(box.records, box.stages, box.period_ns), *sample_events(box.samples)],
        about=about | {"sessions": box.sessions, "report": box.report, "config": box.config},
    )


def stage_spans(
    record: np.void, stages: Sequence[str], begin_ns: int
) -> Iterator[tuple[str, int, int]]:
    """(name, begin ns, duration ns) of each stage of a tick that begins at `begin_ns`, in turn.

    "model.prefill" is a part of "model" and lies within it.
    """
    durations = {name: int(record["stage_ns"][i]) for i, name in enumerate(stages)}
    for name in (name for name in stages if "." not in name):
        yield name, begin_ns, durations[name]
        part_ns = begin_ns
        for part in (part for part in stages if part.startswith(f"{name}.")):
            yield part, part_ns, durations[part]
            part_ns += durations[part]
        begin_ns += durations[name]


def tick_events(records: np.ndarray, stages: Sequence[str], period_ns: int) -> Iterator[Event]:
    """Of `Metrics.records`: ticks with stages, GPU, collections, misses, sessions, pages held.

    On a virtual clock ticks keep their real durations, and begin later where they would overlap.
    """
    free_ns = 0  # when the tick before was done
    shown: dict[str, dict[str, int]] = {}  # what the counters say
    for record in records:
        woke_ns = max(int(record["woke_ns"]), free_ns)
        free_ns = woke_ns + int(record["busy_ns"])
        args: dict[str, Any] = {name: int(record[name]) for name in _COUNTS}
        args["late_us"] = int(record["woke_ns"] - record["scheduled_ns"]) / 1000
        args["tokens"] = by_class(record["tokens"])
        yield span(f"tick {record['tick']}", woke_ns, free_ns - woke_ns, TICKS, args)
        for name, begin_ns, duration_ns in stage_spans(record, stages, woke_ns):
            if duration_ns > 0:
                yield span(name, begin_ns, duration_ns, TICKS, {})
        yield from _machine_events(record, woke_ns - int(record["woke_ns"]))
        yield from _miss_events(record, period_ns)
        counters = {
            "sessions": {"sessions": int(record["rows"])},
            "pages held": by_class(record["kv_pages"]),
        }
        for name, values in counters.items():
            if values != shown.get(name, dict.fromkeys(values, 0)):
                yield counter(name, free_ns, values)
        shown = counters
        if record["kv_dropped"].any():
            yield instant("pages dropped", free_ns, TICKS, by_class(record["kv_dropped"]))


def sample_events(samples: np.ndarray) -> Iterator[Event]:
    """Of `GpuSampler.samples`: counters, and what held clocks down whenever that changed."""
    throttle = 0
    for sample in samples:
        t_ns = int(sample["t_ns"])
        for name, (field, unit) in _READINGS.items():
            yield counter(name, t_ns, {unit: sample[field].item()})
        if int(sample["throttle"]) != throttle:
            throttle = int(sample["throttle"])
            why = ", ".join(throttle_names(throttle)) or "nothing"
            yield instant(f"clocks held by {why}", t_ns, GPU, {"mask": hex(throttle)})


def _machine_events(record: np.void, moved_ns: int) -> Iterator[Event]:
    """`moved_ns`: how much later than it woke the tick is shown."""
    if record["gpu_end_ns"] > 0:
        begin_ns, end_ns = int(record["gpu_start_ns"]), int(record["gpu_end_ns"])
        args = {
            "bucket": [int(record["bucket_rows"]), int(record["bucket_tokens"])],
            "launch_gap_us": (begin_ns - int(record["launched_ns"])) / 1000,
        }
        yield span(f"tick {record['tick']}", begin_ns + moved_ns, end_ns - begin_ns, GPU, args)
    if record["gc_runs"] > 0:
        duration_ns = int(record["gc_ns"])
        begin_ns = int(record["gc_end_ns"]) - duration_ns + moved_ns
        runs = int(record["gc_runs"])
        yield span("collection", begin_ns, duration_ns, COLLECTIONS, {"runs": runs})


def _miss_events(record: np.void, period_ns: int) -> Iterator[Event]:
    tick, scheduled_ns = int(record["tick"]), int(record["scheduled_ns"])
    if record["missed"]:
        reason = Reason(int(record["reason"])).name.lower()
        args = {"tick": tick, "reason": reason}
        yield instant(f"MISS: {reason}", scheduled_ns + period_ns, TICKS, args)
    skipped = int(record["skipped"])
    behind = skipped_behind(
        skipped,
        scheduled_ns=scheduled_ns,
        before_done_ns=int(record["before_done_ns"]),
        period_ns=period_ns,
    )
    for i in range(skipped):
        reason = Reason.OVERRUN if i < behind else Reason(int(record["skip_reason"]))
        due_ns = scheduled_ns - (skipped - i - 1) * period_ns
        args = {"tick": tick - skipped + i, "reason": reason.name.lower()}
        yield instant(f"MISS: skipped, {args['reason']}", due_ns, TICKS, args)


def _meta_events(process: str, threads: Mapping[int, str]) -> Iterator[Event]:
    yield _meta("process_name", 0, {"name": process})
    for order, (thread, name) in enumerate(threads.items()):
        yield _meta("thread_name", thread, {"name": name})
        yield _meta("thread_sort_index", thread, {"sort_index": order})


def _meta(kind: str, thread: int, args: dict[str, Any]) -> Event:
    return {"ph": "M", "name": kind, "pid": _PROCESS, "tid": thread, "args": args}
