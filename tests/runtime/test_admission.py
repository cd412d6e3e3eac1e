"""How many sessions are let in, from made-up costs, and what a refusal says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fake_model import MS40, FakeModel, make_runtime

from tml_runtime import ModelConfig, errors
from tml_runtime.admission import Admission, measure
from tml_runtime.handoff import HandoffOptions, LocalModel
from tml_runtime.model import KvBudget
from tml_runtime.overload import CALM, Overload
from tml_runtime.slots import Slots


@pytest.mark.parametrize(
    ("costs", "num_slots", "expected", "measured"),
    [
        (lambda rows: 10.0 * rows, 8, 8, [1, 2, 4, 8]),
        (lambda rows: 30.0 * rows, 8, 6, [1, 2, 4, 6, 7, 8]),
        (lambda rows: 60.0 * rows, 64, 3, [1, 2, 3, 4]),
        (lambda rows: 500.0, 64, 1, [1]),  # one is always let in
        (lambda rows: 180.0, 1, 1, [1]),
    ],
)
def test_as_many_as_were_in_time(costs, num_slots: int, expected: int, measured: list[int]) -> None:
    by_time, table = measure(costs, num_slots=num_slots, num_ticks=3, period_ms=200)
    assert by_time == expected
    assert [probe.rows for probe in table] == measured
    assert [probe.fits for probe in table] == [costs(rows) <= 180 for rows in measured]


def test_one_slow_tick_of_a_thousand_does_not_count_and_two_do() -> None:
    for num_slow, expected in ((1, 2), (2, 1)):
        calls = iter(range(10_000))
        costs = [500.0 if n < num_slow else 1.0 for n in range(1000)]
        by_time, table = measure(
            lambda rows: 1.0 if rows == 1 else costs[next(calls)],  # noqa: B023
            num_slots=2,
            num_ticks=1000,
            period_ms=200,
        )
        assert (by_time, table[1].p999_ms) == (expected, 1.0 if num_slow == 1 else 500.0)


def test_a_refusal_says_why() -> None:
    _, table = measure(lambda rows: 80.0 * rows, num_slots=8, num_ticks=2, period_ms=200)
    by_time = Admission(8, by_time=2, table=table)
    by_time.check(1, 0)
    by_time.check(2, 1)  # one of them leaves with the next tick
    with pytest.raises(errors.ResourceExhausted, match=r"3 sessions .*of 3: 240\.0 ms") as caught:
        by_time.check(2, 0)
    error = caught.value
    assert (error.reason, error.in_use, error.capacity) == ("time", 2, 2)
    with pytest.raises(errors.ResourceExhausted, match="budgets fit 3 times") as caught:
        Admission(8, by_pages=3).check(3, 0)
    assert caught.value.reason == "pages"
    with pytest.raises(errors.ResourceExhausted, match="all 8 slots") as caught:
        Admission(8, by_time=2).check(8, 7)
    assert caught.value.reason == "slots"


def test_a_runtime_probes_and_refuses() -> None:
    model = FakeModel(config=ModelConfig.preset("tiny", layout=MS40))
    runtime, _ = make_runtime(model, num_slots=3, realtime=True, probe_ticks=2)
    with runtime:
        admission = runtime.report()["admission"]
        assert admission["limit"] == admission["by_time"] >= 1
        assert [probe["ticks"] for probe in admission["table"]] == [2] * len(admission["table"])
        assert runtime._state.resets[0] >= 2  # nothing of the probe is left
        assert runtime._state.memory == [0.0] * 3


def test_pages_bound_the_sessions() -> None:
    budget = KvBudget(anchor=64, text=64, audio=64, video=64, reply=64)  # two pages each
    runtime, _ = make_runtime(num_slots=3, budget=budget, global_pages=21)
    with runtime:
        first, _second = runtime.open_session(), runtime.open_session()
        with pytest.raises(errors.ResourceExhausted, match="3 sessions need more pages"):
            runtime.open_session()
        first.close()
        runtime.open_session()


@pytest.mark.parametrize(("pages", "options"), [(10, {}), (20, {"snapshots": 1})])
def test_pages_for_no_session_at_all_are_refused(pages: int, options: dict) -> None:
    budget = KvBudget(anchor=64, text=64, audio=64, video=64, reply=64)  # ten pages, and page 0
    handoff = {"background": LocalModel(str), "handoff": HandoffOptions(**options)}
    with pytest.raises(errors.InputValueError, match=f"global_pages={pages}: .* takes 10"):
        make_runtime(budget=budget, global_pages=pages, **handoff)


def test_video_is_shed_before_text_and_both_come_back() -> None:
    overload = Overload()
    history = []
    for missed in [True, False, True, True, True, *[False] * 2 * CALM]:
        overload.observe(missed)
        history.append(overload.shed)
    assert history[:5] == [0, 0, 1, 2, 2]
    assert history[5:] == [2] * (CALM - 1) + [1] * CALM + [0]
    for _ in range(20):  # a miss now and then is no overload
        for missed in (True, *[False] * 5):
            overload.observe(missed)
        assert overload.shed == 0


@pytest.mark.parametrize(("in_time", "shed"), [(3, 1), (4, 0)])
def test_two_misses_of_five_ticks_are_overload(in_time: int, shed: int) -> None:
    overload = Overload()
    for missed in (True, *[False] * in_time, True):
        overload.observe(missed)
    assert overload.shed == shed


def test_under_overload_only_audio_is_heard() -> None:
    late_ns = 250_000_000
    model = FakeModel(on_tick=lambda n: runtime.clock.advance(late_ns * (n in (1, 2, 3))))
    runtime, _ = make_runtime(model)
    with runtime, runtime.open_session() as session:
        texts = 0
        for tick in range(40):
            session.push_audio(np.full(16_000 // 5, 0.5, np.float32), session.open_t)
            session.push_video(np.zeros((40, 40, 3), np.uint8), session.open_t)
            session.push_text([tick])
            texts += 1
            runtime.run_ticks(1)
        seen = [rows[0].frames is not None for rows in model.heard]
        assert session.stats.shed_frames == 40 - sum(seen)  # each is seen or counted
        read = [rows[0].text for rows in model.heard]
    assert seen[:3] == [True] * 3 and not any(seen[4:10]) and all(seen[-5:])
    assert read[5:8] == [[], [], []]
    assert [token for ids in read for token in ids] == list(range(texts))  # none is lost
    assert all(rows[0].pcm.any() for rows in model.heard[4:])


def test_a_slot_that_is_freed_while_somebody_asks_is_not_given_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime, _ = make_runtime(num_slots=4)
    with runtime:
        runtime._admission = replace(runtime._admission, by_time=2)
        first, closing = runtime.open_session(), runtime.open_session()
        runtime.run_ticks(1)
        monkeypatch.setattr(runtime, "_release", lambda: None)  # as in real time: nobody waits
        closing.close()
        second = runtime.open_session()  # two, and one that closes

        def swept(slots: Slots) -> int:
            slots.sweep()
            return len(slots._free)

        monkeypatch.setattr(Slots, "num_free", property(swept))
        with pytest.raises(errors.ResourceExhausted):
            runtime.open_session()
        active = [seat for seat in runtime._slots.seats() if not seat.over]
        assert active == [first._seat, second._seat]


def test_after_a_probe_of_few_rows_all_fit() -> None:
    runtime, _ = make_runtime(num_slots=4)
    with runtime:
        runtime._batch.silent(2)
        sessions = [runtime.open_session() for _ in range(4)]
        runtime.run_ticks(2)
        assert all(len(session.poll()) > 0 for session in sessions)
