"""`python -m bench kv`: what a day of ticks costs the host that keeps the cache's books.

Ticks of audio, video and replies go through RollingKVCache as the model drives it, the device's
part on the CPU and very small. Of the first 20 minutes and of the last, pages held and changes a
tick are compared: neither may grow. The time of a tick and the most memory the process has had are
reported, not judged: they are this machine's.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tml_kernels.kv_cache import CLASSES, CacheGroup, PageClass, RollingKVCache

from . import arguments
from .machine import machine
from .report import write_json

TICKS_PER_MINUTE = 5 * 60
WARM_UP, SPAN = 6, 20  # minutes until the budgets are full; that are compared, at either end
LEAST = WARM_UP + 2 * SPAN  # minutes, so that the two ends have none in common
RUNS = ((PageClass.VIDEO, 4), (PageClass.AUDIO, 4), (PageClass.REPLY, 4))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hours", type=_hours, default=24.0, help=f"simulated, {LEAST} minutes at least (24)"
    )
    parser.add_argument("--sessions", type=arguments.count, default=1, help="side by side (1)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write DIR/kv.json")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def main(args: argparse.Namespace) -> int:
    """Exit status 1 when pages or work grew."""
    result = {"kind": "kv", "machine": machine(), **simulate(args.hours, args.sessions)}
    if args.out:
        write_json(args.out / "kv.json", result)
    print(json.dumps(result, indent=1) if args.json else show(result))
    return 0 if result["flat"] else 1


def make_cache(sessions: int) -> RollingKVCache:
    groups = [
        CacheGroup(1, 1, 1, pages=1 + 96 * sessions, columns=96),
        CacheGroup(1, 1, 1, pages=1 + 24 * sessions, columns=24, window=512, history=256),
    ]
    return RollingKVCache(groups, max_sessions=sessions, page_dtype=torch.float32)


def simulate(hours: float, num_sessions: int) -> dict[str, Any]:
    cache = make_cache(num_sessions)
    sessions = [cache.open(dict.fromkeys(CLASSES, 16)) for _ in range(num_sessions)]
    tokens = sum(n for _, n in RUNS)
    rows = np.full((len(cache.groups), tokens * num_sessions), -1)
    position_T = np.zeros(tokens * num_sessions, np.int64)
    minutes = round(hours * 60)
    assert minutes >= LEAST, hours
    kept: list[dict[str, Any]] = []
    for minute in range(minutes):
        begin, work = time.perf_counter_ns(), cache.work
        for _ in range(TICKS_PER_MINUTE):
            for s, session in enumerate(sessions):
                cache.reserve(session, RUNS)
                column = s * tokens
                for page_class, count in RUNS:
                    first = cache.append(session, page_class, count, rows, column)
                    position_T[column : column + count] = range(first, first + count)
                    column += count
            cache.apply(rows, position_T)
            for session in sessions:
                cache.commit(session)
            cache.tick()
        kept.append({
            "minute": minute,
            "us_per_tick": (time.perf_counter_ns() - begin) / 1e3 / TICKS_PER_MINUTE,
            "work_per_tick": (cache.work - work) / TICKS_PER_MINUTE,
            "pages": [group.held for group in cache.stats().groups],
            "peak_rss_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        })  # fmt: skip
        cache.check_invariants()
    begin, end = _summary(kept[WARM_UP : WARM_UP + SPAN]), _summary(kept[-SPAN:])
    return {
        "hours": minutes / 60,
        "sessions": num_sessions,
        "tokens": cache.length(sessions[0]),
        "first": begin,
        "last": end,
        "time_ratio": end["us_per_tick"] / begin["us_per_tick"],
        "flat": begin["most_pages"] == end["most_pages"]
        and abs(end["work_per_tick"] / begin["work_per_tick"] - 1) <= 0.02,
    }


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = math.nan
    if not LEAST <= hours * 60 < math.inf:  # also refuses nan
        raise argparse.ArgumentTypeError(
            f"{text!r} hours are not {LEAST} minutes at least: {WARM_UP} until the cache is full, "
            f"and {SPAN} at either end that are compared"
        )
    return hours


def _summary(minutes: list[dict[str, Any]]) -> dict[str, Any]:
    """Of some minutes: the median time, the mean work, and the most that was held."""
    return {
        "minutes": [minutes[0]["minute"], minutes[-1]["minute"]],
        "us_per_tick": statistics.median(m["us_per_tick"] for m in minutes),
        "work_per_tick": statistics.mean(m["work_per_tick"] for m in minutes),
        "most_pages": [max(held) for held in zip(*(m["pages"] for m in minutes), strict=True)],
        "peak_rss_kib": minutes[-1]["peak_rss_kib"],
    }


def show(result: dict[str, Any]) -> str:
    lines = [
        f"{result['hours']:g} simulated hours, {result['sessions']} sessions, "
        f"{result['tokens']} tokens each: {'flat' if result['flat'] else 'NOT FLAT'}"
    ]
    for name in ("first", "last"):
        part = result[name]
        lines.append(
            f"  minutes {part['minutes'][0]} to {part['minutes'][1]}: {part['us_per_tick']:.1f} us "
            f"and {part['work_per_tick']:.2f} changes a tick, at most {part['most_pages']} pages, "
            f"peak memory {part['peak_rss_kib'] / 1024:.0f} MiB"
        )
    return "\n".join([*lines, f"  last / first: {result['time_ratio']:.3f} of the time"])
