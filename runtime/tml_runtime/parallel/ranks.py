"""The ranks that run one model together: how they are joined, and the few collectives they use.

Activations go over the data group (NCCL between GPUs, gloo between CPUs), everything else over
gloo. Collectives only gather and broadcast: nothing is reduced, so no sum has another order than on
one rank. A collective that cannot end raises RankLost after `timeout_s` seconds at the latest.
"""

# Dimension key: N ranks, W columns of one rank.

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .. import _env
from ..errors import InputTypeError, InputValueError, RankLost, RanksDiffer
from ..model.config import ModelConfig
from ..model.weights import LayerWeights, ModelWeights
from . import share

FIRST_BLOCK = 1 << 14  # bytes of the first part of a message, at first
LARGEST_BLOCK = 1 << 20
HEAD = 8  # bytes that hold a message's length


class Ranks:
    """This process's place among the `size` ranks of one model. Made by `join`.

    For one thread at a time, the same one that runs the model; calls must come in the same order on
    all ranks. checked: digests are compared after every tick (TML_CHECK_RANKS=1).
    """

    def __init__(
        self,
        members: list[int],
        *,
        data: dist.ProcessGroup,
        control: dist.ProcessGroup,
        start: dist.ProcessGroup,
        timeout_s: float,
        device: torch.device,
    ) -> None:
        self.size = len(members)
        self.rank = members.index(dist.get_rank())
        self.replica = members[0] // self.size  # which of several models side by side
        self.device = device
        self.timeout_s = timeout_s
        self.checked = _env.check_ranks()
        self.lost = False  # a collective has failed
        self._lead = members[0]
        self._data, self._control, self._start = data, control, start
        self._block = FIRST_BLOCK

    @classmethod
    def join(
        cls,
        *,
        tensor: int | None = None,
        device: torch.device | str = "cpu",
        timeout_s: float = 30.0,
        start_timeout_s: float = 600.0,
        init_method: str = "env://",
        rank: int = -1,
        world_size: int = -1,
    ) -> Ranks:
        """Meet the other ranks; every process of the job calls it with the same arguments.

        tensor: ranks of one model, by default all of the job; of a larger job every `tensor`
        consecutive ranks make a model of their own. device: "cpu" or this rank's GPU, which becomes
        the current one. timeout_s: the longest a collective may take, and a follower may wait for
        its leader. start_timeout_s: the same until all ranks have their weights. The last three are
        those of `torch.distributed.init_process_group`; torchrun sets what "env://" reads. Raises
        InputValueError for sizes that do not fit, RankLost where others do not come.
        """
        device = torch.device(device)
        for name, value in {"timeout_s": timeout_s, "start_timeout_s": start_timeout_s}.items():
            if not 0.0 < value < float("inf"):
                raise InputValueError(f"{name}={value} is not a positive number of seconds")
        # Before anybody connects: who is refused then is gone while others still do.
        if not dist.is_initialized() and (known := _size_of_job(world_size)) is not None:
            _checked_tensor(tensor, known)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        long, short = timedelta(seconds=start_timeout_s), timedelta(seconds=timeout_s)
        try:
            if not dist.is_initialized():
                dist.init_process_group(
                    "gloo", init_method=init_method, rank=rank, world_size=world_size, timeout=long
                )
            world = dist.get_world_size()
            tensor = _checked_tensor(tensor, world)
            backend = "nccl" if device.type == "cuda" else "gloo"
            mine: dict[str, Any] = {}
            members: list[int] = []
            for first in range(0, world, tensor):  # every rank makes every group
                some = list(range(first, first + tensor))
                made = {
                    "data": dist.new_group(some, backend=backend, timeout=short),
                    "control": dist.new_group(some, backend="gloo", timeout=short),
                    "start": dist.new_group(some, backend="gloo", timeout=long),
                }
                if dist.get_rank() in some:
                    members, mine = some, made
        except RuntimeError as error:
            raise _lost(f"joining the other ranks ({error})", start_timeout_s) from error
        return cls(members, **mine, timeout_s=timeout_s, device=device)

    def gather(self, x_W: Tensor) -> Tensor:
        """[..., N W]: the columns [..., W] of all ranks, in the order of ranks; a new tensor."""
        x_W = x_W.contiguous()
        received_N_W = x_W.new_empty(self.size, *x_W.shape)
        with self._named("gathering activations"):
            dist.all_gather_into_tensor(received_N_W.view(-1), x_W.view(-1), group=self._data)
        gathered_N_W = received_N_W.movedim(0, -2)
        return gathered_N_W.clone(memory_format=torch.contiguous_format).flatten(-2)

    def agree(self, facts: Mapping[str, object]) -> None:
        """RanksDiffer, on every rank, unless all ranks have the same facts; waits for all."""
        mine = {name: str(value) for name, value in facts.items()}
        everyone: list[dict[str, str]] = [{}] * self.size
        with self._named("comparing what the ranks run"):
            dist.all_gather_object(everyone, mine, group=self._start)
        for name in sorted(set().union(*everyone)):
            found = [theirs.get(name, "nothing") for theirs in everyone]
            other = next((r for r, value in enumerate(found) if value != found[0]), None)
            if other is not None:
                raise RanksDiffer(f"{name}: {found[0]} on rank 0, {found[other]} on rank {other}")

    def check(self, what: str, tensors: Iterable[Tensor]) -> None:
        """RanksDiffer, on every rank, unless these tensors hold the same bits on all of them."""
        mine = torch.tensor([digest(tensors)])
        everyone_N = torch.empty(self.size, dtype=torch.int64)
        with self._named(f"comparing {what}"):
            dist.all_gather_into_tensor(everyone_N, mine, group=self._control)
        other = next((r for r, x in enumerate(everyone_N.tolist()) if x != everyone_N[0]), None)
        if other is not None:
            raise RanksDiffer(f"{what}: rank {other} has other bits than rank 0")

    def broadcast(self, message: np.ndarray | None) -> np.ndarray:
        """Rank 0's message, uint8, on every rank; others give None.

        One broadcast of a block that holds the message's length and beginning; a second one where
        it is longer. The block grows to the longest message so far, up to 1 MiB, so that only
        pictures and prompts take two.
        """
        block = np.zeros(self._block, np.uint8)
        if message is not None:
            block[:HEAD] = np.array([len(message)], np.int64).view(np.uint8)
            head = message[: len(block) - HEAD]
            block[HEAD : HEAD + len(head)] = head
        self._send(block)
        length, held = int(block[:HEAD].view(np.int64)[0]), len(block) - HEAD
        if length <= held:
            return block[HEAD : HEAD + length]
        rest = np.empty(length - held, np.uint8) if message is None else message[held:].copy()
        self._send(rest)
        grown = 1 << (length + HEAD - 1).bit_length()
        self._block = max(self._block, min(grown, LARGEST_BLOCK))
        return np.concatenate([block[HEAD:], rest])

    def check_config(self, config: ModelConfig, **facts: object) -> None:
        """InputValueError where the ranks cannot share the model, RanksDiffer unless all are about
        to make the same one."""
        share.check_sizes(config, self.size)
        mine = {f"config.{field.name}": getattr(config, field.name) for field in fields(config)}
        versions = {"torch": torch.__version__, "TML_CHECK_RANKS": self.checked}
        self.agree({**mine, **facts, **versions})

    def share_config(self, config: ModelConfig) -> ModelConfig:
        return share.share_config(config, self.size)

    def share_layer(self, config: ModelConfig, layer: int, w: LayerWeights) -> LayerWeights:
        return share.share_layer(config, layer, w, self.rank, self.size)

    def share_ends(self, weights: ModelWeights) -> ModelWeights:
        return share.share_ends(weights, self.rank, self.size)

    def leave(self) -> None:
        """Leave the job. What other ranks still wait for then raises there."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Torch's errors, which name sockets and timeouts, as one that says what was being done.
        After one nothing is sent any more: ranks are no longer at the same place."""
        if self.lost:
            raise RankLost(f"{what}: another rank was lost before")
        try:
            yield
        except RuntimeError as error:
            self.lost = True
            raise _lost(what, self.timeout_s) from error

    def _send(self, block: np.ndarray) -> None:
        what = "sending a tick to the other ranks" if self.rank == 0 else "waiting for rank 0"
        with self._named(what):
            dist.broadcast(torch.from_numpy(block), src=self._lead, group=self._control)


def digest(tensors: Iterable[Tensor]) -> int:
    crc = 0
    for tensor in tensors:
        bits = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        crc = zlib.crc32(bits.numpy().data, crc)
    return crc


def _size_of_job(world_size: int) -> int | None:
    """As `init_process_group` will have it; None where that is not known yet."""
    if world_size > 0:
        return world_size
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdecimal() and int(size) > 0 else None


def _checked_tensor(tensor: int | None, world: int) -> int:
    if tensor is None:
        return world
    if type(tensor) is not int:
        raise InputTypeError(f"tensor={tensor!r}: expected an int")
    if tensor < 1 or world % tensor:
        raise InputValueError(f"tensor={tensor} does not divide the {world} ranks of the job")
    return tensor


def _lost(what: str, timeout_s: float) -> RankLost:
    """torch's own words, which may name hosts, are in its `__cause__` alone."""
    return RankLost(f"{what}: another rank has ended, failed or not answered for {timeout_s:g} s")
