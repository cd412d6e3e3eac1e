"""Lets a checkpoint live through episodes as sessions do, tick by tick, and scores what it said.

Nothing is teacher-forced: what a session says is what it reads in its next step. Draws are greedy.
"""

# Dimension key: S session rows, T ticks, K output steps.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

# Ten seconds of sound and pictures, so that an episode rolls the cache, and as much of what the
# model said itself as an episode is long: a count is remembered by having been said.
BUDGET = KvBudget(audio=200, video=64, reply=1536)
SHORT, LONG = 60, 300  # ticks of an episode
ROWS = 16  # sessions that live at a time
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
    model: InteractionModel,
    speech: Speech,
    footage: Footage,
    *,
    episodes: int,
    long_episodes: int = 0,
    done: Done | None = None,
) -> dict[str, Any]:
    """Rows of figures by task: of clean episodes of SHORT ticks, of ones with LOST of their quiet
    ticks lost, and of counting for LONG. The caller has checked that recordings are held out.
    """
    figures: dict[str, Any] = {"clean": {}, "lossy": {}, "long": {}}
    counting = [task for task in TASKS if task.startswith("count")]
    plans = [
        ("clean", TASKS, SHORT, episodes),
        ("lossy", TASKS, SHORT, episodes),
        ("long", counting, LONG, long_episodes),
    ]
    total, measured = sum(len(tasks) for _, tasks, _, count in plans if count), 0
    for plan, (kind, tasks, num_ticks, count) in enumerate(plans):
        for number, task in enumerate(tasks):
            made = [
                make_episode(
                    task,
                    num_ticks,
                    np.random.SeedSequence([EVALUATION, plan, number, n]),
                    speech,
                    footage,
                    lose=LOST if kind == "lossy" else 0.0,
                )
                for n in range(count)
            ]
            if made:
                said = live_through(model, made)
                figures[kind][task] = score(zip(made, said, strict=True)).rows()
                measured += 1
                if done is not None:
                    done(measured, total, f"{kind} {task}")
    return figures


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
