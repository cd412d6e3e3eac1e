"""What a run of the load generator measured: one session, all of them, as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .._optional import require


@dataclass
class SessionLoad:
    """One session's counts and times, as its client saw them."""

    number: int
    ticks: int = 0  # whose speech arrived
    gaps: int = 0  # ticks between the first and the last whose speech did not
    frames_sent: int = 0
    frames_lost: int = 0  # by the line, going up
    outputs_lost: int = 0  # by the line coming down, or by the service
    resumes: int = 0
    error: str | None = None
    latency_ms: list[float] = field(default_factory=list)  # end of a window to its speech's arrival

    def summary(self) -> dict[str, Any]:
        """Plain data; the latencies as percentiles."""
        values = asdict(self)
        return {**values, "latency_ms": percentiles(values["latency_ms"])}


def percentiles(values: list[float]) -> dict[str, float | None]:
    """p50, p95, p99 and the maximum; each is a value that occurred (nearest rank).

    >>> percentiles([3.0, 1.0, 2.0])["p50"], percentiles([])["max"]
    (2.0, None)
    """
    if not values:
        return dict.fromkeys(("p50", "p95", "p99", "max"))
    found = np.quantile(values, [0.5, 0.95, 0.99, 1.0], method="inverted_cdf")
    return dict(zip(("p50", "p95", "p99", "max"), map(float, found), strict=True))


def summary(loads: list[SessionLoad], about: dict[str, Any]) -> dict[str, Any]:
    """The whole run, for JSON: `about`, totals, and each session."""
    names = ("ticks", "gaps", "frames_sent", "frames_lost", "outputs_lost", "resumes")
    return {
        **about,
        "total": {
            **{name: sum(getattr(load, name) for load in loads) for name in names},
            "failed": sum(load.error is not None for load in loads),
            "latency_ms": percentiles([ms for load in loads for ms in load.latency_ms]),
        },
        "sessions": [load.summary() for load in loads],
    }


def table(report: dict[str, Any]) -> Any:
    """For rich: a row for each session, and one for all."""
    rich_table = require("rich.table", "show the table", extra="serve")
    rich_box = require("rich.box", "show the table", extra="serve")
    shown = rich_table.Table(
        title=report["title"],
        caption="lost: frames sent; missed: messages of the service; p50 .. max: ms from the end "
        "of a window to the arrival of its speech",
        box=rich_box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    names = ("session", "ticks", "gaps", "sent", "lost", "missed", "resumed")
    for name in (*names, "p50", "p95", "p99", "max"):
        shown.add_column(name, justify="right", no_wrap=True)
    for session in report["sessions"]:
        shown.add_row(str(session["number"]), *_cells(session))
    shown.add_section()
    shown.add_row("all", *_cells(report["total"]))
    return shown


def _cells(values: dict[str, Any]) -> list[str]:
    names = ("ticks", "gaps", "frames_sent", "frames_lost", "outputs_lost", "resumes")
    times = [values["latency_ms"][name] for name in ("p50", "p95", "p99", "max")]
    return [str(values[name]) for name in names] + [
        "-" if ms is None else f"{ms:.0f}" for ms in times
    ]
