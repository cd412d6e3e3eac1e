"""Lets a checkpoint live through episodes as sessions do, tick by tick, and scores what it said.

Nothing is teacher-forced: what a session says is what it reads in its next step. Draws are greedy.
"""

# Dimension key: S session rows, T ticks, K output steps.

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import TmlRuntimeError
from ...model import InteractionModel, KvBudget
from ...model.tick_input import TickInput
from .score import score
from .speech import Footage, Speech
from .stage import Episode
from .tasks import TASKS, make_episode
from .words import CONFIG

# Ten seconds of sound and pictures, so that an episode rolls the cache, and as much of what the
# model said itself as an episode is long: a count is remembered by having been said.
BUDGET = KvBudget(audio=200, video=64, reply=1536)
SHORT, LONG = 60, 300  # ticks of an episode
ROWS = 32  # sessions that live at a time
LOST = 0.05
EVALUATION = 2**40  # the first of an episode's seeds: no seed of a training run, which is smaller

Done = Callable[[int, int, str], None]  # tasks measured, of how many, the newest one's name


class NotHeldOut(TmlRuntimeError):
    """A recording to evaluate with that the model was trained on."""


def check_held_out(trained: Mapping[str, str], speech: Speech, footage: Footage) -> None:
    """Raises NotHeldOut. trained: SHA-256 by name, of a report's recordings."""
    for name, digest in {**speech.hashes, **footage.hashes}.items():
        for known, other in trained.items():
            if digest == other:
                raise NotHeldOut(
                    f"{name} is {known}, which the model was trained on: its figures would say "
                    "nothing about what it has not heard; give other recordings"
                )


def evaluate(
    folder: Path,
    speech: Speech,
    footage: Footage,
    *,
    episodes: int,
    long_episodes: int = 0,
    workers: int = 1,
    done: Done | None = None,
) -> dict[str, Any]:
    """Rows of figures by task: of clean episodes of SHORT ticks, of ones with LOST of their quiet
    ticks lost, and of counting for LONG. The caller has checked that recordings are held out.

    workers: processes that share the tasks; figures do not depend on how many. Raises
    CheckpointError.
    """
    plans = _plans(episodes, long_episodes)
    measure = partial(_measure, folder, speech, footage)
    figures: dict[str, Any] = {"clean": {}, "lossy": {}, "long": {}}
    with contextlib.ExitStack() as stack:
        measured = map(measure, plans)
        if workers > 1:
            pool = ProcessPoolExecutor(
                workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
            )
            measured = stack.enter_context(pool).map(measure, plans)
        for number, (plan, rows) in enumerate(zip(plans, measured, strict=True), 1):
            figures[plan.kind][plan.task] = rows
            if done is not None:
                done(number, len(plans), f"{plan.kind} {plan.task}")
    return figures


@dataclass(frozen=True)
class _Plan:
    """Of episodes that are measured together; `seed` and a number make each one's."""

    kind: str
    task: str
    seed: tuple[int, ...]
    num_ticks: int
    count: int


def _plans(episodes: int, long_episodes: int) -> list[_Plan]:
    counting = [task for task in TASKS if task.startswith("count")]
    kinds = [
        ("clean", TASKS, SHORT, episodes),
        ("lossy", TASKS, SHORT, episodes),
        ("long", counting, LONG, long_episodes),
    ]
    return [
        _Plan(kind, task, (EVALUATION, n, number), num_ticks, count)
        for n, (kind, tasks, num_ticks, count) in enumerate(kinds)
        for number, task in enumerate(tasks)
        if count > 0
    ]


def _measure(folder: Path, speech: Speech, footage: Footage, plan: _Plan) -> dict[str, Any]:
    model = InteractionModel.load(folder, config=CONFIG)
    made = [
        make_episode(
            plan.task,
            plan.num_ticks,
            np.random.SeedSequence([*plan.seed, n]),
            speech,
            footage,
            lose=LOST if plan.kind == "lossy" else 0.0,
        )
        for n in range(plan.count)
    ]
    return score(zip(made, live_through(model, made), strict=True)).rows()


@torch.inference_mode()
def live_through(model: InteractionModel, episodes: Sequence[Episode]) -> list[np.ndarray]:
    """What each said: int32 [T, K] tokens. Episodes of one length; ROWS live at a time."""
    said: list[np.ndarray] = []
    for first in range(0, len(episodes), ROWS):
        rows = episodes[first : first + ROWS]
        state = model.new_state(len(rows), budget=BUDGET)
        for slot in range(len(rows)):
            state.set_sampling(slot, temperature=0.0)
        ticks = [
            model.tick(state, tick_input(rows, tick)).token_S_K for tick in range(len(rows[0]))
        ]
        said += list(torch.stack(ticks, dim=1).numpy())
    return said


def tick_input(episodes: Sequence[Episode], tick: int) -> TickInput:
    """One tick of sessions in slots 0, 1, .."""
    return TickInput(
        slot_S=torch.arange(len(episodes), dtype=torch.int32),
        pcm_S_W=torch.from_numpy(np.stack([e.pcm_T_W[tick] for e in episodes])),
        missing_S=torch.tensor([bool(e.missing_T[tick]) for e in episodes]),
        frames=[e.frames_T_2_Y_Y_3[tick][None] if e.seen_T[tick] else None for e in episodes],
        text=[e.text[tick] for e in episodes],
    )
