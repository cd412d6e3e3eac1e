"""`python -m bench compare A B`: what became slower, and what fails now, from A to B.

Reads two files written by `accept` or by one op. A time counts as changed when it moved by more
than the limit and by more than both runs' own noise. Exit status 1 when something got worse.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .report import read_result, text_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path, metavar="A")
    parser.add_argument("after", type=Path, metavar="B")
    parser.add_argument(
        "--limit", type=float, default=0.10, help="as a fraction (default %(default)s)"
    )


@dataclass
class Comparison:
    """times: name, before and after in microseconds, for every time both have. gone: what the later
    run did not time, unless its time was up, which is in `notes`."""

    times: list[tuple[str, float, float]] = field(default_factory=list)
    slower: list[str] = field(default_factory=list)
    faster: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def worse(self) -> bool:
        return bool(self.slower or self.broken or self.gone)


@dataclass(frozen=True)
class Timed:
    us: float
    noise: float


def main(args: argparse.Namespace) -> int:
    before, after = (read_result(path, "accept", "op") for path in (args.before, args.after))
    result = compare(before, after, limit=args.limit)
    print(show(result))
    return 1 if result.worse else 0


def compare(before: dict[str, Any], after: dict[str, Any], *, limit: float) -> Comparison:
    """Of our own times and of checks; the peers' times are theirs to keep."""
    result = Comparison()
    _compare_machines(before, after, result)
    old, new = _times(before), _times(after)
    late = _out_of_time(after)
    for name, was in old.items():
        now = new.get(name)
        if now is None:
            if name.rsplit(" ", 1)[0] in late:
                result.notes.append(f"no time was left for {name}")
            else:
                result.gone.append(name)
            continue
        result.times.append((name, was.us, now.us))
        threshold = 1.0 + max(limit, was.noise + now.noise)
        if now.us > was.us * threshold:
            result.slower.append(name)
        elif was.us > now.us * threshold:
            result.faster.append(name)
    failed_before = _failed(before)
    result.broken += [name for name in _failed(after) if name not in failed_before]
    return result


def _compare_machines(before: dict[str, Any], after: dict[str, Any], result: Comparison) -> None:
    for key in ("gpu", "torch", "triton"):
        was, now = before["machine"][key], after["machine"][key]
        if isinstance(was, dict) and isinstance(now, dict):
            was, now = (f"{gpu['name']}, driver {gpu['driver']}" for gpu in (was, now))
        if was != now:
            result.notes.append(f"{key}: {was} -> {now}")
    old, new = before.get("ceilings") or {}, after.get("ceilings") or {}
    for name in ("copy", "read", "matmul_bf16"):
        if old.get(name) and new.get(name):
            change = 100 * (new[name] / old[name] - 1)
            result.notes.append(f"ceiling {name}: {change:+.1f} %")


def _times(content: dict[str, Any]) -> dict[str, Timed]:
    """Ours, cold and by graph, by op and case."""
    times = {}
    for op in _ops(content):
        for case in op["results"]:
            ours = case["variants"].get("ours")
            if ours is None:
                continue
            # A variant that waits for the GPU left gaps: how far apart the two times of ours are
            # then says nothing.
            noise = 0.0 if "ours (cold)" in case["skipped"] else case["noise"] or 0.0
            for kind in ("cold_us", "graph_us"):
                if ours[kind] is not None:
                    name = f"{op['op']} {case['case']} {kind.removesuffix('_us')}"
                    times[name] = Timed(ours[kind]["median"], noise)
    return times


def _out_of_time(content: dict[str, Any]) -> set[str]:
    """ "op case" of what a run had no time for."""
    return {f"{op['op']} {case}" for op in _ops(content) for case in op["out_of_time"]}


def _failed(content: dict[str, Any]) -> dict[str, None]:
    """Names, in order, of checks that failed and of cases that a gate refused, which `accept`
    names so too."""
    checks = [c for c in content.get("checks", []) if c["result"] == "failed"]
    names = [f"{check['section']}: {check['name']}" for check in checks]
    for op in _ops(content):
        names += [f"op {op['op']}: {op['op']}: {case}" for case in op["gate"]["failures"]]
    return dict.fromkeys(names)


def _ops(content: dict[str, Any]) -> list[dict[str, Any]]:
    return content.get("ops", [content])


def show(c: Comparison) -> str:
    rows = [
        (name, f"{was:.2f}", f"{now:.2f}", f"{100 * (now / was - 1):+.1f} %",
         "slower" if name in c.slower else "faster" if name in c.faster else "")
        for name, was, now in c.times
    ]  # fmt: skip
    parts = list(c.notes)
    if rows:
        parts.append(text_table(("ours", "before us", "after us", "change", ""), rows))
    parts += [f"not timed any more: {name}" for name in c.gone]
    parts += [f"fails now: {name}" for name in c.broken]
    parts.append(
        f"{len(c.slower)} slower, {len(c.faster)} faster, {len(c.gone)} not timed any more, "
        f"{len(c.broken)} checks fail that did not"
    )
    return "\n".join(parts)
