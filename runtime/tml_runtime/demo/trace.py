"""trace.json: a run as Chrome trace events, for Perfetto: ticks, stages, misses, pages held, input,
answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..metrics import by_class
from .client import Client, printable

_PROCESS = 1
_TICKS = 1  # thread ids: ticks, then two rows per session
_FIRST_SESSION = 10
_COUNTS = ("rows", "missing", "dropped_samples", "shed_frames", "lost_outputs", "faults")


def write_trace(
    path: Path,
    *,
    records: np.ndarray,
    stages: Sequence[str],
    clients: Sequence[Client],
    period_ns: int,
    virtual: bool,
    about: dict[str, Any],
) -> None:
    """Write `path`. Times are microseconds from the earliest event, in ascending order.

    records: as `Metrics.records` gives them. On a virtual clock events lie at their media times;
    ticks keep their real durations, and begin later where they would overlap.
    """
    start_ns = _start_ns(records, period_ns)
    events = list(_tick_events(records, stages, period_ns))
    for index, client in enumerate(clients):
        events += _session_events(_FIRST_SESSION + 2 * index, client, start_ns, virtual)
    origin_ns = min((event["ts"] for event in events), default=0)
    for event in events:
        event["ts"] = (event["ts"] - origin_ns) / 1000
        event["pid"] = _PROCESS
    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0)))  # a tick before its stages
    trace = {
        "displayTimeUnit": "ms",
        "otherData": about,
        "traceEvents": [*_names(len(clients)), *events],
    }
    path.write_text(json.dumps(trace), encoding="utf-8")


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


def _start_ns(records: np.ndarray, period_ns: int) -> int:
    """When the window of tick 0 began."""
    if len(records) == 0:
        return 0
    return int(records["scheduled_ns"][0]) - (int(records["tick"][0]) + 1) * period_ns


def _tick_events(
    records: np.ndarray, stages: Sequence[str], period_ns: int
) -> Iterator[dict[str, Any]]:
    free_ns = 0  # when the tick before was done
    shown: dict[str, int] = {}  # the pages that its sessions held
    for record in records:
        tick, busy_ns = int(record["tick"]), int(record["busy_ns"])
        woke_ns = max(int(record["woke_ns"]), free_ns)
        free_ns = woke_ns + busy_ns
        args: dict[str, Any] = {name: int(record[name]) for name in _COUNTS}
        args["late_us"] = int(record["woke_ns"] - record["scheduled_ns"]) / 1000
        yield _span(f"tick {tick}", woke_ns, busy_ns, _TICKS, args)
        for name, begin_ns, duration_ns in stage_spans(record, stages, woke_ns):
            if duration_ns > 0:
                yield _span(name, begin_ns, duration_ns, _TICKS, {})
        if record["missed"]:
            yield _instant("MISS", int(record["scheduled_ns"]) + period_ns, _TICKS, {"tick": tick})
        for skipped in range(tick - int(record["skipped"]), tick):
            due_ns = int(record["scheduled_ns"]) - (tick - skipped - 1) * period_ns
            yield _instant("MISS (skipped)", due_ns, _TICKS, {"tick": skipped})
        held = by_class(record["kv_pages"])
        if held != shown:
            yield _counter("pages held", free_ns, held)
        shown = held
        if record["kv_dropped"].any():
            yield _instant("pages dropped", free_ns, _TICKS, by_class(record["kv_dropped"]))


def _session_events(
    thread: int, client: Client, start_ns: int, virtual: bool
) -> Iterator[dict[str, Any]]:
    for event in client.source.events:
        at_ns = start_ns + event.stamp_ns if virtual else event.pushed_ns
        yield _instant(event.kind, at_ns, thread, {"media_s": event.stamp_ns / 1e9})
    answers = client.answers
    for out in answers.texts:
        args = {"text": printable(out.text), "ids": list(out.ids)}
        yield _instant("text", start_ns + round(out.t * 1e9), thread + 1, args)
    for out in answers.actions:
        yield _instant(out.name, start_ns + round(out.t * 1e9), thread + 1, {})
    for out in answers.speech:
        level = float(np.sqrt(np.mean(np.square(out.pcm, dtype=np.float64))))
        duration_ns = round(len(out.pcm) / out.sample_rate * 1e9)
        begin_ns = start_ns + round(out.t * 1e9)
        yield _span("speech", begin_ns, duration_ns, thread + 1, {"rms": round(level, 6)})


def _names(num_clients: int) -> list[dict[str, Any]]:
    threads = {_TICKS: "ticks"}
    for index in range(num_clients):
        threads[_FIRST_SESSION + 2 * index] = f"session {index} hears and sees"
        threads[_FIRST_SESSION + 2 * index + 1] = f"session {index} says"
    names = [_meta("process_name", 0, "tml-runtime demo")]
    for order, (thread, name) in enumerate(threads.items()):
        names.append(_meta("thread_name", thread, name))
        names.append({**_meta("thread_sort_index", thread, ""), "args": {"sort_index": order}})
    return names


def _meta(kind: str, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": _PROCESS, "tid": thread, "args": {"name": name}}


def _span(name: str, ts: int, dur: int, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": ts, "dur": dur / 1000, "tid": tid, "args": args}


def _instant(name: str, ts: int, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "i", "s": "t", "name": name, "ts": ts, "tid": tid, "args": args}


def _counter(name: str, ts: int, values: dict[str, int]) -> dict[str, Any]:
    return {"ph": "C", "name": name, "ts": ts, "args": values}
