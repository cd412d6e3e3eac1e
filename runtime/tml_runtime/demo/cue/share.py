"""A step in two shares, whose gradients are averaged: one process takes both, or each of two takes
one and then moves half of the weights.

Both give the same bits: a share is one thread's work, and so is the move of a weight.
"""

# Dimension key: E experts.

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import numpy as np
import torch
import torch.multiprocessing
from torch import Tensor

from ...errors import TmlRuntimeError
from ...model.weights import ModelWeights
from .batch import make_batch
from .lessons import draw_episodes, lesson_at
from .loss import Loss, batch_loss
from .optimiser import Optimiser, halves, leaves
from .speech import Footage, Speech

SHARES = 2  # of a step: each draws its own episodes


class WorkerEnded(TmlRuntimeError):
    """A process that took a share is gone; says what to do."""


@dataclass(frozen=True)
class Share:
    """What is to be taken. done: the share of the run that is over; losses: by task, so far."""

    seed: int
    step: int
    number: int
    done: float
    losses: Mapping[str, float]


@dataclass(frozen=True)
class Taken:
    """What there is of a share beside its gradients. loads: tokens of each expert, int64 [E] of
    each sparse layer."""

    loss: Loss
    loads: list[np.ndarray]
    cpu_seconds: float


def take_share(weights: ModelWeights, share: Share, speech: Speech, footage: Footage) -> Taken:
    """Adds the share's part of the step's gradients to those of the weights."""
    begin = time.process_time()
    key = (share.seed, share.step, share.number)
    rng = np.random.default_rng([1, *key])
    lesson = lesson_at(share.done)
    episodes = draw_episodes(key, lesson, share.losses, speech, footage)
    keep = [None if rng.random() < 0.5 else int(rng.integers(16, 64)) for _ in episodes]
    garble, slips = lesson.draw_garble(rng), lesson.draw_slips(rng)
    batch = make_batch(episodes, rng, garble=garble, slips=slips, keep_ticks=keep)
    loads: list[Tensor] = []
    with flushed_denormals():
        total, loss = batch_loss(weights, batch, episodes, rng, lesson, loads)
        (total / SHARES).backward()
    return Taken(loss, [load_E.numpy() for load_E in loads], time.process_time() - begin)


class Workers:
    """This process, and maybe another one; a context manager. For one thread.

    With another one, the weights and the optimiser's state lie in memory that both have.
    """

    def __init__(
        self,
        num: int,
        weights: ModelWeights,
        optimiser: Optimiser,
        speech: Speech,
        footage: Footage,
    ) -> None:
        self._weights, self._optimiser, self._media = weights, optimiser, (speech, footage)
        self._other: _Other | None = None
        if num == 1:
            return
        for tensor in (*optimiser.weights.values(), *optimiser.state.values()):
            tensor.share_memory_()
        own, its = (
            {
                name: torch.zeros_like(x, requires_grad=False).share_memory_()
                for name, x in half.items()
            }
            for half in halves(optimiser.weights)
        )
        context = torch.multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        arguments = (there, weights, optimiser.state, its, own, speech, footage)
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        there.close()
        self._other = _Other(process, here, own, its)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._other is not None:
            self._other.pipe.close()
            self._other.process.join()

    def run_step(self, shares: Sequence[Share], num_steps: int) -> tuple[list[Taken], float]:
        """Takes both shares of a step and moves all weights by them; what was taken, and the CPU
        seconds of the move. Raises WorkerEnded."""
        if self._other is None:
            taken = [take_share(self._weights, share, *self._media) for share in shares]
            return taken, _move(self._optimiser, shares[0].step, num_steps, None, {})
        mine, its = shares
        _, pipe, to_move, for_other = self._other
        try:
            pipe.send(its)
            taken = take_share(self._weights, mine, *self._media)
            its_taken, names = pipe.recv()
            pipe.send((num_steps, _give(self._optimiser, for_other)))
            found = {name: to_move[name] for name in names}
            seconds = _move(self._optimiser, mine.step, num_steps, to_move, found)
            return [taken, its_taken], seconds + pipe.recv()
        except (EOFError, OSError) as error:
            raise WorkerEnded(
                "a process of the training ended: the same command goes on from the last saved step"
            ) from error


class _Other(NamedTuple):
    """A process, and memory for gradients: those that it found for the weights that are moved here,
    and those found here for the weights that it moves."""

    process: BaseProcess
    pipe: Connection
    to_move: dict[str, Tensor]
    for_other: dict[str, Tensor]


def _work(
    pipe: Connection,
    weights: ModelWeights,
    state: dict[str, Tensor],
    to_move: dict[str, Tensor],
    for_other: dict[str, Tensor],
    speech: Speech,
    footage: Footage,
) -> None:
    """Takes shares and moves weights until the other end is closed; Ctrl-C is for that end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    optimiser = Optimiser(dict(leaves(weights)), state)
    with suppress(EOFError, OSError):
        while True:
            share = pipe.recv()
            taken = take_share(weights, share, speech, footage)
            pipe.send((taken, _give(optimiser, for_other)))
            num_steps, names = pipe.recv()
            found = {name: to_move[name] for name in names}
            pipe.send(_move(optimiser, share.step, num_steps, to_move, found))


def _give(optimiser: Optimiser, gradients: Mapping[str, Tensor]) -> list[str]:
    """Leaves there what this process has found for those weights; the names of those for which
    there is something."""
    names = []
    for name, gradient in gradients.items():
        weight = optimiser.weights[name]
        if weight.grad is not None:
            gradient.copy_(weight.grad)
            weight.grad = None
            names.append(name)
    return names


def _move(
    optimiser: Optimiser,
    step: int,
    num_steps: int,
    names: Iterable[str] | None,
    found: Mapping[str, Tensor],
) -> float:
    """All weights, or those of these names. found: gradients that come to those that are there.
    CPU seconds."""
    begin = time.process_time()
    for name, gradient in found.items():
        weight = optimiser.weights[name]
        if weight.grad is None:
            weight.grad = gradient.clone()
        else:
            weight.grad += gradient
    with flushed_denormals():
        optimiser.step(step, num_steps, names)
    return time.process_time() - begin


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """This thread takes numbers below 2^-126 for zero. What softmax gives back to keys that are
    hardly looked at is full of them, and products of them are a hundred times as slow."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
