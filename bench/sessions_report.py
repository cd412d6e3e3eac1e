"""The table and the plot of `bench sessions`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tml_runtime._optional import require

from .machine import describe
from .models import describe_model
from .report import text_table

HEAD = (
    "sessions", "open", "video", "line", "p50", "p99", "p99.9", "max ms", "misses", "per M",
    "turn p50", "p95", "p99 ms", "missing", "shed", "J/min", "tokens", "GB",
)  # fmt: skip

Row = dict[str, Any]


def show(result: dict[str, Any]) -> str:
    lines = [
        describe(result["machine"], result["clocks"]),
        f"{describe_model(result)}, period {result['period_ms']} ms, {result['seconds']:g} s each",
        text_table(HEAD, [_cells(row) for row in result["rows"]]),
    ]
    for row in result["rows"]:
        name = f"{row['sessions']} sessions, {row['video']}, {row['profile']}"
        if row["error"] is not None:
            lines.append(f"{name}: not measured: {row['error']}")
            continue
        reasons = [f"{n} {why}" for why, n in row["misses_by_reason"].items() if n]
        refused = [f"{n} refused for {why}" for why, n in row["refused"].items()]
        wrong = [f"fault: {fault}" for fault in row["session_faults"]]
        if row["broken_invariant"] is not None:
            wrong.append(f"cache invariant: {row['broken_invariant']}")
        if notes := [*(["misses: " + ", ".join(reasons)] if reasons else []), *refused, *wrong]:
            lines.append(f"{name}: {'; '.join(notes)}")
    lines.append(
        "open: sessions admitted; per M: misses per million ticks due; turn: end of a window to "
        "its speech polled;\nmissing: windows not whole; J/min: the GPU's energy per session and "
        "minute; tokens: held in global layers; GB: the GPU's peak, or resident"
    )
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    name = (str(row["sessions"]), str(row.get("opened", 0)), row["video"], row["profile"])
    if row["error"] is not None:
        return (*name, *["-"] * (len(HEAD) - len(name)))
    tick, turn = row["tick_ms"] or {}, row["turn_ms"] or {}
    gpu, memory, context = row["gpu"] or {}, row["memory"], row["context"]
    size = memory["rss"] if memory["gpu_peak"] is None else memory["gpu_peak"]
    return (
        *name,
        *(_number(tick.get(q), 2) for q in ("p50", "p99", "p999", "max")),
        str(row["misses"]),
        _number(row["misses_per_million"], 0),
        *(_number(turn.get(q), 1) for q in ("p50", "p95", "p99")),
        f"{row['missing_windows']}/{row['windows']}",
        str(row["shed_frames"]),
        _number(gpu.get("energy_j_per_session_minute"), 0),
        "-" if context is None else str(sum(context["tokens"].values())),
        f"{size / 1e9:.2f}",
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def series(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """(sessions that were open, p99.9 in ms) of each kind of video and line."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["error"] is None and row["tick_ms"] and row["tick_ms"]["p999"] is not None:
            name = f"video {row['video']}, {row['profile']}"
            lines.setdefault(name, []).append((row["opened"], row["tick_ms"]["p999"]))
    return {name: sorted(points) for name, points in lines.items()}


def plot(path: Path, result: dict[str, Any]) -> None:
    """Sessions against the tick's p99.9, with a line where the period ends. PNG, SVG or PDF, by the
    file's name. Raises MissingExtraError without matplotlib."""
    figure = require("matplotlib.figure", "plot sessions against p99.9").Figure((8, 5), dpi=120)
    axes = figure.subplots()
    lines = series(result["rows"])
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.axhline(result["period_ms"], color="0.3", linestyle="--", label="period")
    if counts := sorted({sessions for points in lines.values() for sessions, _ in points}):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("sessions")
    axes.set_ylabel("tick, p99.9 in ms")
    gpu = result["machine"]["gpu"]
    where = result["machine"]["cpu"] if gpu is None else gpu["name"]
    axes.set_title(f"{describe_model(result)}\n{where}, {result['seconds']:g} s each", fontsize=10)
    axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
