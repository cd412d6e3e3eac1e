"""The picture of a session's memory: its whole life on top, its last seconds token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._optional import require
from ..model.parts import PAGE_ROWS
from .memory import LANES, LOCAL, Memory, Page, simulate_memory
from .prepare import TIMED, Options
from .timeline import CLASSES, FAINT, GRID, INK

ZOOM = "#f2c94c"
COLORS = CLASSES | {LOCAL: "#7048a8"}
_WIDTH_IN, _HEIGHT_IN = 12.0, 7.4
_TALL = 0.56  # of a lane
_LABEL_SHARE = 0.055  # a page narrower than this share of its panel has no label, but open ones
_LEAST_SHARE = 0.0015  # of the upper panel, for a page to be seen


def draw_memory(path: Path, options: Options) -> None:
    """Write a PNG, whatever `path` ends in, of what a session holds after `options.seconds`.

    The same options on the same machine give the same bytes.
    """
    matplotlib = require("matplotlib", "draw a session's memory")
    figure_module = require("matplotlib.figure", "draw a session's memory")
    memory = simulate_memory(options)
    style = {"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK}
    with matplotlib.rc_context(style):
        figure = figure_module.Figure((_WIDTH_IN, _HEIGHT_IN), dpi=100, facecolor="white")
        grid = {"height_ratios": [1.0, 1.25], "hspace": 0.36}
        whole, near = figure.subplots(2, 1, gridspec_kw=grid)
        figure.subplots_adjust(left=0.115, right=0.985, top=0.88, bottom=0.04)
        _draw_title(figure, memory)
        zoom = _zoom(memory)
        _draw_whole(whole, memory, zoom)
        _draw_near(near, memory, zoom)
        _connect(whole, near, (zoom[0], memory.length))
        _draw_key(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", metadata={"Software": None})


def _zoom(memory: Memory) -> tuple[float, float]:
    """Positions of the lower panel: all that is held of what comes with the clock, and what was
    dropped of it last."""
    oldest = [memory.held[lane][0] for lane in TIMED if memory.held[lane]]
    oldest += [memory.dropped[lane][-1] for lane in TIMED if memory.dropped[lane]]
    first = min((int(page.position_T[0]) for page in oldest), default=0)
    return first - 0.02 * (memory.length - first), memory.length + 0.05 * (memory.length - first)


def _draw_title(figure: Any, memory: Memory) -> None:
    whole_minutes = memory.seconds % 60 == 0
    after = f"{memory.seconds / 60:g} minutes" if whole_minutes else f"{memory.seconds:g} seconds"
    held = sum(len(page.position_T) for lane in CLASSES for page in memory.held[lane])
    local = sum(len(page.position_T) for page in memory.held[LOCAL])
    figure.text(0.015, 0.963, f"A session's pages after {after}", fontsize=12, weight="bold")
    line = f"preset {memory.preset}: {memory.length:,} tokens so far, of which the global layers "
    line += f"hold {held:,} and the local layers {local:,}"
    figure.text(0.015, 0.935, line, color=FAINT)


def _draw_whole(axis: Any, memory: Memory, zoom: tuple[float, float]) -> None:
    right = memory.length * 1.003
    _style(axis, memory, LANES, (0.0, right))
    for y, lane in enumerate(LANES):
        _draw_dropped_stretch(axis, y, lane, memory)
        for page in memory.held[lane]:
            look = {"facecolor": COLORS[lane], "edgecolor": "white", "linewidth": 0.4}
            _box(axis, y, page, at_least=_LEAST_SHARE * right, **look)
    prompt = sum(len(page.position_T) for page in memory.held["anchor"])
    axis.text(
        0.008 * right, 0, f"the prompt, {prompt} tokens", va="center", color=FAINT, fontsize=8
    )
    axis.axvspan(max(0.0, zoom[0]), memory.length, color=ZOOM, alpha=0.28, zorder=0.5)
    _time_axis(axis, memory, "minute", 60.0)


def _connect(whole: Any, near: Any, stretch: tuple[float, float]) -> None:
    """The stretch's ends in the upper panel and in the lower one; between the numbers of both."""
    patches = require("matplotlib.patches", "draw a session's memory")
    for at in stretch:
        line = patches.ConnectionPatch(
            (at, -0.11), (at, 1.09), whole.get_xaxis_transform(), near.get_xaxis_transform(),
            color="#d9b53f", linewidth=0.9,
        )  # fmt: skip
        whole.figure.add_artist(line)


def _draw_dropped_stretch(axis: Any, y: float, lane: str, memory: Memory) -> None:
    dropped = memory.dropped[lane]
    if not dropped:
        return
    first, last = dropped[0].position_T[0], dropped[-1].position_T[-1]
    axis.broken_barh(
        [(first, last - first)], (y - _TALL / 2, _TALL), facecolor="#f5f6f8",
        edgecolor="#cbd2d9", linestyle=(0, (3, 2)), linewidth=0.8,
    )  # fmt: skip
    text = f"{len(dropped)} pages dropped"
    axis.text(first + 0.01 * memory.length, y, text, va="center", color=FAINT, fontsize=8)


def _draw_near(axis: Any, memory: Memory, zoom: tuple[float, float]) -> None:
    lanes = [lane for lane in LANES if any(p.position_T[-1] > zoom[0] for p in memory.held[lane])]
    _style(axis, memory, lanes, zoom)
    window = memory.length - memory.window
    for y, lane in enumerate(lanes):
        dashes = {"edgecolor": "#9aa5b1", "linestyle": (0, (3, 2)), "linewidth": 0.9}
        for page in memory.dropped[lane]:
            _box(axis, y, page, facecolor="#f5f6f8", **dashes)
        for page in memory.held[lane]:
            _box(axis, y, page, facecolor="white", edgecolor="none")
            if lane == LOCAL:
                _tokens(axis, y, page.position_T[page.position_T < window], lane, 0.35)
                _tokens(axis, y, page.position_T[page.position_T >= window], lane, 0.9)
            else:
                _tokens(axis, y, page.position_T, lane, 0.8)
            width = 2.0 if page.is_open else 0.9
            _box(axis, y, page, facecolor="none", edgecolor=COLORS[lane], linewidth=width)
            if lane != LOCAL:
                rows = f"{len(page.position_T)}"
                _label(axis, y, page, zoom, f"open: {rows}" if page.is_open else rows, COLORS[lane])
        if lane != LOCAL:
            for page in memory.dropped[lane]:
                _label(axis, y, page, zoom, "dropped", FAINT)
    _label_window(axis, lanes.index(LOCAL) - _TALL / 2 - 0.04, memory)
    axis.axvline(memory.length, color=INK, linewidth=1.0)
    axis.text(memory.length, 0.5 * (len(lanes) - 1), " now", va="center", fontsize=8)
    _time_axis(axis, memory, "second", 1.0)


def _label_window(axis: Any, y: float, memory: Memory) -> None:
    """How far the local layers look back, and how much more they keep."""
    text = f"a window of {memory.window}, and {memory.rewind} more for rewinds"
    look = {"ha": "right", "va": "bottom", "fontsize": 7.5, "color": COLORS[LOCAL]}
    axis.text(memory.length, y, text, **look)


def _style(axis: Any, memory: Memory, lanes: Sequence[str], limits: tuple[float, float]) -> None:
    """Lane n is at y = n, from the top down."""
    axis.set_xlim(*limits)
    axis.set_ylim(len(lanes) - 0.5, -0.62)
    axis.set_yticks([])
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelcolor=FAINT)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(GRID)
    _axis_name(axis, 0.0, "position", "top")
    for y, lane in enumerate(lanes):
        place = {"transform": axis.get_yaxis_transform(), "ha": "right", "x": -0.01}
        axis.text(y=y - 0.02, s=lane, va="bottom", weight="bold", color=COLORS[lane], **place)
        detail = _detail(memory, lane)
        axis.text(y=y + 0.04, s=detail, va="top", color=FAINT, fontsize=7.5, **place)


def _detail(memory: Memory, lane: str) -> str:
    held = len(memory.held[lane])
    if lane == LOCAL:
        return f"{held} pages, a ring"
    suffix = ", pinned" if lane == "anchor" else ""
    return f"{held} of {memory.budget[lane]} pages{suffix}"


def _box(axis: Any, y: float, page: Page, *, at_least: float = 0.0, **look: Any) -> None:
    """From the page's first token to its last."""
    first, last = page.position_T[0], page.position_T[-1]
    width = max(at_least, last - first + 1)
    axis.broken_barh([(first, width)], (y - _TALL / 2, _TALL), **look)


def _tokens(axis: Any, y: float, position_T: np.ndarray, lane: str, alpha: float) -> None:
    """A bar for each run of neighbours."""
    if not len(position_T):
        return
    runs = np.split(position_T, np.flatnonzero(np.diff(position_T) > 1) + 1)
    bars = [(int(run[0]), len(run)) for run in runs]
    axis.broken_barh(bars, (y - _TALL / 2, _TALL), facecolor=COLORS[lane], alpha=alpha, linewidth=0)


def _label(
    axis: Any, y: float, page: Page, zoom: tuple[float, float], text: str, color: str
) -> None:
    """Above a page, in the middle of the part that can be seen, where there is room."""
    first, last = max(page.position_T[0], zoom[0]), min(page.position_T[-1], zoom[1])
    if last < first or (not page.is_open and last - first < _LABEL_SHARE * (zoom[1] - zoom[0])):
        return
    look = {"ha": "center", "va": "bottom", "fontsize": 7.5, "color": color}
    axis.text((first + last) / 2, y - _TALL / 2 - 0.02, text, **look)


def _time_axis(axis: Any, memory: Memory, name: str, unit_s: float) -> None:
    """Media time along the top; positions and time are not quite proportional."""
    at_s = np.linspace(0.0, memory.seconds, len(memory.start_N))
    first, last = np.interp(axis.get_xlim(), memory.start_N, at_s) / unit_s
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if last - first <= 12 * step)
    shown = [t for t in range(0, int(last) + 1, step) if t >= first]
    above = axis.secondary_xaxis("top")
    above.set_xticks(np.interp([t * unit_s for t in shown], at_s, memory.start_N), map(str, shown))
    above.tick_params(length=0, labelcolor=FAINT)
    above.spines["top"].set_visible(False)
    _axis_name(axis, 1.0, name, "bottom")


def _axis_name(axis: Any, y: float, name: str, va: str) -> None:
    """Left of an axis' numbers."""
    points = require("matplotlib.transforms", "draw a session's memory").ScaledTranslation
    shift = points(0, (-3.5 if va == "top" else 3.5) / 72, axis.figure.dpi_scale_trans)
    look = {"ha": "right", "va": va, "color": FAINT, "fontsize": 7.5}
    axis.text(-0.01, y, name, transform=axis.transAxes + shift, **look)


def _draw_key(figure: Any) -> None:
    patches = require("matplotlib.patches", "draw a session's memory")
    grey = "#52606d"
    entries = [
        (patches.Patch(facecolor="white", edgecolor=grey), f"page of {PAGE_ROWS} rows"),
        (patches.Patch(facecolor="white", edgecolor=grey, linewidth=2.2), "open page"),
        (patches.Patch(facecolor=grey), "tokens"),
        (patches.Patch(facecolor="#f5f6f8", edgecolor="#9aa5b1", linestyle="--"), "dropped"),
        (patches.Patch(facecolor=ZOOM, alpha=0.35), "enlarged below"),
    ]
    figure.legend(
        *zip(*entries, strict=True), loc="upper right", bbox_to_anchor=(0.99, 0.985), ncols=5,
        frameon=False, fontsize=8, handlelength=1.4, columnspacing=1.4,
    )  # fmt: skip
