"""The table and the plots of `bench interaction`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tml_runtime._optional import MissingExtraError, require

from .interaction_score import METRICS, Metric
from .report import text_table

Row = dict[str, Any]
COLUMNS = 6  # of a table, and the baseline's


def show(result: dict[str, Any]) -> str:
    """A line for each metric, a column for each row of the result: of many, in tables of COLUMNS
    with the baseline beside each."""
    rows = [row for row in result["rows"] if row["error"] is None]
    lines = [
        "synthetic twins of the published benchmarks; docs/interaction.md has definitions",
        f"cue, weights {result['weights'][:12]} on {result['device']}; {result['episodes']} "
        f"episodes of {result['ticks']} ticks for each of {', '.join(result['tasks'])}",
    ]
    for part in _parts(rows):
        head = ("metric", "better", *map(name, part))
        lines.append(text_table(head, [_line(metric, part) for metric in METRICS]))
        lines.append(text_table(("beside it", *map(name, part)), _beside(part)) + "\n")
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


def _parts(rows: Sequence[Row]) -> list[list[Row]]:
    ticks = [row for row in rows if row["system"] == "ticks"]
    turns = [row for row in rows if row["system"] == "turns"]
    firsts = range(0, len(ticks), COLUMNS)
    return [[*ticks[first : first + COLUMNS], *turns] for first in firsts] or [turns] * bool(turns)


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
    """One PNG for each metric that has a value: bars by line, a colour for each number of sessions
    and age. Raises MissingExtraError without matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in result["rows"] if row["error"] is None]
    drawn = []
    for metric in METRICS:
        if any(row["figures"][metric.name] is not None for row in rows):
            drawn.append(folder / f"{metric.name}.png")
            _plot(drawn[-1], metric, rows)
    return drawn


def _plot(path: Path, metric: Metric, rows: Sequence[Row]) -> None:
    ticks = [row for row in rows if row["system"] == "ticks"]
    lines = list(dict.fromkeys(row["line"] for row in ticks))
    kinds = list(dict.fromkeys(_kind(row) for row in ticks))
    size = (max(8.0, 2.5 + 0.3 * len(lines) * (len(kinds) + 1)), 4.5)
    figure = require("matplotlib.figure", "plot a metric").Figure(size, dpi=120)
    axes = figure.subplots()
    scale, width = 100 if metric.unit == "%" else 1, 0.85 / max(1, len(kinds))
    axes.margins(y=0.2)  # for the values above the bars
    for number, kind in enumerate(kinds):
        shown = [
            row for row in ticks if _kind(row) == kind and row["figures"][metric.name] is not None
        ]
        values = [row["figures"][metric.name] for row in shown]
        shift = (number - (len(kinds) - 1) / 2) * width
        places = [lines.index(row["line"]) + shift for row in shown]
        bars = axes.bar(places, [scale * value for value in values], 0.9 * width, label=kind)
        texts = [value_text(metric, value) for value in values]
        axes.bar_label(bars, texts, fontsize=7, padding=2, rotation=90 if len(kinds) > 2 else 0)
        if metric.name.startswith("reaction"):
            floors = [row["figures"][metric.name.replace("reaction", "floor")] for row in shown]
            text = "floor, of the same cues" if number == 0 else None
            axes.hlines(floors, *_edges(places, width), colors="black", linewidth=2, label=text)
    for row in rows:
        if row["system"] == "turns" and row["figures"][metric.name] is not None:
            value = scale * row["figures"][metric.name]
            axes.axhline(value, color="0.3", linestyle="--", linewidth=1, label=name(row))
    axes.set_xticks(range(len(lines)), lines)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"{metric.name} ({metric.unit})" if metric.unit else metric.name)
    better = "more" if metric.up else "less"
    axes.set_title(f"{metric.about}; {better} is better\nsynthetic twin", fontsize=10)
    figure.legend(fontsize=8, loc="outside lower center", ncols=6, frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(path)


def _kind(row: Row) -> str:
    number = row["sessions"]
    age = f", after {row['minutes']} min" if row["minutes"] else ""
    return f"{number} session{'s' if number > 1 else ''}{age}"


def _edges(places: Sequence[float], width: float) -> tuple[list[float], list[float]]:
    return [place - width / 2 for place in places], [place + width / 2 for place in places]
