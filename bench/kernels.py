"""Which kernels a tick's time on the GPU goes to, as the profiler saw them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

BETWEEN_US = 5000.0
TOP = 25  # kernels shown by name; the others are one row


class Span(NamedTuple):
    """Work of one stream of a GPU, in microseconds of the profiler's clock."""

    name: str
    begin_us: float
    end_us: float


@contextmanager
def profiled() -> Iterator[list[Span]]:
    """What the GPU does meanwhile, in all threads and graphs; filled at the end. Only its own
    clock is used, but what is measured on the host meanwhile is slower."""
    spans: list[Span] = []
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        yield spans
        torch.cuda.synchronize()
    for event in profiler.events() or []:
        if event.device_type.name == "CUDA":
            spans.append(Span(event.name, event.time_range.start, event.time_range.end))
    spans.sort(key=lambda span: span.begin_us)


def ticks_of(spans: Iterable[Span]) -> list[list[Span]]:
    """The spans of each tick: between ticks there is nothing for BETWEEN_US at least."""
    ticks: list[list[Span]] = []
    last_us = -BETWEEN_US
    for span in spans:
        if span.begin_us - last_us >= BETWEEN_US:
            ticks.append([])
        ticks[-1].append(span)
        last_us = max(last_us, span.end_us)
    return ticks


def summary(spans: Iterable[Span]) -> dict[str, Any]:
    """us, calls, busy_us, idle_us: of a tick, on average; idle between its kernels. Spans are in
    order of their begin. The first and the last tick may have been cut by the profiler: they are
    left out where there are three.

    >>> summary([Span("a", 0, 4), Span("b", 5, 8), Span("a", 8, 12)])["kernels"][0]
    {'name': 'a', 'calls': 2.0, 'us': 8.0}
    """
    ticks = ticks_of(spans)
    ticks = ticks[1:-1] if len(ticks) > 2 else ticks
    num_ticks = max(1, len(ticks))
    calls: dict[str, int] = {}
    us: dict[str, float] = {}
    idle_us = 0.0
    for tick in ticks:
        last_us = tick[0].begin_us
        for name, begin_us, end_us in tick:
            calls[name] = calls.get(name, 0) + 1
            us[name] = us.get(name, 0.0) + end_us - begin_us
            idle_us += max(0.0, begin_us - last_us)
            last_us = max(last_us, end_us)
    kernels = [
        {"name": name, "calls": calls[name] / num_ticks, "us": us[name] / num_ticks}
        for name in sorted(us, key=lambda name: -us[name])
    ]
    busy_us = sum(us.values()) / num_ticks
    return {
        "ticks": len(ticks),
        "busy_us": busy_us,
        "idle_us": idle_us / num_ticks,
        "kernels": kernels,
    }


def show(found: dict[str, Any]) -> str:
    if not found["kernels"]:
        return "no kernel ran"
    shown, rest = found["kernels"][:TOP], found["kernels"][TOP:]
    if rest:
        sums = {key: sum(row[key] for row in rest) for key in ("calls", "us")}
        shown = [*shown, {"name": f"{len(rest)} others", **sums}]
    lines = [
        f"of {found['ticks']} ticks, each: {found['busy_us'] / 1000:.3f} ms in kernels and copies, "
        f"{found['idle_us'] / 1000:.3f} ms between them",
        f"{'kernel':60} {'calls':>8} {'us':>10} {'us each':>9} {'part':>6}",
    ]
    for row in shown:
        lines.append(
            f"{row['name'][:60]:60} {row['calls']:8.1f} {row['us']:10.1f} "
            f"{row['us'] / row['calls']:9.2f} {row['us'] / found['busy_us']:6.1%}"
        )
    return "\n".join(lines)
