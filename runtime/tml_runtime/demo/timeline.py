"""timeline.png: a run at a glance. What was heard, seen, spoken, written, kept; what ticks took."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._optional import require
from ..metrics import CLASS_NAMES, percentiles_ms
from ..model.parts import PAGE_ROWS
from .client import Answers, printable
from .decode import SAMPLE_RATE, Clip

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
HEARD, SPOKEN, MISS = "#2f6fab", "#c2561a", "#c81e1e"
ACTIONS = {"delegate": ("^", "#7048a8"), "yield": ("v", "#2d8659")}
# Of the parts of a tick, of which a run that ends in its first tick has fewer.
STAGES = (
    "#9fb3c8", "#2f6fab", "#7cc4a4", "#e3a857", "#b56576", "#8d6a9f", "#52606d", "#c9ced6",
)  # fmt: skip
# In the order of CLASS_NAMES. What is heard and spoken has its own colour in memory, too.
CLASSES = dict(zip(CLASS_NAMES, (INK, "#7b8794", HEARD, "#2d8659", SPOKEN), strict=True))
_MAX_BARS = 400  # more ticks than this share a bar, which shows the slowest of them
_COLUMNS = 900  # of an envelope
_WIDTH_IN = 12.0


@dataclass(frozen=True)
class Timeline:
    """What is drawn. Times are media times of session 0, in seconds."""

    title: str
    note: str
    seconds: float
    period_ms: int
    heard: np.ndarray  # float32 at 16 kHz
    clip: Clip | None
    clip_start_s: float
    spoken: np.ndarray
    answers: Answers
    records: np.ndarray  # Metrics.records, of all sessions
    stages: Sequence[str]
    has_times: bool  # whether what ticks took is drawn; it differs from run to run


def draw_timeline(path: Path, timeline: Timeline) -> None:
    """Write a PNG. The same input on the same machine gives the same bytes."""
    matplotlib = require("matplotlib", "draw timeline.png")
    figure_module = require("matplotlib.figure", "draw timeline.png")
    panels: list[tuple[float, Any]] = [(1.0, _draw_heard)]
    if timeline.clip is not None:
        panels.append((0.85, _draw_seen))
    panels += [(1.0, _draw_spoken), (1.25, _draw_text), (1.2, _draw_memory)]
    if timeline.has_times:
        panels.append((1.5, _draw_ticks))
    style = {"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK}
    with matplotlib.rc_context(style):
        height = 1.15 * sum(share for share, _ in panels) + 1.1
        figure = figure_module.Figure(figsize=(_WIDTH_IN, height), dpi=120, facecolor="white")
        axes = figure.subplots(
            len(panels), 1, sharex=True, squeeze=False,
            gridspec_kw={"height_ratios": [share for share, _ in panels], "hspace": 0.32},
        )[:, 0]  # fmt: skip
        figure.subplots_adjust(left=0.085, right=0.985, top=1 - 0.62 / height, bottom=0.5 / height)
        figure.text(0.015, 1 - 0.27 / height, timeline.title, fontsize=12, weight="bold")
        figure.text(0.985, 1 - 0.27 / height, timeline.note, ha="right", color=FAINT)
        for axis, (_, draw) in zip(axes, panels, strict=True):
            _style(axis, timeline.seconds)
            draw(axis, timeline)
        axes[-1].tick_params(labelbottom=True)
        axes[-1].set_xlabel("media time, s")
        figure.savefig(path, metadata={"Software": None})


def _style(axis: Any, seconds: float) -> None:
    axis.set_xlim(0, seconds)
    axis.set_yticks([])
    axis.set_axisbelow(True)
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    axis.tick_params(length=0, labelcolor=FAINT, labelbottom=False)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(GRID)


def _label(axis: Any, name: str, detail: str, x: float = -0.012) -> None:
    """A panel's name left of it, and one or two short lines below the name."""
    place = {"transform": axis.transAxes, "ha": "right"}
    axis.text(x, 0.56, name, va="bottom", weight="bold", **place)
    axis.text(x, 0.50, detail, va="top", color=FAINT, fontsize=7.5, linespacing=1.3, **place)


def _draw_heard(axis: Any, timeline: Timeline) -> None:
    peak = _envelope(axis, timeline.heard, timeline.seconds, HEARD)
    _label(axis, "hears", f"input level\npeak {peak}")


def _draw_spoken(axis: Any, timeline: Timeline) -> None:
    peak = _envelope(axis, timeline.spoken, timeline.seconds, SPOKEN)
    _label(axis, "speaks", f"output level\npeak {peak}")


def _envelope(axis: Any, pcm: np.ndarray, seconds: float, color: str) -> str:
    """Peaks, and RMS in front of them, filling the panel but for the loudest hundredth, which is
    cut off; returns the level of the loudest moment.
    """
    edges = np.linspace(0, round(seconds * SAMPLE_RATE), _COLUMNS + 1).astype(int)
    padded = np.zeros(max(edges[-1], len(pcm)), np.float64)
    padded[: len(pcm)] = pcm
    peak = np.maximum.reduceat(np.abs(padded), edges[:-1])
    rms = np.sqrt(np.add.reduceat(padded**2, edges[:-1]) / np.diff([*edges[:-1], len(padded)]))
    t = (edges[:-1] + edges[1:]) / 2 / SAMPLE_RATE
    full = 1.1 * float(np.quantile(peak, 0.99)) or 1.0
    for height, alpha in ((peak, 0.30), (rms, 0.95)):
        shown = np.minimum(height / full, 1.0)
        axis.fill_between(t, -shown, shown, color=color, alpha=alpha, linewidth=0)
    axis.set_ylim(-1.05, 1.05)
    return f"{20 * np.log10(peak.max()):.0f} dBFS" if peak.max() > 0 else "silent"


def _draw_seen(axis: Any, timeline: Timeline) -> None:
    """A film strip: each picture is the frame on screen at its left edge."""
    clip = timeline.clip
    assert clip is not None
    box = axis.get_window_extent()
    _, height, width, _ = clip.frames.shape
    share = box.height * width / height / box.width  # of the axis, per picture at full height
    count = max(1, int(1 / share))
    for index in range(count):
        t = index / count * timeline.seconds
        frame = clip.frames[round((timeline.clip_start_s + t) * clip.fps) % len(clip.frames)]
        left, right = t, t + timeline.seconds * min(share * 0.985, 1 / count)
        axis.imshow(frame, extent=(left, right, 0, 1), aspect="auto", interpolation="lanczos")
    axis.set_xlim(0, timeline.seconds)
    axis.set_ylim(0, 1)
    axis.grid(False)
    axis.spines["bottom"].set_visible(False)
    _label(axis, "sees", f"{clip.fps:g} frames/s\n{width}x{height}")


def _draw_text(axis: Any, timeline: Timeline) -> None:
    """The text of each stretch of time, wrapped into its column, and the actions above it."""
    columns, rows, chars = 12, 7, 15
    stretch = timeline.seconds / columns
    for column in range(columns):
        start = column * stretch
        said = [out.text for out in timeline.answers.texts if start <= out.t < start + stretch]
        lines = textwrap.wrap(printable("".join(said)), chars)
        if len(lines) > rows:
            lines = [*lines[: rows - 1], f"{lines[rows - 1][: chars - 1]}…"]
        axis.text(
            start + 0.06 * stretch, 0.74, "\n".join(lines), family="DejaVu Sans Mono", fontsize=6.2,
            va="top", linespacing=1.25, clip_on=True,
        )  # fmt: skip
        axis.axvline(start, color=GRID, linewidth=0.8)
    axis.grid(False)
    for name, (marker, color) in ACTIONS.items():
        times = [out.t for out in timeline.answers.actions if out.name == name]
        axis.plot(times, [0.9] * len(times), marker, color=color, markersize=5, label=name)
    axis.set_ylim(0, 1)
    _label(axis, "writes", "text, actions")
    _legend(axis, 2)


def _draw_memory(axis: Any, timeline: Timeline) -> None:
    """Pages held after every tick, class on class, and above them when pages were dropped."""
    records, held_T_C = timeline.records, timeline.records["kv_pages"]
    t_s = (records["tick"] + 1) * timeline.period_ms / 1000
    t_s, held_T_C = np.append(t_s, timeline.seconds), np.concatenate([held_T_C, held_T_C[-1:]])
    bottom_T = np.zeros(len(held_T_C))
    top = max(1, int(held_T_C.sum(1).max(initial=0)))
    rows = 0
    for c, (name, color) in enumerate(CLASSES.items()):
        if not held_T_C[:, c].any():
            continue
        top_T = bottom_T + held_T_C[:, c]
        axis.fill_between(
            t_s, bottom_T, top_T, step="post", color=color, alpha=0.75, linewidth=0, label=name
        )
        axis.plot(t_s, top_T, drawstyle="steps-post", color="white", linewidth=1.0)
        bottom_T = top_T
        dropped_s = t_s[:-1][records["kv_dropped"][:, c] > 0]
        if len(dropped_s):
            rows += 1
            heights = [(0.98 + 0.15 * rows) * top] * len(dropped_s)
            axis.plot(dropped_s, heights, "|", color=color, markersize=5, markeredgewidth=1.4)
    axis.set_ylim(0, (1.1 + 0.15 * rows) * top)
    axis.set_yticks([0, top])
    dropped = int(records["kv_dropped"].sum())
    axis.text(
        0.0, 1.03, f"{dropped} pages dropped" + (", at the marks" if dropped else ""),
        transform=axis.transAxes, va="bottom", fontsize=8,
    )  # fmt: skip
    _label(axis, "holds", f"pages of\n{PAGE_ROWS} tokens", x=-0.04)
    _legend(axis, len(CLASSES))


def _draw_ticks(axis: Any, timeline: Timeline) -> None:
    records, period_ms = timeline.records, timeline.period_ms
    t_s, parts_ms, missed = tick_bars(records, timeline.stages, period_ms)
    width = min(timeline.seconds / max(1, len(t_s)), 0.8 * period_ms / 1000) * 0.9
    bottom, colors = np.zeros(len(t_s)), STAGES[: len(parts_ms)]
    for (name, part_ms), color in zip(parts_ms.items(), colors, strict=True):
        axis.bar(t_s, part_ms, width, bottom, color=color, label=name, align="edge", linewidth=0)
        bottom += part_ms
    axis.axhline(period_ms, color=MISS, linewidth=1.2)
    crosses = np.full(int(missed.sum()), 1.07 * period_ms)
    axis.plot(t_s[missed] + width / 2, crosses, "x", color=MISS)
    axis.set_ylim(0, 1.15 * period_ms)
    axis.set_yticks([0, period_ms / 2, period_ms])
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    ms = percentiles_ms(records["woke_ns"] - records["scheduled_ns"] + records["busy_ns"])
    above = {"transform": axis.transAxes, "va": "bottom", "fontsize": 8}
    axis.text(0.0, 1.03, f"deadline {period_ms} ms", color=MISS, **above)
    if ms["p50"] is not None:
        misses = int(records["missed"].sum() + records["skipped"].sum())
        text = f"p50 {ms['p50']:.0f}   p99 {ms['p99']:.0f}   p99.9 {ms['p999']:.0f}   "
        text += f"max {ms['max']:.0f} ms   {misses} missed"
        axis.text(0.1, 1.03, text, **above)
    _label(axis, "ticks", "ms each", x=-0.04)
    _legend(axis, len(parts_ms))


def tick_bars(
    records: np.ndarray, stages: Sequence[str], period_ms: int
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """(media time in s, milliseconds by part, whether missed) of each bar, at most _MAX_BARS.

    A bar that stands for several ticks shows the slowest of them, and a miss of any.
    """
    parts_ns = {"wake": records["woke_ns"] - records["scheduled_ns"]}
    split = {name.partition(".")[0] for name in stages if "." in name}
    for column, name in enumerate(stages):
        if name not in split:
            parts_ns[name.partition(".")[2] or name] = records["stage_ns"][:, column]
    total_ns = parts_ns["wake"] + records["busy_ns"]
    parts_ns["other"] = total_ns - sum(parts_ns.values())
    missed = records["missed"] | (records["skipped"] > 0)
    groups = np.array_split(np.arange(len(records)), min(len(records), _MAX_BARS) or 1)
    slowest = np.array([group[np.argmax(total_ns[group])] for group in groups if len(group)], int)
    t_s = (records["tick"][slowest] + 1) * period_ms / 1000
    any_missed = np.array([missed[group].any() for group in groups if len(group)], bool)
    return t_s, {name: ns[slowest] / 1e6 for name, ns in parts_ns.items()}, any_missed


def _legend(axis: Any, columns: int) -> None:
    if not axis.get_legend_handles_labels()[0]:
        return
    axis.legend(
        loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=columns, frameon=False, fontsize=7.5,
        handlelength=1.0, columnspacing=1.2, borderaxespad=0.0, handletextpad=0.5,
    )  # fmt: skip
