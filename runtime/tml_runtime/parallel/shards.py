"""Sessions over several processes, each with a runtime of its own: who has room, and who is gone.

A shard publishes its figures in a store that all of them reach (torch's TCPStore, which torchrun
hosts); whoever opens sessions reads them there and places each on the shard with most room. Shards
know nothing of each other: one that ends takes its own sessions with it and no others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..errors import InputValueError, NotRunning, ResourceExhausted, ShardLost
from ..loop import Runtime

PREFIX = "tml-shards"
GONE = "gone"  # of a shard that left; a key that is deleted may be waited for


def job_store(*, timeout_s: float = 60.0) -> tuple[Store, int, int]:
    """(store, rank, number of ranks) of a torchrun job. Raises ValueError where its environment is
    not set, RuntimeError where the store does not answer."""
    store, rank, num_ranks = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    return PrefixStore(PREFIX, store), rank, num_ranks


@dataclass(frozen=True)
class ShardFigures:
    """What a shard last said of itself. life: new whenever its process starts anew."""

    index: int
    life: str
    address: str  # where its clients connect
    capacity: int  # sessions
    in_use: int
    beat: int  # counts what it published

    @property
    def free(self) -> int:
        return self.capacity - self.in_use


class Shard:
    """This process as one of the shards. A context manager, within which a thread publishes its
    figures every `period_s`; where `in_use` raises, the runtime is over, and the shard leaves.

    store: of `job_store`, or any other store of torch. in_use: sessions now, called by that thread;
    for a runtime `lambda: sessions_of(runtime)`.
    """

    def __init__(
        self,
        store: Store,
        index: int,
        *,
        address: str,
        capacity: int,
        in_use: Callable[[], int],
        period_s: float = 0.5,
    ) -> None:
        if index < 0 or capacity < 1:
            raise InputValueError(f"index={index}, capacity={capacity}: expected >= 0 and >= 1")
        self._store = store
        self._figures = ShardFigures(index, uuid.uuid4().hex, address, capacity, 0, 0)
        self._in_use = in_use
        self._period_s = period_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tml-shard", daemon=True)

    def __enter__(self) -> Shard:
        self.publish()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def publish(self) -> None:
        """Say how many sessions there are now, and that this process is alive."""
        beat = self._figures.beat + 1
        self._figures = replace(self._figures, in_use=self._in_use(), beat=beat)
        self._store.set(_key(self._figures.index), json.dumps(vars(self._figures)))

    def _run(self) -> None:
        # The runtime was stopped or has failed, or the store is gone: then no beat comes either.
        with contextlib.suppress(NotRunning, RuntimeError):
            while not self._ended.wait(self._period_s):
                self.publish()
        with contextlib.suppress(RuntimeError):
            self._store.set(_key(self._figures.index), GONE)


def sessions_of(runtime: Runtime) -> int:
    """Slots that are taken. Raises NotRunning, LoopFailed where the runtime is over."""
    runtime.check_alive()
    return runtime.slots_in_use


@dataclass(frozen=True)
class Placement:
    """Where a session is to be opened: connect to `address`."""

    index: int
    life: str
    address: str


class Shards:
    """Places sessions on shards 0..num_shards-1. For one thread at a time.

    A shard counts as alive while its figures change within `stale_s` by this process's clock; the
    first ones seen are taken at their word.
    """

    def __init__(
        self,
        store: Store,
        num_shards: int,
        *,
        stale_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if num_shards < 1:
            raise InputValueError(f"num_shards={num_shards} is less than 1")
        self._store = store
        self._num_shards = num_shards
        self._stale_s = stale_s
        self._clock = clock
        self._seen: dict[int, tuple[ShardFigures, float]] = {}  # newest figures, and since when
        self._placed: dict[int, int] = {}  # since these figures

    def look(self) -> list[ShardFigures]:
        """Shards that are alive, with what was placed on them since they last spoke."""
        now, alive = self._clock(), []
        for index in range(self._num_shards):
            figures = self._read(index)
            if figures is None:
                self._seen.pop(index, None)
                continue
            before = self._seen.get(index)
            if before is None or (before[0].life, before[0].beat) != (figures.life, figures.beat):
                self._seen[index] = (figures, now)
                self._placed[index] = 0
            elif now - before[1] > self._stale_s:
                continue
            placed = figures.in_use + self._placed[index]
            alive.append(replace(figures, in_use=min(placed, figures.capacity)))
        return alive

    def place(self, key: str | None = None) -> Placement:
        """A shard with room for one more session: the one with most, and of these the first.

        With a key, the same one for the same key as long as it is alive and has room; another
        shard's coming or going moves only its own keys. Raises ResourceExhausted with figures.
        """
        alive = self.look()
        free = [figures for figures in alive if figures.free > 0]
        if not free:
            in_use, capacity = (sum(getattr(f, x) for f in alive) for x in ("in_use", "capacity"))
            raise ResourceExhausted(
                f"{in_use} of {capacity} sessions on {len(alive)} of {self._num_shards} shards are "
                "in use: try again when one has ended",
                reason="slots",
                in_use=in_use,
                closing=0,
                capacity=capacity,
            )
        if key is None:
            chosen = min(free, key=lambda f: (-f.free, f.index))
        else:
            chosen = max(free, key=lambda f: _weight(key, f.index))
        self._placed[chosen.index] += 1
        return Placement(chosen.index, chosen.life, chosen.address)

    def check(self, placement: Placement) -> None:
        """Raises ShardLost where the process a session was placed on is gone, or started anew."""
        alive = {figures.index: figures.life for figures in self.look()}
        life = alive.get(placement.index)
        if life != placement.life:
            what = "has ended or is silent" if life is None else "was started anew"
            raise ShardLost(
                f"shard {placement.index} at {placement.address} {what}: its sessions are lost; "
                "open another one"
            )

    def _read(self, index: int) -> ShardFigures | None:
        if not self._store.check([_key(index)]):
            return None
        figures = self._store.get(_key(index))
        return None if figures == GONE.encode() else ShardFigures(**json.loads(figures))


def _key(index: int) -> str:
    return f"shard/{index}"


def _weight(key: str, index: int) -> bytes:
    return hashlib.blake2b(f"{index}/{key}".encode(), digest_size=8).digest()
