"""`python -m bench interaction`: how a model interacts, on synthetic twins of published benchmarks.

Episodes of the `cue` model's tasks, of held-out seeds and recordings, are played to the real
runtime, on its virtual clock, through lines that lose and delay, and what it says is scored with
the published metrics: turn-taking, overlap, backchannels, counting, timing, proactive answers. A
synthetic twin has its benchmark's metric and kind of task, none of its data: no figure here is that
benchmark's. Beside it stands the same model driven turn by turn, behind Silero's detector of voice
activity. docs/interaction.md has definitions and sources.

Exit status 1: nothing was measured.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments, models
from .machine import machine
from .progress import progress
from .report import write_json

if TYPE_CHECKING:
    from tml_runtime import InteractionModel
    from tml_runtime.demo.cue.speech import Footage, Speech
    from tml_runtime.demo.cue.stage import Episode

    from .interaction_run import Condition

LEAST_TICKS = 24  # of an episode
EXAMPLES = """\
examples:
  python -m bench interaction                               the shipped checkpoint, on the tick grid
  python -m bench interaction --line direct,clean,jitter20,jitter50,loss2,loss5,outage,rate300 \\
      --sessions 1,8 --json out/interaction.json --plots out/interaction
  python -m bench interaction --minutes 1,60 --episodes 4   sessions that have lived so long
  python -m bench interaction --checkpoint out/cue --tasks cue,speak --episodes 32
  python -m bench interaction --random --episodes 2         what a model scores that knows nothing
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="model.safetensors and report.json of a training run (default: the one that ships)",
    )
    source.add_argument("--random", action="store_true", help="random weights instead")
    add("--device", choices=models.DEVICES, default="cpu", help="where (default %(default)s)")
    add("--tasks", default="all", metavar="NAME,..", help="of the episodes (default %(default)s)")
    number = arguments.whole(1, 100_000)
    add("--episodes", type=number, default=8, metavar="N", help="of each task (%(default)s)")
    add("--ticks", type=number, default=60, metavar="N", help="of an episode (%(default)s)")
    add(
        "--line",
        default="direct",
        metavar="NAME,..",
        help="direct: no line, windows whole and on the tick grid; clean, wifi, 4g, loss2, loss5, "
        "outage, jitter20, jitter50, rate300 (default %(default)s)",
    )
    add("--sessions", default="1", metavar="N,..", help="at a time (default %(default)s)")
    add(
        "--minutes",
        default="0",
        metavar="M,..",
        help="that a session has lived, on the virtual clock, before it is measured; 0: every "
        "episode has a session of its own (default %(default)s)",
    )
    add("--no-baseline", action="store_true", help="without the model driven turn by turn")
    add("--seed", type=arguments.seed, default=0, help="of lines, and of random weights")
    add("--json", type=Path, metavar="FILE", help="write the result")
    add("--plots", type=Path, metavar="DIR", help="a PNG for each metric (matplotlib)")


def main(args: argparse.Namespace) -> int:
    from .interaction_report import check_plots, plots, show

    tasks, conditions = _tasks(args.tasks), _conditions(args)
    if args.ticks < LEAST_TICKS:
        raise SystemExit(f"--ticks {args.ticks}: an episode has {LEAST_TICKS} at least")
    if args.plots:
        check_plots()
    model, media, about = _prepare(args)
    rows = measure(
        model, media, tasks, conditions, args.episodes, args.ticks, args.seed, not args.no_baseline
    )
    result = {
        "kind": "interaction",
        **about,
        "tasks": tasks,
        "episodes": args.episodes,
        "ticks": args.ticks,
        "seed": args.seed,
        "period_ms": model.config.layout.period_ms,
        "machine": machine(),
        "rows": rows,
    }
    print(show(result))
    if args.json:
        write_json(args.json, result)
    if args.plots:
        plots(args.plots, result)
    return 0 if any(row["error"] is None for row in rows) else 1


def measure(
    model: InteractionModel,
    media: tuple[Speech, Footage],
    tasks: list[str],
    conditions: list[Condition],
    count_each: int,
    num_ticks: int,
    seed: int = 0,
    baseline: bool = True,
    **options: Any,
) -> list[dict[str, Any]]:
    """A row for each condition, all of the same episodes, and one of the baseline. options: of
    Runtime. error: why a row has no figures."""
    from .interaction_run import held_out_episodes, ticks_of

    episodes = held_out_episodes(count_each, num_ticks, *media, tasks)
    total = sum(ticks_of(condition, len(episodes), num_ticks) for condition in conditions)
    rows = []
    with progress(total + baseline * len(episodes) * num_ticks) as (begin, on_step):
        for condition in conditions:
            begin(str(condition))
            rows.append(_played(model, episodes, condition, media, seed, on_step, options))
        if baseline:
            begin("turn by turn")

            def on_take() -> None:
                for _ in range(num_ticks):  # about as many as the model had
                    on_step()

            rows.append(_turn_by_turn(model, episodes, seed, on_take, options))
    return rows


def _played(
    model: InteractionModel,
    episodes: list[Episode],
    condition: Condition,
    media: tuple[Speech, Footage],
    seed: int,
    on_step: Any,
    options: dict[str, Any],
) -> dict[str, Any]:
    from .interaction_run import DIRECT, play
    from .interaction_score import figures

    row = {
        "system": "ticks",
        "line": condition.line,
        "sessions": condition.sessions,
        "minutes": condition.minutes,
        "error": None,
    }
    try:
        played = play(model, episodes, condition, media, seed=seed, on_tick=on_step, **options)
        scored = figures(played.takes, on_grid=condition.line == DIRECT)
    except Exception as error:  # no slot, no memory, a tick that raised: others may run
        return {**row, "error": f"{type(error).__name__}: {error}"}
    windows = {"windows": played.windows, "missing_windows": played.missing}
    return {**row, **windows, "session_faults": played.faults, "figures": scored}


def _turn_by_turn(
    model: InteractionModel,
    episodes: list[Episode],
    seed: int,
    on_take: Any,
    options: dict[str, Any],
) -> dict[str, Any]:
    from .interaction_run import DIRECT
    from .interaction_score import figures
    from .interaction_turns import play_turns

    row = {"system": "turns", "line": DIRECT, "sessions": 1, "minutes": 0, "error": None}
    try:
        takes = play_turns(model, episodes, seed=seed, on_take=on_take, **options)
        return {**row, "figures": figures(takes, on_grid=False)}
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {error}"}


def _prepare(
    args: argparse.Namespace,
) -> tuple[InteractionModel, tuple[Speech, Footage], dict[str, Any]]:
    """The model, recordings that it was not trained on, and what names both. SystemExit where one
    is not to be had."""
    import torch

    from tml_runtime._optional import MissingExtraError
    from tml_runtime.demo import cue
    from tml_runtime.demo.cue.evaluate import check_held_out
    from tml_runtime.demo.cue.recordings import held_out_media
    from tml_runtime.demo.cue.report import read_report, weights_digest
    from tml_runtime.demo.cue.words import CONFIG
    from tml_runtime.demo.media import MediaError
    from tml_runtime.errors import TmlRuntimeError
    from tml_runtime.model import InteractionModel

    from .interaction_voice import voice_detector

    device = models.device_of(args)
    folder = args.checkpoint or Path(cue.__file__).parent / "checkpoint"
    try:
        detector, media = voice_detector(), held_out_media()
        about = {
            "measured_with": {**media[0].hashes, **media[1].hashes},
            "voice_detector": detector,
            "device": device,
        }
        if args.random:
            model = InteractionModel.random(CONFIG, seed=args.seed, device=device)
            return model, media, {**about, "weights": "random"}
        check_held_out(read_report(folder)["trained_on"], *media)
        model = InteractionModel.load(folder, config=CONFIG, device=device, dtype=torch.float32)
        return model, media, {**about, "weights": weights_digest(folder)}
    except (TmlRuntimeError, MediaError, MissingExtraError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from None


def _tasks(text: str) -> list[str]:
    from tml_runtime.demo.cue.tasks import TASKS

    names = list(TASKS) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TASKS:
            raise SystemExit(f"--tasks: {name!r} is not one of {', '.join(TASKS)}")
    return names


def _conditions(args: argparse.Namespace) -> list[Condition]:
    from tml_runtime.errors import InputValueError

    from .interaction_run import Condition, profile

    lines = [name.strip() for name in args.line.split(",")]
    sessions, minutes = (
        _numbers("--sessions", args.sessions, 1),
        _numbers("--minutes", args.minutes),
    )
    for line in lines:
        try:
            profile(line)
        except InputValueError as error:
            raise SystemExit(f"--line: {error}") from None
    return [Condition(*values) for values in itertools.product(lines, sessions, minutes)]


def _numbers(name: str, text: str, least: int = 0) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isdecimal() and least <= int(part) <= 4096):
            raise SystemExit(f"{name}: {part!r} is not a number in {least}..4096")
    return [int(part) for part in parts]
