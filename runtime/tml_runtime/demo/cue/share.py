"""A step's gradients, in shares that are averaged: one process takes them in turn, or each has one.

Both give the same bits: a share is one thread's work, and shares are added in their order.
"""

# Dimension key: E experts.

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
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
from .optimiser import leaves
from .speech import Footage, Speech

SHARES = 2  # of a step, each of which draws its own episodes


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
    """Processes that take all shares but the first; a context manager. For one thread.

    The weights move to memory that all of them share, where the optimiser changes them while the
    others wait. With num = 1 there is no other process.
    """

    def __init__(self, num: int, weights: ModelWeights, speech: Speech, footage: Footage) -> None:
        self._weights, self._media = weights, (speech, footage)
        self._leaves = dict(leaves(weights))
        self._others: list[_Other] = []
        context = torch.multiprocessing.get_context("spawn")
        for _ in range(min(num, SHARES) - 1):
            for tensor in self._leaves.values():
                tensor.share_memory_()
            gradients = {
                name: torch.zeros_like(x, requires_grad=False).share_memory_()
                for name, x in self._leaves.items()
            }
            here, there = context.Pipe()
            arguments = (there, weights, gradients, speech, footage)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            there.close()
            self._others.append(_Other(process, here, gradients))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for other in self._others:
            other.pipe.close()
            other.process.join()

    def take(self, shares: list[Share]) -> list[Taken]:
        """All shares of one step; the gradients of the weights are its own from here on. Raises
        WorkerEnded."""
        own = len(shares) - len(self._others)
        try:
            for share, other in zip(shares[own:], self._others, strict=True):
                other.pipe.send(share)
            taken = [take_share(self._weights, share, *self._media) for share in shares[:own]]
            for other in self._others:
                names, its = other.pipe.recv()
                self._add(names, other.gradients)
                taken.append(its)
        except (EOFError, OSError) as error:
            raise WorkerEnded(
                "a process of the training ended: the same command goes on from the last saved step"
            ) from error
        return taken

    def _add(self, names: list[str], gradients: Mapping[str, Tensor]) -> None:
        for name in names:
            weight = self._leaves[name]
            if weight.grad is None:
                weight.grad = gradients[name].clone()
            else:
                weight.grad += gradients[name]


class _Other(NamedTuple):
    """A process, and where it leaves its gradients."""

    process: BaseProcess
    pipe: Connection
    gradients: dict[str, Tensor]


def _work(
    pipe: Connection,
    weights: ModelWeights,
    gradients: Mapping[str, Tensor],
    speech: Speech,
    footage: Footage,
) -> None:
    """Takes shares until the other end is closed; Ctrl-C is for that end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    own = dict(leaves(weights))
    with suppress(EOFError, OSError):
        while True:
            taken = take_share(weights, pipe.recv(), speech, footage)
            names = []
            for name, weight in own.items():
                if weight.grad is not None:
                    gradients[name].copy_(weight.grad)
                    weight.grad = None
                    names.append(name)
            pipe.send((names, taken))


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """This thread takes numbers below 2^-126 for zero. What softmax gives back to keys that are
    hardly looked at is full of them, and products of them are a hundred times as slow."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
