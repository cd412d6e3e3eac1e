"""tml-runtime load: arguments, a service of its own where none is given, a table and a file."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from .. import _env
from .._optional import require
from ..errors import InputValueError
from .child import local_service

SAMPLE_RATE = 16_000
_TEXT = """\
Talk to a service with many clients at once, each behind a line of its own that is as bad as asked,
and report what each of them got: ticks that arrived and did not, the time from the end of a window
to the arrival of its speech, what was lost, how often the connection was resumed.

All clients run in this process, in real time. Without --url it starts a service with the smallest
model beside itself, so both share the machine.
"""
_EXAMPLES = """\
examples:
  tml-runtime load --sessions 2 --seconds 10             a service of its own, good lines
  tml-runtime load --profile wifi --audio talk.wav       somebody's voice over a shared channel
  tml-runtime load --profile outage --seconds 60 --json out/load.json
  tml-runtime load --url ws://127.0.0.1:8760/v1/session --sessions 32
"""


def add_load(commands: Any) -> None:
    """`load`, to argparse's subcommands."""
    load = commands.add_parser(
        "load",
        help="talk to a service with many clients over bad lines, and report how it kept up",
        description=_TEXT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    load.add_argument(
        "--sessions", type=int, default=1, metavar="N", help="clients (default: %(default)s)"
    )
    load.add_argument(
        "--profile",
        default="clean",
        help="of the lines: clean, wifi, 4g, loss2, loss5 or outage (default: %(default)s)",
    )
    load.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="how long each client speaks (default: %(default)g)",
    )
    load.add_argument("--url", help="of the service (default: one is started)")
    load.add_argument("--token", help="that it wants (default: TML_SERVE_TOKEN)")
    load.add_argument(
        "--audio",
        type=Path,
        metavar="FILE",
        help="what to say, at 16 kHz, in a loop (default: noise that sounds like speech)",
    )
    load.add_argument(
        "--seed", type=int, default=0, help="of lines and noise (default: %(default)s)"
    )
    load.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    load.set_defaults(run=_load)


def _load(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    for module in ("aiohttp", "rich"):
        require(module, "put a load on a service", extra="serve")
    from .load_report import summary, table

    try:
        _check(args)
        make_line = line_maker(args.profile)
        pcm = None if args.audio is None else _read_audio(args.audio)
    except InputValueError as error:
        print(f"error: {error}; see `tml-runtime load --help`", file=sys.stderr)
        return 2
    try:
        with _service(args) as url:
            loads = _run(args, url, make_line, pcm)
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    sessions = "1 session" if args.sessions == 1 else f"{args.sessions} sessions"
    about = {
        "title": f"{sessions}, {args.profile}, {args.seconds:g} s",
        "profile": args.profile,
        "seconds": args.seconds,
        "seed": args.seed,
    }
    report = summary(loads, about)
    require("rich.console", "show the table", extra="serve").Console().print(table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {args.json}")
    for load in loads:
        if load.error is not None:
            print(f"error: session {load.number}: {load.error}", file=sys.stderr)
    return 1 if report["total"]["failed"] else 0


def line_maker(profile: str) -> Callable[[int], Any]:
    """A line of that profile for a seed. Raises InputValueError for one there is not."""
    from ..net.faults import Link, Profile

    found = Profile.named(profile)
    return lambda seed: Link(found, seed)


def _run(
    args: argparse.Namespace, url: str, make_line: Callable[[int], Any], pcm: np.ndarray | None
) -> list[Any]:
    """With a progress bar; returns each session's SessionLoad."""
    from .load import FRAME_MS, Caller, run_load

    token = _env.serve_token(args.token)
    callers = [
        Caller(
            number,
            url,
            token=token,
            up=make_line(args.seed + 2 * number),
            down=make_line(args.seed + 2 * number + 1),
        )
        for number in range(args.sessions)
    ]
    progress = require("rich.progress", "show progress", extra="serve")
    with progress.Progress(transient=True) as bar:
        frames = round(args.seconds * 1000 / FRAME_MS) * args.sessions
        task = bar.add_task(f"{args.profile}: frames", total=frames)
        asyncio.run(
            run_load(
                callers,
                seconds=args.seconds,
                sample_rate=SAMPLE_RATE,
                pcm=pcm,
                on_frame=lambda: bar.advance(task),
            )
        )
    return [caller.load for caller in callers]


def _check(args: argparse.Namespace) -> None:
    if not 1 <= args.sessions <= 4096:
        raise InputValueError(f"sessions={args.sessions} is not in 1..4096")
    if not (math.isfinite(args.seconds) and 0 < args.seconds <= 86_400):
        raise InputValueError(f"seconds={args.seconds:g} is not in 0..86400 (above 0)")
    if args.seed < 0:
        raise InputValueError(f"seed={args.seed} is negative")
    if args.url is not None and not args.url.startswith(("ws://", "wss://")):
        raise InputValueError(f"url {args.url!r} begins neither with ws:// nor with wss://")
    if args.json is not None and args.json.is_dir():
        raise InputValueError(f"json: {args.json} is a folder")
    if args.json is not None:
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputValueError(f"json: {args.json} cannot be written: {error}") from None


def _read_audio(path: Path) -> np.ndarray:
    """int16 mono. Raises InputValueError."""
    soundfile = require("soundfile", "read --audio")
    try:
        pcm, sample_rate = soundfile.read(path, dtype="int16", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise InputValueError(f"audio: cannot read {path}: {error}") from None
    if sample_rate != SAMPLE_RATE or len(pcm) == 0:
        raise InputValueError(
            f"audio: {path} has {len(pcm)} samples at {sample_rate} Hz; {SAMPLE_RATE} Hz is needed"
        )
    return pcm[:, 0]


def _service(args: argparse.Namespace) -> AbstractContextManager[str]:
    """The URL of the service: the one given, or that of one in a child process."""
    if args.url is not None:
        return nullcontext(args.url)
    print("starting a service with the smallest model ...", flush=True)
    return local_service("--sessions", str(args.sessions), "--probe-ticks", "0")
