"""A combination of `bench sessions` for an hour: what the last minute has that the first had not.

On the virtual clock it takes as long as its ticks do, says nothing about times, and looks at the
cache's invariants after every minute instead of at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tml_runtime import InteractionModel
from tml_runtime.errors import LoopFailed
from tml_runtime.metrics import by_class

from .meter import Meter, broken_invariant, context_held
from .report import text_table
from .sessions_run import Combination, Setting, open_loop

LEAK = 1 << 20  # bytes a minute, in the second half: more is called a leak
LEAST_MINUTES = 10  # for it to be told from noise

Row = dict[str, Any]


def soak(
    model: InteractionModel,
    combination: Combination,
    setting: Setting,
    *,
    minutes: int,
    on_second: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Minutes of media time after the warm-up, each a row, and their summary.

    Raises NobodyAdmitted, and LoopFailed when the loop ends before the first minute does."""
    rows: list[Row] = []
    broken = failure = None
    try:
        with open_loop(model, combination, setting) as loop:
            loop.run(setting.warm_up_s, on_second)
            meter = Meter(loop.runtime, loop.callers, loop.clock, times=setting.realtime)
            for minute in range(1, minutes + 1):
                loop.run(60.0, on_second)
                rows.append({"minute": minute, **meter.lap()})
                if not setting.realtime:  # no tick runs now
                    broken = broken or broken_invariant(loop.runtime)
    except LoopFailed as error:
        if not rows:
            raise
        failure = repr(error.__cause__)
    admitted = loop.admitted()
    faults = admitted["session_faults"]
    broken = broken or broken_invariant(loop.runtime)
    summary = summarize(rows, session_faults=faults, broken=broken, failure=failure)
    context = context_held(loop.runtime)
    return {**combination.report(), **admitted, "context": context, "minutes": rows, **summary}


def summarize(
    rows: Sequence[Row],
    *,
    session_faults: Sequence[str] = (),
    broken: str | None = None,
    failure: str | None = None,
) -> dict[str, Any]:
    """first, last: of the minutes. change: last / first, None where there is no such figure. slope:
    bytes a minute over the second half. rollovers: pages dropped, by class. problems: what must not
    be, empty when all is well; times are not judged."""
    first, last = _figures(rows[0]), _figures(rows[-1])
    slopes = {name: slope(rows, name) for name in ("rss", "gpu_allocated")}
    problems = [f"session fault: {fault}" for fault in session_faults]
    if failure is not None:
        problems.append(f"the loop ended after minute {rows[-1]['minute']}: {failure}")
    if broken is not None:
        problems.append(f"cache invariant: {broken}")
    problems += [f"minute {row['minute']}: no tick ran" for row in rows if row["ticks"] == 0]
    for name, value in slopes.items():
        if value is not None and value > LEAK and len(rows) >= LEAST_MINUTES:
            problems.append(f"{name} grows by {value / 2**20:.2f} MiB a minute")
    dropped = np.sum([list(row["kv_pages_dropped"].values()) for row in rows], axis=0)
    return {
        "first": first,
        "last": last,
        "change": {name: _ratio(last[name], first[name]) for name in first},
        "slope_bytes_per_minute": slopes,
        "rollovers": by_class(dropped),
        "misses": sum(row["misses"] for row in rows),
        "problems": problems,
    }


def slope(rows: Sequence[Row], name: str) -> float | None:
    """Of one memory figure over the second half of the minutes, by least squares; None for fewer
    than three, or where it is not measured.

    >>> rows = [{"minute": m, "memory": {"rss": size}} for m, size in enumerate([9, 9, 1, 3, 5, 7])]
    >>> round(slope(rows, "rss"), 6)
    2.0
    """
    half = rows[len(rows) // 2 :]
    sizes = [row["memory"][name] for row in half]
    if len(half) < 3 or None in sizes:
        return None
    return float(np.polyfit([row["minute"] for row in half], sizes, 1)[0])


def _figures(row: Row) -> dict[str, float | None]:
    tick = row["tick_ms"] or {"p50": None, "p99": None}
    return {
        "tick_p50_ms": tick["p50"],
        "tick_p99_ms": tick["p99"],
        "pages": sum(row["kv_pages"].values()),
        **{name: row["memory"][name] for name in ("rss", "gpu_allocated")},
    }


def _ratio(after: float | None, before: float | None) -> float | None:
    return after / before if after is not None and before else None


def show_soak(result: dict[str, Any]) -> str:
    head = ("minute", "p50", "p99", "max ms", "misses", "missing", "pages", "dropped", "RSS MiB")
    table = [
        (
            str(row["minute"]),
            *_times(row["tick_ms"]),
            str(row["misses"]),
            f"{row['missing_windows']}/{row['windows']}",
            str(sum(row["kv_pages"].values())),
            str(sum(row["kv_pages_dropped"].values())),
            f"{row['memory']['rss'] / 2**20:.1f}",
        )
        for row in result["minutes"]
    ]
    lines = [text_table(head, table), "last minute / first:"]
    for name, ratio in result["change"].items():
        before, after = result["first"][name], result["last"][name]
        if ratio is not None:
            lines.append(f"  {name:14s} {after:.6g} / {before:.6g} = {ratio:.3f}")
    for name, value in result["slope_bytes_per_minute"].items():
        if value is not None:
            lines.append(f"  {name} changes by {value / 1024:+.1f} KiB a minute (second half)")
    dropped = ", ".join(f"{name} {n}" for name, n in result["rollovers"].items() if n)
    lines.append(f"  pages dropped: {dropped or 'none'}; misses: {result['misses']}")
    lines += [f"PROBLEM: {problem}" for problem in result["problems"]]
    return "\n".join(lines)


def _times(tick_ms: dict[str, float | None] | None) -> tuple[str, ...]:
    values = tick_ms or {}
    return tuple(
        "-" if values.get(name) is None else f"{values[name]:.2f}" for name in ("p50", "p99", "max")
    )
