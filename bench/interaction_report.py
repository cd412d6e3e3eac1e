"""The table and the plots of `bench interaction`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tml_runtime._optional import MissingExtraError, require

from .interaction_score import METRICS, Metric
from .report import text_table

Row = dict[str, Any]


def show(result: dict[str, Any]) -> str:
    """A line for each metric, a column for each row of the result."""
    rows = [row for row in result["rows"] if row["error"] is None]
    lines = [
        "synthetic twins of the published benchmarks; docs/interaction.md has definitions",
        f"cue, weights {result['weights'][:12]} on {result['device']}; {result['episodes']} "
        f"episodes of {result['ticks']} ticks for each of {', '.join(result['tasks'])}",
    ]
    if rows:
        head = ("metric", "better", *map(name, rows))
        lines.append(text_table(head, [_line(metric, rows) for metric in METRICS]))
        lines.append(text_table(("beside it", *map(name, rows)), _beside(rows)))
    for row in result["rows"]:
        if row["error"] is not None:
            lines.append(f"{name(row)}: not measured: {row['error']}")
            continue
        counts = ", ".join(f"{n} {what}" for what, n in row["figures"]["of"].items())
        lines.append(f"{name(row)}: {counts}{_windows(row)}")
    for metric in METRICS:
        lines.append(f"  {metric.name}: {metric.about}")
    period = result["period_ms"]
    lines.append(
        "floor: to the end of the window that a cue is in, when its answer begins in media time;\n"
        f"a tick that takes all of its {period} ms is heard {period} ms later"
    )
    return "\n".join(lines)


def name(row: Row) -> str:
    """ "loss2 x8 60min", or "turn by turn"."""
    if row["system"] == "turns":
        return "turn by turn"
    sessions = f" x{row['sessions']}" if row["sessions"] > 1 else ""
    return f"{row['line']}{sessions}" + (f" {row['minutes']}min" if row["minutes"] else "")


def _line(metric: Metric, rows: Sequence[Row]) -> list[str]:
    cells = [value_text(metric, row["figures"][metric.name]) for row in rows]
    return [metric.name, "more" if metric.up else "less", *cells]


def _beside(rows: Sequence[Row]) -> list[list[str]]:
    """What a figure is to be read against, of the same episodes."""
    named = {"backchannel_due_hz": "backchannels due, 1/s"}
    named |= {f"floor_{q}_s": f"floor of the reactions, {q}" for q in ("p50", "p95", "p99")}
    return [[text, *(_number(row["figures"][key]) for row in rows)] for key, text in named.items()]


def value_text(metric: Metric, value: float | None) -> str:
    if value is None or metric.unit != "%":
        return _number(value)
    return f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _windows(row: Row) -> str:
    if "windows" not in row:
        return ""
    faults = "".join(f"; fault: {fault}" for fault in row["session_faults"])
    return f"; {row['missing_windows']}/{row['windows']} windows not whole{faults}"


def check_plots() -> None:
    """SystemExit without matplotlib, before anything has been run."""
    try:
        require("matplotlib", "draw --plots")
    except MissingExtraError as error:
        raise SystemExit(str(error)) from None


def plots(folder: Path, result: dict[str, Any]) -> list[Path]:
    """One PNG for each metric that has a value. Raises MissingExtraError without matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in result["rows"] if row["error"] is None]
    drawn = []
    for metric in METRICS:
        points = [
            (name(row), row["figures"][metric.name])
            for row in rows
            if row["figures"][metric.name] is not None
        ]
        if points:
            drawn.append(folder / f"{metric.name}.png")
            _plot(drawn[-1], metric, points, _floor(metric, rows))
    return drawn


def _floor(metric: Metric, rows: Sequence[Row]) -> float | None:
    """Of the first row: episodes are the same for all."""
    if not metric.name.startswith("reaction"):
        return None
    return rows[0]["figures"][metric.name.replace("reaction", "floor")]


def _plot(
    path: Path, metric: Metric, points: Sequence[tuple[str, float]], floor: float | None
) -> None:
    figure = require("matplotlib.figure", "plot a metric").Figure((8, 4), dpi=120)
    axes = figure.subplots()
    scale = 100 if metric.unit == "%" else 1
    names, values = zip(*points, strict=True)
    bars = axes.bar(range(len(points)), [scale * value for value in values], color="tab:blue")
    axes.bar_label(bars, [value_text(metric, value) for value in values], fontsize=8)
    axes.set_xticks(range(len(points)), names, rotation=30, ha="right", fontsize=8)
    if floor is not None:
        axes.axhline(floor, color="0.3", linestyle="--", label="floor of ticks")
        axes.legend(fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"{metric.name} ({metric.unit})" if metric.unit else metric.name)
    better = "more" if metric.up else "less"
    axes.set_title(f"{metric.about}; {better} is better\nsynthetic twin", fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
