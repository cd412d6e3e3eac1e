"""`python -m bench sessions`: how many sessions a GPU holds, and how well: ticks, misses, turns,
media, energy, context and memory of every combination of sessions, video and network.

Each combination is a runtime of its own in real time. Its clients run on one thread of this
process, each behind a seeded bad line: they send 20 ms of audio at a time, and two frames a tick.
So what a client costs in Python is in the figures, as in a service. Every session that asks for a
place is counted, admitted or not; a combination that cannot be measured is a row that says why.

--soak runs one combination minute by minute and compares the last with the first; --fast does that
on the virtual clock, without times. Exit status 1: nothing was measured, or the soak has a problem.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments, models
from .machine import clocks, describe, machine
from .progress import progress
from .report import write_json

if TYPE_CHECKING:
    from .sessions_run import Combination, Setting

PLOTS = (".png", ".svg", ".pdf")
SECONDS, MINUTES = 30.0, 60  # of a combination, and of --soak
MOST_SECONDS = 1200  # of the shortest ticks, as many as their metrics keep; for more, --soak
EXAMPLES = """\
examples:
  python -m bench sessions --seconds 60 --json out/sessions.json --plot out/sessions.png
  python -m bench sessions --preset inkling-small --experts int4 --rest fp8 \\
      --sessions 1,8,16,32 --video none,320x240 --profile clean,4g
  python -m bench sessions --sessions 8 --slots 4                   four of eight are refused
  python -m bench sessions --soak --minutes 60 --sessions 4 --video 80x80 --profile wifi
  python -m bench sessions --soak --fast --minutes 60               invariants and memory only
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_arguments(parser)
    lists = {
        "sessions": (arguments.count, "1,2,4,8", "N,..", "that ask for a place"),
        "video": (
            arguments.frame_size,
            "none",
            "SIZE,..",
            "none, or width and height such as 320x240",
        ),
        "profile": (_profile, "clean", "NAME,..", "clean, wifi, 4g, loss2, loss5 or outage"),
    }
    for name, (one, default, metavar, text) in lists.items():
        text += " (default %(default)s)"
        parser.add_argument(
            f"--{name}", type=arguments.list_of(one), default=default, metavar=metavar, help=text
        )
    parser.add_argument(
        "--seconds",
        type=_positive,
        metavar="S",
        help=f"of each combination, without --soak ({SECONDS:g})",
    )
    parser.add_argument(
        "--warm-up",
        type=_positive,
        default=3.0,
        metavar="S",
        help="before what is measured, while lines and buffers find their delays (3)",
    )
    parser.add_argument(
        "--slots", type=arguments.count, metavar="N", help="fewer than there are sessions"
    )
    parser.add_argument(
        "--global-pages",
        type=_pages,
        metavar="N",
        help="of all sessions, or auto: as many as fit (default: as their budgets need)",
    )
    parser.add_argument(
        "--probe-ticks",
        type=arguments.count,
        default=0,
        metavar="N",
        help="before the start, for admission by time (default: every slot is admitted)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG, SVG or PDF (matplotlib)")
    parser.add_argument("--soak", action="store_true", help="one combination, minute by minute")
    parser.add_argument(
        "--minutes", type=arguments.count, metavar="M", help=f"of --soak (default {MINUTES})"
    )
    parser.add_argument("--fast", action="store_true", help="--soak on the virtual clock")


def main(args: argparse.Namespace) -> int:
    from .sessions_run import Combination, Setting

    combinations = [
        Combination(sessions, video, profile)
        for video, profile, sessions in itertools.product(args.video, args.profile, args.sessions)
    ]
    _check(args, combinations)
    model, about = models.make_model(args)
    about |= {
        "period_ms": model.config.layout.period_ms,
        "seed": args.seed,
        "warm_up_s": args.warm_up,
        "slots": args.slots,
        "global_pages": args.global_pages,
        "probe_ticks": args.probe_ticks,
        "machine": machine(),
        "clocks": clocks(),
    }
    frames = [frame for frame in args.video if frame is not None]
    setting = Setting(
        memory=models.memory_options(args, model.config, frames),
        seed=args.seed,
        slots=args.slots,
        global_pages=args.global_pages,
        probe_ticks=args.probe_ticks,
        warm_up_s=args.warm_up,
        realtime=not args.fast,
    )
    run = _soak if args.soak else _sweep
    return run(model, about, combinations, setting, args)


def _sweep(
    model: Any,
    about: dict[str, Any],
    combinations: list[Combination],
    setting: Setting,
    args: argparse.Namespace,
) -> int:
    from .sessions_report import plot, show
    from .sessions_run import measure

    rows: list[dict[str, Any]] = []
    seconds = args.seconds or SECONDS
    result = {"kind": "sessions", **about, "seconds": seconds, "rows": rows}
    with progress(len(combinations) * (seconds + setting.warm_up_s)) as (begin, on_second):
        for combination in combinations:
            begin(str(combination))
            rows.append(measure(model, combination, setting, seconds=seconds, on_second=on_second))
            if args.json:  # after each: a run that is stopped leaves what it found
                write_json(args.json, result)
    print(show(result))
    if args.plot:
        plot(args.plot, result)
    return 0 if any(row["error"] is None for row in rows) else 1


def _soak(
    model: Any,
    about: dict[str, Any],
    combinations: list[Combination],
    setting: Setting,
    args: argparse.Namespace,
) -> int:
    from tml_runtime.errors import LoopFailed

    from .sessions_run import NobodyAdmitted
    from .soak import show_soak, soak

    (combination,) = combinations
    minutes = args.minutes or MINUTES
    with progress(minutes * 60 + setting.warm_up_s) as (begin, on_second):
        begin(str(combination))
        try:
            figures = soak(model, combination, setting, minutes=minutes, on_second=on_second)
        except (NobodyAdmitted, LoopFailed) as error:
            why = f"{error}: {error.__cause__!r}" if error.__cause__ else str(error)
            raise SystemExit(why) from None
    result = {"kind": "soak", **about, "realtime": setting.realtime, **figures}
    print(describe(result["machine"], result["clocks"]))
    print(f"{models.describe_model(result)}: {combination}")
    print(show_soak(result))
    if args.json:
        write_json(args.json, result)
    return 1 if result["problems"] else 0


def _check(args: argparse.Namespace, combinations: list[Combination]) -> None:
    """SystemExit for what does not go together, before anything has been run."""
    if args.soak and len(combinations) != 1:
        raise SystemExit(
            f"--soak runs one combination, not {len(combinations)}: give --sessions, --video and "
            "--profile one value each"
        )
    if args.fast and not args.soak:
        raise SystemExit("--fast goes with --soak: what is not a soak measures times")
    if args.minutes and not args.soak:
        raise SystemExit("--minutes goes with --soak: without it, give --seconds")
    if args.seconds and args.soak:
        raise SystemExit("--seconds goes without --soak: with it, give --minutes")
    if args.plot:
        from tml_runtime._optional import MissingExtraError, require

        if args.soak:
            raise SystemExit("--plot goes without --soak: it draws sessions against p99.9")
        if args.plot.suffix not in PLOTS:
            raise SystemExit(f"--plot {args.plot}: expected a name that ends in {', '.join(PLOTS)}")
        try:
            require("matplotlib", "draw --plot")
        except MissingExtraError as error:
            raise SystemExit(str(error)) from None


def _pages(text: str) -> int | str:
    if text != "auto" and not (text.isdecimal() and int(text) > 1):
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number above 1")
    return text if text == "auto" else int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in 0..{MOST_SECONDS} (above 0)")
    return value


def _profile(text: str) -> str:
    from tml_runtime.errors import InputValueError
    from tml_runtime.net.faults import Profile

    try:
        Profile.named(text)
    except InputValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
