"""A rank that ends or is silent ends the others with an error, in bounded time."""

from __future__ import annotations

from pathlib import Path

import jobs
import pytest
from crew import Crew, Ended, Raised


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_follower_that_dies_is_heard_of_by_every_client(
    crew: Crew, tmp_path: Path, num_ranks: int
) -> None:
    leader, dead, *others = crew.run(num_ranks, jobs.dying_follower, tmp_path)
    assert str(leader).startswith("RankLost") and "127.0.0.1" not in str(leader), leader
    assert dead == Ended(7)
    assert all(isinstance(r, Raised) and r.kind == "RankLost" for r in others), others


def test_a_leader_that_dies_ends_its_followers(crew: Crew, tmp_path: Path) -> None:
    dead, *others = crew.run(2, jobs.dying_leader, tmp_path)
    assert dead == Ended(7)
    assert all(isinstance(r, Raised) and r.kind == "RankLost" for r in others), others


def test_a_silent_leader_ends_its_followers(crew: Crew, tmp_path: Path) -> None:
    silent, follower = crew.run(2, jobs.silent_leader, tmp_path)
    assert silent == 0
    assert isinstance(follower, Raised) and follower.kind == "RankLost"
    assert "waiting for rank 0" in follower.message and "1 s" in follower.message
