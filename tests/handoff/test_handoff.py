"""Hand-off on the virtual clock: what reaches the model, in which tick, and what does not."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from fake_model import CONFIG, DELEGATE, MS40, SILENCE
from handoff_tools import (
    ASK,
    ASK_QUIETLY,
    QUIET,
    SPEAK,
    ByHand,
    line,
    make,
    read,
    script,
    wait_for,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tml_runtime import errors
from tml_runtime.handoff import HandoffOptions, LocalModel, Policy, Request, Turn
from tml_runtime.session import ActionOut
from tml_runtime.text import ByteTokenizer

ANSWER = LocalModel(lambda request: "42")
NO_ANSWER = "[notice] the background model did not answer: "


def test_without_a_background_model_delegate_is_an_action() -> None:
    runtime, model = make(None, script(QUIET, ASK))
    with runtime, runtime.open_session() as session:
        runtime.run_ticks(5)
        assert ActionOut("delegate", 0.4) in session.poll()
        with pytest.raises(errors.NotRunning, match="background="):
            session.delegate("what is it?")
    assert read(model) == [""] * 5 and runtime.report()["handoff"] is None


def test_the_request_is_the_conversation_so_far() -> None:
    requests: list[Request] = []

    def answer(request: Request) -> str:
        requests.append(request)
        return "42"

    said = [*map(ord, "so "), 0xC3], [0xA9, *ASK_QUIETLY[1:]], ASK
    runtime, _ = make(LocalModel(answer), script(*said))
    with runtime, runtime.open_session() as session:
        session.push_text("what is it?")
        runtime.run_ticks(1)
        session.push_text(" now")
        runtime.run_ticks(3)
    (request,) = requests
    assert (request.id, request.epoch, request.t, request.trigger) == (0, 0, 0.6, "delegate")
    assert request.snapshot is None
    assert request.turns == (
        Turn("user", "what is it?", 0.0),
        Turn("assistant", "so ", 0.2),
        Turn("user", " now", 0.2),
        Turn("assistant", "éi!", 0.4),  # the character that two ticks and a turn cut comes whole
    )


@pytest.mark.parametrize(
    ("policy", "tick", "text"),
    [
        (Policy.INTERRUPT, 2, "[result] 42 [/result]"),
        (Policy.SILENT, 2, "[silent result] 42 [/silent result]"),
        (Policy.WHEN_IDLE, 7, "[result] 42 [/result]"),
    ],
)
def test_when_a_result_begins(policy: Policy, tick: int, text: str) -> None:
    """The model delegates in tick 1 and speaks up to tick 4: it is idle after 5 and 6."""
    options = HandoffOptions(tokens_per_tick=40)
    runtime, model = make(ANSWER, script(QUIET, ASK, SPEAK, SPEAK, SPEAK), options=options)
    with runtime, runtime.open_session(handoff_policy=policy):
        runtime.run_ticks(10)
    assert read(model) == [""] * tick + [text] + [""] * (9 - tick)
    report = runtime.report()["handoff"]
    assert (report["started"], report["finished"], report["skipped"]) == (1, 1, 0)


def test_a_model_that_is_never_idle_gets_its_result_in_the_end() -> None:
    options = HandoffOptions(max_wait_ticks=3, tokens_per_tick=40)
    runtime, model = make(ANSWER, script(QUIET, ASK, *[SPEAK] * 20), options=options)
    with runtime, runtime.open_session():
        runtime.run_ticks(10)
    assert [tick for tick, text in enumerate(read(model)) if text] == [2 + 3]


@pytest.mark.parametrize(("said", "expected"), [(ASK, []), (ASK_QUIETLY, [2])])
def test_skip_if_busy(said: list[int], expected: list[int]) -> None:
    options = HandoffOptions(policy=Policy.SKIP_IF_BUSY, tokens_per_tick=40)
    runtime, model = make(ANSWER, script(QUIET, said, QUIET), options=options)
    with runtime, runtime.open_session():
        runtime.run_ticks(8)
    assert [tick for tick, text in enumerate(read(model)) if text] == expected
    assert runtime.report()["handoff"]["skipped"] == (expected == [])


@pytest.mark.parametrize("limit", [1, 2, 3, 63])
def test_neither_text_starves_the_other(limit: int) -> None:
    """limit: tokens of text that a tick takes."""
    layout = replace(MS40, max_text_tokens=limit + 1)
    options = HandoffOptions(policy=Policy.INTERRUPT, result=("<", ">"))
    runtime, model = make(
        LocalModel(lambda request: "a" * 30),
        lambda tick, slot: ASK_QUIETLY[:1] if tick == 0 else QUIET[:1],
        config=replace(CONFIG, layout=layout),
        options=options,
    )
    ticks = 70 if limit < 16 else 10
    with runtime, runtime.open_session() as session:
        session.push_text("c" * (limit * ticks))
        runtime.run_ticks(ticks)
        waited = 0
        for text in read(model)[1:]:
            assert len(text) == limit
            assert len(text.replace("c", "")) <= 16
            waited = 0 if "c" in text else waited + 1
            assert waited <= 1
    whole = "".join(read(model))
    assert whole.replace("c", "") == "<" + "a" * 30 + ">"


def test_answers_come_one_after_the_other() -> None:
    background = ByHand()
    options = HandoffOptions(policy=Policy.INTERRUPT, wait=False, tokens_per_tick=100)
    runtime, model = make(background, script(ASK_QUIETLY, ASK_QUIETLY), options=options)
    with runtime, runtime.open_session():
        runtime.run_ticks(2)
        background.give(1, "second,")  # it has begun, so the first one waits
        runtime.run_ticks(1)
        background.give(0, "first", None)
        runtime.run_ticks(1)
        background.give(1, " really", None)
        runtime.run_ticks(4)
    heard = [text for text in read(model) if text]
    assert heard[:2] == ["[result] second,", " really [/result]"]
    assert "".join(heard[2:]) == "[result] first [/result]"
    assert background.closed == 1


@pytest.mark.parametrize("begun", [False, True])
def test_what_was_asked_before_an_interruption_is_dropped(begun: bool) -> None:
    background = ByHand()
    options = HandoffOptions(policy=Policy.INTERRUPT, wait=False)
    runtime, model = make(
        background, script(ASK_QUIETLY, QUIET, QUIET, ASK_QUIETLY), options=options
    )
    with runtime, runtime.open_session() as session:
        runtime.run_ticks(1)
        background.give(0, *(["an answer of some length"] if begun else []))
        runtime.run_ticks(1)
        session.interrupt(0.0)
        runtime.run_ticks(1)
        wait_for(lambda: background.cancelled == [0])
        assert background.requests[0].cancelled.is_set()
        runtime.run_ticks(1)
        background.give(1, "new", None)
        runtime.run_ticks(9)
    text = "".join(read(model))
    expected = NO_ANSWER + "it was interrupted" + "[result] new [/result]"
    assert text == ("[result] an answ" if begun else "") + expected
    assert [request.epoch for request in background.requests] == [0, 1]
    report = runtime.report()["handoff"]
    assert (report["stale"], report["cancelled"], report["finished"]) == (1, 1, 1)


@pytest.mark.parametrize("gap", [1, 2, 3])
@pytest.mark.parametrize("policy", [Policy.INTERRUPT, Policy.WHEN_IDLE])
def test_a_second_interruption_does_not_hide_the_first(policy: Policy, gap: int) -> None:
    """A notice that waits, or is half read, is read whole."""
    background = ByHand()
    runtime, model = make(
        background, script(ASK_QUIETLY, QUIET), options=HandoffOptions(policy=policy, wait=False)
    )
    with runtime, runtime.open_session() as session:
        runtime.run_ticks(2)
        for _ in range(2):
            session.interrupt(0.0)
            runtime.run_ticks(gap)
        runtime.run_ticks(40)
    text = "".join(read(model))
    assert text.endswith(NO_ANSWER + "it was interrupted")
    assert text.count("interrupted") == 1
    assert runtime.report()["handoff"]["stale"] == 1


def test_what_nobody_heard_is_not_in_the_transcript() -> None:
    requests: list[Request] = []

    def answer(request: Request) -> str:
        requests.append(request)
        return "42"

    def say(tick: int, slot: int) -> list[int]:
        a = ord("a") + tick
        return [DELEGATE if tick == 4 else a, a, SILENCE, a]

    runtime, _ = make(LocalModel(answer), say)
    with runtime, runtime.open_session() as session:
        session.push_text("x")
        runtime.run_ticks(3)
        session.push_text("stop")
        session.interrupt(0.5)  # two of four output steps of tick 1 were heard
        runtime.run_ticks(3)
    assert requests[0].turns == (
        Turn("user", "x", 0.0),
        Turn("assistant", "aaabb", 0.2),
        Turn("user", "stop", 0.6),
        Turn("assistant", "dddee", 0.8),
    )
    assert requests[0].epoch == 1


def test_an_interruption_that_comes_during_another_hides_nothing_of_it() -> None:
    """The tick thread takes an interruption once: its epoch and position are of the same one."""
    requests: list[Request] = []

    def answer(request: Request) -> str:
        requests.append(request)
        return "42"

    runtime, model = make(LocalModel(answer), script([97] * 4, [98] * 4, QUIET, ASK_QUIETLY))
    with runtime, runtime.open_session() as session:
        replay = model.replay

        def interrupted_again(*args):
            model.replay = replay
            session.interrupt(9.0)
            return replay(*args)

        model.replay = interrupted_again
        runtime.run_ticks(2)
        session.interrupt(0.3)  # two of four output steps of tick 0 were heard
        runtime.run_ticks(3)
    assert [(turn.role, turn.text) for turn in requests[0].turns] == [("assistant", "aa")]
    assert requests[0].epoch == 2


def test_what_a_client_asked_before_an_interruption_is_dropped_before_a_tick_sees_it() -> None:
    triggers: list[str] = []
    background = LocalModel(lambda request: triggers.append(request.trigger) or "42")
    runtime, model = make(background, script())
    with runtime, runtime.open_session() as session:
        runtime.run_ticks(2)
        for text in ("old", "old too"):
            session.delegate(text)
        session.interrupt(0.2)
        session.delegate("new")
        runtime.run_ticks(12)
        assert triggers == ["new"]
        assert "".join(read(model)) == NO_ANSWER + "it was interrupted[result] 42 [/result]"
        report = runtime.report()["handoff"]
        assert (report["started"], report["stale"], report["refused"]) == (1, 0, 2)


def test_what_a_client_asks_after_an_interruption_that_no_tick_has_seen_waits() -> None:
    """Both come after the tick began, which took the epoch, and before it takes what was asked."""
    triggers: list[str] = []
    background = LocalModel(lambda request: triggers.append(request.trigger) or "42")
    runtime, _ = make(background, script())
    with runtime, runtime.open_session() as session:
        runtime.run_ticks(2)
        seat = session._seat
        take = seat.take

        def interrupted(*args):
            seat.take = take
            session.interrupt(0.2)
            session.delegate("new")
            return take(*args)

        seat.take = interrupted
        runtime.run_ticks(3)
        assert triggers == ["new"]
        assert runtime.report()["handoff"]["stale"] == 0


def test_a_finished_answer_of_an_older_epoch_is_dropped_too() -> None:
    runtime, model = make(ANSWER, script(ASK, SPEAK, SPEAK))
    with runtime, runtime.open_session() as session:
        runtime.run_ticks(3)
        session.interrupt(0.2)
        runtime.run_ticks(12)
    assert "".join(read(model)) == NO_ANSWER + "it was interrupted"
    report = runtime.report()["handoff"]
    assert (report["stale"], report["finished"], report["cancelled"]) == (1, 1, 0)


@pytest.mark.parametrize("how", ["close", "fault"])
def test_a_session_that_ends_cancels_its_requests_and_no_others(how: str) -> None:
    background = ByHand()
    options = HandoffOptions(policy=Policy.INTERRUPT, wait=False, tokens_per_tick=40)
    runtime, model = make(background, script(ASK_QUIETLY), options=options, num_slots=2)
    with runtime:
        leaver, other = runtime.open_session(), runtime.open_session()
        runtime.run_ticks(1)
        wait_for(lambda: len(background.requests) == 2)
        if how == "close":
            leaver.close()
        else:
            model.faulty.add((1, 0))
            runtime.run_ticks(1)
        runtime.run_ticks(1)
        wait_for(lambda: background.cancelled == [0])
        background.give(1, "42", None)
        next_one = runtime.open_session()
        runtime.run_ticks(3)
        assert (other.stats.ticks, next_one.stats.ticks) == (model.ticks, 3)
        assert runtime._handoff._lines == {line(other)}  # nothing is kept of the leaver
    assert "".join(read(model, 1)) == "[result] 42 [/result]"
    assert "".join(read(model, 0)) == ""  # nor does the slot's next session hear of it
    assert runtime.report()["handoff"]["cancelled"] == 1


def test_too_much_is_refused_and_told_once() -> None:
    background = ByHand()
    options = HandoffOptions(wait=False, max_per_session=1, idle_ticks=5, tokens_per_tick=100)
    runtime, model = make(background, script(*[ASK_QUIETLY] * 4), options=options)
    with runtime, runtime.open_session():
        runtime.run_ticks(8)
        assert "".join(read(model)) == NO_ANSWER + "too much was asked of it"
        background.give(0, "42", None)
        runtime.run_ticks(2)
    assert "".join(read(model)).endswith("[result] 42 [/result]")
    assert runtime.report()["handoff"]["refused"] == 3


def test_sessions_share_what_may_run_and_wait() -> None:
    background = ByHand()
    options = HandoffOptions(
        policy=Policy.INTERRUPT, wait=False, max_running=1, max_waiting=1, tokens_per_tick=100
    )

    def say(tick: int, slot: int) -> list[int]:
        return ASK_QUIETLY if tick == slot else QUIET

    runtime, model = make(background, say, options=options, num_slots=3)
    with runtime:
        sessions = [runtime.open_session() for _ in range(3)]
        runtime.run_ticks(1)
        wait_for(lambda: len(background.requests) == 1)
        runtime.run_ticks(4)
        assert "".join(read(model, 2)) == NO_ANSWER + "too much was asked of it"
        background.give(0, "one", None)
        background.give(1, "two", None)  # begun only now
        runtime.run_ticks(3)
    assert [session.stats.ticks for session in sessions] == [8] * 3
    assert "".join(read(model, 0)) == "[result] one [/result]"
    assert "".join(read(model, 1)) == "[result] two [/result]"
    report = runtime.report()["handoff"]
    assert (report["started"], report["finished"], report["refused"]) == (2, 2, 1)


def test_two_runs_on_the_virtual_clock_are_the_same() -> None:
    """However the threads of the answers fall."""

    def answer(request: Request) -> Iterator[str]:
        for turn in request.turns[-2:]:
            time.sleep(0.001 * (request.id % 3))
            yield f"{turn.text} at {turn.t:.1f};"
        if request.id % 4 == 0:
            raise errors.HandoffError("no idea")

    def say(tick: int, slot: int) -> list[int]:
        if tick == 29:
            return QUIET  # else what is asked in the last tick may be cancelled by the end
        return (QUIET, ASK, SPEAK, ASK_QUIETLY)[(tick * tick + slot) % 4]

    def run() -> tuple[list[list[str]], dict[str, int]]:
        runtime, model = make(LocalModel(answer), say, num_slots=3)
        with runtime:
            sessions = [runtime.open_session(handoff_policy=p) for p in list(Policy)[:3]]
            for tick in range(30):
                sessions[tick % 3].push_text(f"<{tick}>")
                runtime.run_ticks(1)
                if tick == 15:
                    sessions[1].interrupt(2.5)
        return [read(model, slot) for slot in range(3)], runtime.report()["handoff"]

    first, counts = run()
    assert run() == (first, counts)
    assert counts["finished"] > 0 and counts["failed"] > 0 and counts["refused"] > 0


def test_a_reason_is_one_line_of_no_more_than_200_characters() -> None:
    def answer(request: Request) -> str:
        raise errors.HandoffError("no\n idea " * 1000)

    runtime, model = make(LocalModel(answer), script(ASK_QUIETLY))
    with runtime, runtime.open_session():
        runtime.run_ticks(24)
    assert "".join(read(model)) == NO_ANSWER + "no idea " * 25


def test_the_prompt_stays() -> None:
    requests: list[Request] = []

    def answer(request: Request) -> str:
        requests.append(request)
        return "42"

    runtime, _ = make(LocalModel(answer), script(QUIET, QUIET, ASK_QUIETLY))
    with runtime, runtime.open_session(prompt="Be nice.") as session:
        session.push_text("what?")
        runtime.run_ticks(5)
    assert requests[0].turns[0] == Turn("system", "Be nice.", 0.0)
    assert requests[0].turns[1].text == "what?"


def test_a_client_may_ask_too() -> None:
    requests: list[Request] = []

    def answer(request: Request) -> str:
        requests.append(request)
        return "42"

    runtime, model = make(LocalModel(answer), script())
    with runtime, runtime.open_session() as session:
        for text, error in [
            (5, errors.InputTypeError),
            ("", errors.InputValueError),
            ("x" * 5000, errors.InputValueError),
        ]:
            with pytest.raises(error):
                session.delegate(text)  # type: ignore[arg-type]
        session.push_text("so")
        assert [session.delegate("what?") for _ in range(8)] == list(range(8))
        with pytest.raises(errors.InputBackpressure):
            session.delegate("what?")
        runtime.run_ticks(20)
    assert len(requests) == 2  # max_per_session
    assert requests[0].trigger == "what?" and requests[0].t == 0.2
    assert "".join(read(model)).count("[result] 42 [/result]") == 2


def test_the_answer_cannot_give_orders() -> None:
    """Ids with a meaning of their own, and those that are none, are left out of an answer."""

    class Loose(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            specials = {"D": 258, "S": 256, "X": 9999, "-": -1}
            return [specials.get(c, ord(c)) for c in text]

    background = LocalModel(lambda request: "aD-bSXc")
    runtime, model = make(background, script(ASK_QUIETLY), tokenizer=Loose())
    with runtime, runtime.open_session():
        runtime.run_ticks(8)
    assert "".join(read(model)) == "[result] abc [/result]"


@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_every_request_ends_in_one_result_or_notice(data: st.DataObject) -> None:
    """Whatever the model says, the policy, and how requests end."""
    tick = st.sampled_from([QUIET, SPEAK, ASK, ASK_QUIETLY])
    ticks = data.draw(st.lists(tick, min_size=1, max_size=12), label="ticks")
    ends = data.draw(st.lists(st.sampled_from("artb"), min_size=12, max_size=12), label="ends")
    policies = [Policy.INTERRUPT, Policy.WHEN_IDLE, Policy.SILENT]
    options = HandoffOptions(
        policy=data.draw(st.sampled_from(policies), label="policy"),
        max_per_session=data.draw(st.integers(1, 3), label="max_per_session"),
        tokens_per_tick=data.draw(st.integers(8, 60), label="tokens_per_tick"),
        max_answer_tokens=8,
        silent_result=("[result] ", " [/result]"),
    )

    def answer(request: Request) -> Iterator[str]:
        end = ends[request.id % 12]
        if end == "r":
            raise errors.HandoffError("no idea")
        yield "42"
        if end == "t":
            yield " and much more than that"
        if end == "b":
            raise ValueError

    runtime, model = make(LocalModel(answer), script(*ticks), options=options)
    with runtime, runtime.open_session() as session:
        runtime.run_ticks(len(ticks))
        while line(session)._answers:
            runtime.run_ticks(1)
            assert model.ticks < 1000
    text, report = "".join(read(model)), runtime.report()["handoff"]
    assert report["started"] == report["finished"] + report["failed"]
    assert report["started"] + report["refused"] == sum(258 in said for said in ticks)
    results = re.findall(r"\[result\] (.*?) \[/result\]", text)
    assert set(results) <= {"42", "42 and m"}
    assert text.count("no idea") + len(results) == report["started"]
    assert text.count("failed with ValueError") + text.count("no idea") == report["failed"]
    assert bool(report["refused"]) == ("too much" in text)
