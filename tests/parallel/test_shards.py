"""Placing sessions on shards, and what is heard of one that ends."""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import json
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import jobs
import pytest
import torch.distributed as dist
from crew import Crew, Ended

from tml_runtime.errors import InputValueError, NotRunning, ResourceExhausted, ShardLost
from tml_runtime.parallel.shards import Shard, Shards


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Fleet:
    """Shards whose figures are published by hand, on a clock moved by hand."""

    def __init__(self, *capacities: int) -> None:
        self.store = dist.HashStore()
        self.clock = Clock()
        self.in_use = [0] * len(capacities)
        self.capacities = capacities
        self.shards = [self.start(i) for i in range(len(capacities))]
        self.reader = Shards(self.store, len(capacities), stale_s=2.0, clock=self.clock)

    def start(self, index: int) -> Shard:
        shard = Shard(
            self.store,
            index,
            address=f"host:{index}",
            capacity=self.capacities[index],
            in_use=lambda: self.in_use[index],
        )
        shard.publish()
        return shard


def test_the_shard_with_most_room_is_chosen() -> None:
    fleet = Fleet(2, 4, 3)
    chosen = [fleet.reader.place().index for _ in range(9)]
    assert chosen == [1, 1, 2, 0, 1, 2, 0, 1, 2]  # what it placed itself counts at once
    with pytest.raises(ResourceExhausted, match="9 of 9 sessions on 3 of 3 shards") as refused:
        fleet.reader.place()
    assert (refused.value.in_use, refused.value.capacity) == (9, 9)
    fleet.in_use[1] = 1  # the sessions placed there were never opened, but for one
    fleet.shards[1].publish()
    assert fleet.reader.place().index == 1


def test_a_key_stays_where_it_is() -> None:
    fleet = Fleet(100, 100, 100)
    keys = [f"user {n}" for n in range(60)]
    before = {key: fleet.reader.place(key).index for key in keys}
    assert set(before.values()) == {0, 1, 2}
    assert {key: fleet.reader.place(key).index for key in keys} == before
    with fleet.shards[1]:
        pass  # it leaves
    after = {key: fleet.reader.place(key).index for key in keys}
    assert all(after[key] == index for key, index in before.items() if index != 1)
    assert all(after[key] != 1 for key in keys)


def test_a_silent_shard_is_lost_and_the_others_are_not() -> None:
    fleet = Fleet(2, 2)
    first, second = fleet.reader.place(), fleet.reader.place()
    assert (first.index, second.index) == (0, 1)
    fleet.clock.now = 1.5
    fleet.shards[1].publish()
    fleet.reader.check(second)  # seen anew
    fleet.clock.now = 3.0
    with pytest.raises(ShardLost, match="shard 0 at host:0 has ended or is silent"):
        fleet.reader.check(first)
    fleet.reader.check(second)
    assert [figures.index for figures in fleet.reader.look()] == [1]
    assert fleet.reader.place().index == 1


def test_a_shard_that_started_anew_has_lost_its_sessions() -> None:
    fleet = Fleet(2)
    placement = fleet.reader.place()
    fleet.start(0)
    with pytest.raises(ShardLost, match="was started anew"):
        fleet.reader.check(placement)
    assert fleet.reader.place().life != placement.life


def test_no_shards_and_hostile_sizes() -> None:
    store = dist.HashStore()
    with pytest.raises(ResourceExhausted, match="0 of 0 sessions on 0 of 3 shards"):
        Shards(store, 3).place()
    with pytest.raises(InputValueError, match="num_shards=0"):
        Shards(store, 0)
    with pytest.raises(InputValueError, match="capacity=0"):
        Shard(store, 0, address="", capacity=0, in_use=lambda: 0)


def test_a_shard_whose_runtime_is_over_leaves() -> None:
    store, asked = dist.HashStore(), threading.Event()

    def in_use() -> int:
        if asked.is_set():
            raise NotRunning("the runtime was stopped")
        return 1

    shard = Shard(store, 0, address="", capacity=2, in_use=in_use, period_s=0.001)
    with shard:
        assert [figures.in_use for figures in Shards(store, 1).look()] == [1]
        asked.set()
        shard._thread.join(10)
        assert Shards(store, 1).look() == []


def test_a_shard_that_dies_takes_its_own_sessions_only(crew: Crew, tmp_path: Path) -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    results: list[object] = []
    job = threading.Thread(
        target=lambda: results.extend(crew.run(2, jobs.shard, tmp_path, "localhost", store.port))
    )
    job.start()
    try:
        store.wait(["shard/0", "shard/1"], timedelta(seconds=60))
        reader = Shards(store, 2, stale_s=5.0)  # a busy machine lets a beat wait
        placements = {p.index: p for p in (reader.place(), reader.place())}
        for index in (0, 1):
            store.set(f"open/{index}", "1")
            store.wait([f"opened/{index}"], timedelta(seconds=60))
        for placement in placements.values():
            reader.check(placement)
        store.set("die", "1")
        with pytest.raises(ShardLost, match="shard 1 at rank 1"):
            while True:
                reader.check(placements[1])
        reader.check(placements[0])
        assert reader.place().index == 0
    finally:
        store.set("over", "1")
        job.join(90)
    assert results == ["True", Ended(7)]


SCRIPT = """
import json
from tml_runtime.parallel.shards import Shard, Shards, job_store
store, rank, num_ranks = job_store()
with Shard(store, rank, address=f"port {8000 + rank}", capacity=2, in_use=lambda: 0):
    store.set(f"ready/{rank}", "1")
    store.wait([f"ready/{other}" for other in range(num_ranks)])
    if rank == 0:
        shards = Shards(store, num_ranks)
        print(json.dumps([shards.place().address for _ in range(3)]), flush=True)
    store.set(f"done/{rank}", "1")
    store.wait([f"done/{other}" for other in range(num_ranks)])
"""


@pytest.mark.slow
def test_shards_meet_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "shard.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["port 8000", "port 8001", "port 8000"]
