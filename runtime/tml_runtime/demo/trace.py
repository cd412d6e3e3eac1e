"""trace.json: a run for Perfetto: its ticks, and what each session heard, saw and answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..perfetto import FIRST_FREE, Event, instant, sample_events, span, tick_events
from ..perfetto import write_trace as write_events
from .client import Client, printable


def write_trace(
    path: Path,
    *,
    records: np.ndarray,
    stages: Sequence[str],
    samples: np.ndarray,
    clients: Sequence[Client],
    period_ns: int,
    virtual: bool,
    about: dict[str, Any],
) -> None:
    """Write `path`. On a virtual clock a session's events lie at their media times.

    records, samples: as `Metrics.records` and `Runtime.gpu_samples` give them.
    """
    start_ns = _start_ns(records, period_ns)
    events = [*tick_events(records, stages, period_ns), *sample_events(samples)]
    threads = {}
    for index, client in enumerate(clients):
        thread = FIRST_FREE + 2 * index
        threads[thread] = f"session {index} hears and sees"
        threads[thread + 1] = f"session {index} says"
        events += _session_events(thread, client, start_ns, virtual)
    write_events(path, events, about=about, process="tml-runtime demo", threads=threads)


def _start_ns(records: np.ndarray, period_ns: int) -> int:
    """When the window of tick 0 began."""
    if len(records) == 0:
        return 0
    return int(records["scheduled_ns"][0]) - (int(records["tick"][0]) + 1) * period_ns


def _session_events(thread: int, client: Client, start_ns: int, virtual: bool) -> Iterator[Event]:
    for event in client.source.events:
        at_ns = start_ns + event.stamp_ns if virtual else event.pushed_ns
        yield instant(event.kind, at_ns, thread, {"media_s": event.stamp_ns / 1e9})
    answers = client.answers
    for out in answers.texts:
        args = {"text": printable(out.text), "ids": list(out.ids)}
        yield instant("text", start_ns + round(out.t * 1e9), thread + 1, args)
    for out in answers.actions:
        yield instant(out.name, start_ns + round(out.t * 1e9), thread + 1, {})
    for out in answers.speech:
        level = float(np.sqrt(np.mean(np.square(out.pcm, dtype=np.float64))))
        duration_ns = round(len(out.pcm) / out.sample_rate * 1e9)
        begin_ns = start_ns + round(out.t * 1e9)
        yield span("speech", begin_ns, duration_ns, thread + 1, {"rms": round(level, 6)})
