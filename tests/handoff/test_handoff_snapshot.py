"""Snapshots of a session's state for the background model, on the tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from handoff_tools import ByHand, wait_for

from tml_kernels.kv_cache import OutOfPages, UnknownSession
from tml_runtime import InteractionModel, ModelConfig, Runtime
from tml_runtime.handoff import HandoffOptions, LocalModel, Request
from tml_runtime.model import ModelState, TickInput

# The live model never reads the answer.
NEVER: dict[str, Any] = {"idle_ticks": 10**6, "max_wait_ticks": 10**6}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def model(request: pytest.FixtureRequest) -> InteractionModel:
    return InteractionModel.random(ModelConfig.preset("tiny"), seed=0, device=request.param)


def silence(model: InteractionModel) -> TickInput:
    """What slot 0 hears when nobody pushes anything."""
    return TickInput(
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(1, model.config.layout.samples_per_tick),
        torch.tensor([True]),
        [None],
        [[]],
    )


def test_a_saved_snapshot_goes_on_as_the_session_does(
    model: InteractionModel, tmp_path: Path
) -> None:
    path = tmp_path / "snapshot"

    def answer(request: Request) -> str:
        assert request.snapshot is not None and request.snapshot.session.slot == 1
        request.snapshot.save(path)
        return "42"

    options = HandoffOptions(snapshots=1, **NEVER)
    runtime = Runtime(
        model, realtime=False, background=LocalModel(answer), handoff=options, num_slots=1
    )
    with runtime, runtime.open_session(seed=5) as session:
        session.push_text("hello")
        runtime.run_ticks(3)
        session.delegate("what?")
        runtime.run_ticks(4)  # the fork is taken at the beginning of the first
        live = runtime._state
        other = model.new_state(1)
        other.load(0, path)
        with torch.inference_mode():
            for _ in range(4):
                model.tick(other, silence(model))
        assert other.length(0) == live.length(0) > 0
        for name in ("token_N", "draws_N", "levels_N_F_B", "seed_N", "mlp_conv_L_N_3_D"):
            axis = 1 if name.startswith("mlp") else 0
            ours, theirs = (getattr(s, name).select(axis, 0) for s in (live, other))
            assert torch.equal(ours, theirs), name
        runtime.run_ticks(1)
        live.cache.check_invariants()


def test_spare_slots_run_out_and_come_back(model: InteractionModel, tmp_path: Path) -> None:
    background = ByHand()
    options = HandoffOptions(snapshots=1, wait=False, **NEVER)
    runtime = Runtime(model, realtime=False, background=background, handoff=options, num_slots=2)

    def ask(number: int) -> Request:
        sessions[number % 2].delegate("what?")
        runtime.run_ticks(1)
        wait_for(lambda: len(background.requests) == number + 1)
        return background.requests[number]

    with runtime:
        sessions = [runtime.open_session(), runtime.open_session()]
        runtime.run_ticks(1)
        assert runtime.report()["slots"] == 2
        first, second = ask(0), ask(1)
        assert first.snapshot is not None and first.snapshot.session.slot == 2
        assert second.snapshot is None
        background.give(0, "42", None)
        wait_for(lambda: runtime.report()["handoff"]["finished"] == 1)
        third = ask(2)
        assert third.snapshot is not None and third.snapshot.session.slot == 2
        sessions[0].close()
        runtime.run_ticks(1)
        wait_for(lambda: background.cancelled == [2])
        runtime.run_ticks(1)
        for snapshot in (first.snapshot, third.snapshot):
            with pytest.raises(UnknownSession):  # late, from a thread that nobody could stop
                snapshot.save(tmp_path / "late")
        assert list(tmp_path.iterdir()) == []
        sessions[0] = runtime.open_session()
        runtime.run_ticks(1)
        assert ask(3).snapshot is not None
        runtime._state.cache.check_invariants()


def test_a_fork_without_pages_is_a_request_without_a_snapshot(
    model: InteractionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[Request] = []

    def answer(request: Request) -> str:
        requests.append(request)
        return "42"

    options = HandoffOptions(snapshots=1, **NEVER)
    runtime = Runtime(model, realtime=False, background=LocalModel(answer), handoff=options)

    def no_pages(state: ModelState, slot: int, to_slot: int) -> None:
        raise OutOfPages

    with runtime, runtime.open_session() as session:
        with monkeypatch.context() as patch:
            patch.setattr(ModelState, "fork", no_pages)
            session.delegate("what?")
            runtime.run_ticks(2)
        session.delegate("and now?")
        runtime.run_ticks(2)
    assert [request.snapshot is None for request in requests] == [True, False]


def test_who_was_away_may_ask_as_it_comes_back(model: InteractionModel) -> None:
    requests: list[Request] = []

    def answer(request: Request) -> str:
        requests.append(request)
        return "42"

    options = HandoffOptions(snapshots=1, **NEVER)
    runtime = Runtime(
        model, realtime=False, background=LocalModel(answer), handoff=options, num_slots=2
    )
    with runtime:
        session, other = runtime.open_session(), runtime.open_session()
        runtime.run_ticks(2)
        session.pause()
        runtime.run_ticks(2)
        assert runtime._state.cache.is_suspended(runtime._state.session(0))
        session.delegate("what?")
        session.resume()
        runtime.run_ticks(2)
        assert [request.snapshot is None for request in requests] == [False]
        assert len(other.poll()) > 0 and len(session.poll()) > 0
