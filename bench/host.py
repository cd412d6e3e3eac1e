"""`python -m bench host`: what a tick takes of the host, with the device's half left out. No GPU.

Clients on a clean line send 20 ms pieces (and, with --video, ten frames a second) to a runtime on
the virtual clock, whose model stages every tick and computes nothing. take: from the tick's wake-up
on, what came for its windows. stage: where its tokens and keys go, and what the device is sent.
after: the books of the cache once the device is done. publish: to the queues of the clients, the
vocoder left out. In a tick of real time, take and stage lie before the launch, and after and
publish before speech goes out.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from tml_runtime import InteractionModel, ModelConfig, TurnLayout
from tml_runtime.model import ModelState, TickInput
from tml_runtime.model.buffers import Bucket
from tml_runtime.model.device_tick import Ran

from . import arguments
from .machine import describe, machine
from .progress import progress
from .report import text_table, write_json
from .sessions_run import Combination, Setting, open_loop

WARM_UP_S = 3.0  # while buffers find their delays
PARTS = ("take", "stage", "after", "publish")
EXAMPLES = """\
examples:
  python -m bench host --sessions 1,8,32
  python -m bench host --sessions 1,8 --video none,640x480 --json out/host.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sessions", type=arguments.list_of(arguments.count), default="1,8,32", metavar="N,..",
        help="side by side (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--video", type=arguments.list_of(arguments.frame_size), default="none", metavar="SIZE,..",
        help="none, or width and height such as 320x240 (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--layout", default="ms200", help="of the tick (default %(default)s)")
    parser.add_argument(
        "--ticks", type=arguments.count, default=300, help="of each combination (default 300)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")


def main(args: argparse.Namespace) -> int:
    try:
        config = ModelConfig.preset("tiny", layout=TurnLayout.preset(args.layout))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    model = HostModel.random(config)
    combinations = [
        Combination(sessions, video, "clean")
        for video, sessions in itertools.product(args.video, args.sessions)
    ]
    rows = []
    with progress(len(combinations)) as (begin, done):
        for combination in combinations:
            begin(str(combination))
            rows.append(measure(model, combination, args.ticks))
            done()
    result = {"kind": "host", "layout": args.layout, "machine": machine(), "rows": rows}
    if args.json:
        write_json(args.json, result)
    print(show(result))
    return 0


class HostModel(InteractionModel):
    """Of whose ticks only the host's half is run."""

    def new_state(self, *args: Any, **options: Any) -> ModelState:
        state = super().new_state(*args, **options)
        state.buffers.runner = NoDevice()
        return state


class NoDevice:
    """A Runner that computes nothing: what rows say is what the buffers were made with."""

    def begin(self, tick: TickInput, needed: Bucket) -> TickInput:
        return tick

    def choose(self, needed: Bucket) -> Bucket:
        return needed

    def run(self, bucket: Bucket) -> Ran:
        return Ran({})


class NoVoice:
    """A Vocoder that only ever says one piece of silence."""

    def __init__(self, layout: TurnLayout) -> None:
        self._pcm_W = np.zeros(layout.samples_per_tick, np.float32)

    def reset(self) -> None:
        pass

    def push(self, mel_K_B: np.ndarray) -> np.ndarray:
        return self._pcm_W


def measure(model: InteractionModel, combination: Combination, num_ticks: int) -> dict[str, Any]:
    layout = model.config.layout
    setting = Setting(realtime=False, memory={"vocoder": lambda: NoVoice(layout)})
    with open_loop(model, combination, setting) as loop:
        loop.run(WARM_UP_S, lambda: None)
        loop.run(num_ticks * layout.period_ms / 1000, lambda: None)
        metrics = loop.runtime.metrics
        records, stages = metrics.records(), metrics.stages
    records = records[-num_ticks:]
    assert (records["rows"] == combination.sessions).all() and not records["faults"].any()
    stage_ns = dict(zip(stages, records["stage_ns"].T, strict=False))
    staged_ns = stage_ns["model.stage"]
    parts = {
        "take": stage_ns["take"],
        "stage": staged_ns,
        "after": stage_ns["model"] - staged_ns,
        "publish": stage_ns["publish"],
    }
    parts["all"] = sum(parts.values())
    return {**combination.report(), "ticks": len(records), **{
        f"{name}_us": {"p50": _us(ns, 0.5), "p99": _us(ns, 0.99)} for name, ns in parts.items()
    }}  # fmt: skip


def _us(values_ns: np.ndarray, quantile: float) -> float:
    return float(np.quantile(values_ns, quantile, method="inverted_cdf")) / 1e3


def show(result: dict[str, Any]) -> str:
    """Microseconds of a tick, p50; of all of it, p99 and what one session takes too."""
    head = ["sessions", "video", *PARTS, "all", "p99", "a session"]
    rows = []
    for row in result["rows"]:
        whole = row["all_us"]
        times = [*(row[f"{name}_us"]["p50"] for name in (*PARTS, "all")), whole["p99"]]
        times.append(whole["p50"] / row["sessions"])
        rows.append([str(row["sessions"]), row["video"], *(f"{time:.0f}" for time in times)])
    return "\n".join(
        [describe(result["machine"], {}), "us of a tick, p50:", text_table(head, rows)]
    )
