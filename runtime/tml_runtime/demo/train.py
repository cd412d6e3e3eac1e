"""`python -m tml_runtime.demo.train`: makes the weights of the `cue` model, and measures them."""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from .._optional import MissingExtraError, require
from ..errors import TmlRuntimeError
from .cue.evaluate import EVALUATION, check_held_out, evaluate
from .cue.loss import Loss
from .cue.recordings import held_out_media, training_media
from .cue.report import (
    read_report,
    target_rows,
    training_report,
    weights_digest,
    write_report,
)
from .cue.trainer import STEPS, Trainer, TrainingError
from .media import MediaError

SAVE_EVERY_S = 60.0
NEWEST = 100  # losses of a task that the report is the mean of

_TEXT = """\
Train the cue model on a CPU: it listens, watches and reads in ticks of 200 ms, and answers cues in
the tick in which an answer is due. Writes model.safetensors, report.json and report.md, and
training.safetensors, by which a run that was stopped goes on: give the same arguments again.
"""
_EXAMPLES = """\
examples:
  python -m tml_runtime.demo.train --out out/cue              half an hour of two cores
  python -m tml_runtime.demo.train --out out/cue --evaluate   then its figures, on other recordings

The same seed and steps give the same weights on the same machine.
"""


class Bar(Protocol):
    def __call__(self, done: int, total: int, text: str) -> None: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 wrong arguments, 130 ended by Ctrl-C (and can go on)."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.workers < 1 or (args.steps is not None and args.steps < 1):
        parser.error("--steps and --workers are positive")
    if not 0 <= args.seed < EVALUATION or args.episodes < 1 or args.long_episodes < 0:
        parser.error("--seed and --long-episodes are not negative, --episodes is positive")
    torch.set_num_threads(1)
    try:
        if args.evaluate:
            measure(args.out, args.episodes, args.long_episodes, args.workers)
        else:
            train(args.out, seed=args.seed, num_steps=args.steps, workers=args.workers)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last saved step", file=sys.stderr)
        return 130
    except (TmlRuntimeError, MediaError, MissingExtraError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def train(out: Path, *, seed: int, num_steps: int | None, workers: int) -> None:
    """num_steps: None for as many as the run in that folder has, or a new one. Raises
    TrainingError, WorkerEnded, MediaError, MissingExtraError, OSError."""
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(seed, *training_media())
    resumed = trainer.resume(out)
    if num_steps is not None:
        if num_steps < trainer.step:
            raise TrainingError(
                f"--steps {num_steps} is less than the {trainer.step} steps that {out} is trained "
                "for: give more, or another folder"
            )
        trainer.num_steps = num_steps
    if trainer.num_steps <= trainer.step:
        print(f"{out} is trained already, for {trainer.step} steps; more --steps train it further")
        return
    if resumed:
        print(f"goes on after step {trainer.step} of {trainer.num_steps}")
    saved = time.monotonic()
    newest: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=NEWEST))
    with trainer.workers(workers) as processes, _bar("training") as show:
        while trainer.step < trainer.num_steps:
            losses = trainer.run_step(processes)
            for loss in losses:
                for task, value in loss.tasks.items():
                    newest[task].append(value)
            now = time.monotonic()
            show(trainer.step, trainer.num_steps, _loss_text(losses))
            if now - saved > SAVE_EVERY_S and trainer.step < trainer.num_steps:
                trainer.save(out)
                saved = now
    trainer.save_weights(out)
    means = {task: float(np.mean(values)) for task, values in newest.items()}
    write_report(out, training_report(trainer, means))
    trainer.save(out)  # last: with the last step saved, the folder is taken to be complete
    print(f"wrote {out}: step {trainer.step}; now measure it: --out {out} --evaluate")


def measure(out: Path, episodes: int, long_episodes: int, workers: int) -> None:
    """Adds figures to a folder's report. Raises NotHeldOut, ReportError, CheckpointError,
    MediaError, MissingExtraError."""
    report = read_report(out)
    speech, footage = held_out_media()
    check_held_out(report["trained_on"], speech, footage)
    with _bar("measuring") as show:
        report["figures"] = evaluate(
            out,
            speech,
            footage,
            episodes=episodes,
            long_episodes=long_episodes,
            workers=workers,
            done=show,
        )
    report["weights_sha256"] = weights_digest(out)
    report["measured_with"] = {**speech.hashes, **footage.hashes}
    write_report(out, report)
    for what, value, target, reached in target_rows(report["figures"]):
        print(f"{'ok     ' if reached else 'MISSED '} {what}: {value:g} (target {target:g})")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tml_runtime.demo.train",
        description=_TEXT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where the files go")
    add("--steps", type=int, help=f"how long to train (default: {STEPS}, or what the run has)")
    add("--seed", type=int, default=0, help="of weights and episodes (default: %(default)s)")
    add(
        "--workers",
        type=int,
        default=2,
        help="processes, of a core each: up to two train, any number measures (default: "
        "%(default)s)",
    )
    add("--evaluate", action="store_true", help="train nothing: measure what is in DIR")
    add("--episodes", type=int, default=32, help="of each task (default: %(default)s)")
    add(
        "--long-episodes",
        type=int,
        default=32,
        help="of a minute, in which it counts (default: %(default)s)",
    )
    return parser


def _loss_text(losses: Sequence[Loss]) -> str:
    tokens, speech = (np.mean([getattr(x, of) for x in losses]) for of in ("tokens", "speech"))
    return f"tokens {tokens:.4f}, speech {speech:.3f}"


@contextmanager
def _bar(what: str) -> Iterator[Bar]:
    """A bar on a terminal, else a line now and then; both on stderr."""
    console = require("rich.console", "show progress").Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(what)
        return
    with require("rich.progress", "show progress").Progress(console=console) as bar:
        task = bar.add_task(what, total=None)

        def show(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{what}: {text}")

        yield show


class _Lines:
    EVERY_S = 10.0

    def __init__(self, what: str) -> None:
        self._what, self._shown = what, 0.0

    def __call__(self, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        if now - self._shown > self.EVERY_S or done == total:
            self._shown = now
            print(f"{self._what}: {done} of {total}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
