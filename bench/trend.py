"""`python -m bench trend FILE...`: what has become slower and stayed so.

Reads results of `bench sessions`, the oldest first. One slow run is noise: a figure became worse
when the newest three runs all lie more than the limit above the median of those before them. Only
runs on the same GPU at the same clocks are compared. Exit status 1 when something became worse.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .report import read_result, text_table

IN_A_ROW = 3
SAME_CLOCK = 0.02  # of the SM clock while it was measured: a step or two of 15 MHz
SETTINGS = (  # of the model and its memory: runs that differ in one are not compared
    "preset", "layout", "device", "dtype", "experts", "rest", "distinct_experts", "page_dtype",
    "keep", "keep_video", "slots", "global_pages", "probe_ticks",
)  # fmt: skip
FIGURES = (("tick_ms", "p50"), ("tick_ms", "p99"), ("turn_ms", "p50"))
EXAMPLES = """\
examples:
  python -m bench trend out/nightly/*.json          names that sort by their age
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="the oldest first")
    parser.add_argument(
        "--limit", type=float, default=0.10, help="as a fraction (default %(default)s)"
    )


@dataclass(frozen=True)
class Change:
    """before_ms: the median of comparable older runs. newest_ms: the last three, oldest first."""

    name: str
    before_ms: float
    newest_ms: tuple[float, ...]

    def worse(self, limit: float) -> bool:
        return min(self.newest_ms) > self.before_ms * (1 + limit)


def main(args: argparse.Namespace) -> int:
    found = changes([read_result(path, "sessions") for path in args.files])
    worse = [change for change in found if change.worse(args.limit)]
    print(show(found, worse))
    return 1 if worse else 0


def changes(runs: Sequence[dict[str, Any]]) -> list[Change]:
    """Of every figure of the newest run that was measured in three runs in a row and in one before
    them, all on its machine, at its clocks, and of the same model. Pure."""
    if not runs:
        return []
    newest = runs[-1]
    comparable = [run for run in runs if _machine(run) == _machine(newest)]
    found = []
    for row in newest["rows"]:
        alike = [
            other
            for run in comparable
            for other in run["rows"]
            if _key(other) == _key(row) and _same_clock(other, row)
        ]
        for kind, quantile in FIGURES:
            values = [v for other in alike if (v := _value(other, kind, quantile)) is not None]
            if len(values) > IN_A_ROW and _value(row, kind, quantile) is not None:
                before = statistics.median(values[:-IN_A_ROW])
                name = " ".join((*map(str, _key(row)), kind.removesuffix("_ms"), quantile))
                found.append(Change(name, before, tuple(values[-IN_A_ROW:])))
    return found


def show(found: Sequence[Change], worse: Sequence[Change]) -> str:
    if not found:
        return f"nothing to compare: {IN_A_ROW + 1} runs on one machine at one clock are needed"
    rows = [
        (
            change.name,
            f"{change.before_ms:.2f}",
            *(f"{ms:.2f}" for ms in change.newest_ms),
            "worse" if change in worse else "",
        )
        for change in found
    ]
    head = ("sessions, video, line", "before ms", *["newest"] * IN_A_ROW, "")
    return f"{text_table(head, rows)}\n{len(worse)} of {len(found)} became worse and stayed so"


def _machine(run: dict[str, Any]) -> tuple[Any, ...]:
    gpu = run["machine"]["gpu"]
    where = run["machine"]["cpu"] if gpu is None else gpu["name"]
    return (where, *(run.get(name) for name in SETTINGS))  # older files lack some


def _key(row: dict[str, Any]) -> tuple[int, str, str]:
    return row["sessions"], row["video"], row["profile"]


def _same_clock(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Where no GPU was read there is no clock to tell apart."""
    one, two = (None if r.get("gpu") is None else r["gpu"]["sm_mhz"] for r in (row, other))
    if one is None or two is None:
        return one is two
    return abs(one - two) <= SAME_CLOCK * two


def _value(row: dict[str, Any], kind: str, quantile: str) -> float | None:
    """None where the row was not measured."""
    return None if row["error"] is not None or not row[kind] else row[kind][quantile]
