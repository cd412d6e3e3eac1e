"""Functions as background models, in real time: whatever they do, ticks go on, nothing is left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from fake_model import CONFIG, DELEGATE, MS40, SILENCE
from handoff_tools import make, read, wait_for

from tml_runtime import Runtime, errors
from tml_runtime.handoff import HandoffOptions, LocalModel, Policy, Request
from tml_runtime.handoff.local import PIECES_AHEAD

FAST = replace(CONFIG, layout=MS40)
OPTIONS = HandoffOptions(policy=Policy.INTERRUPT, tokens_per_tick=60, timeout=60.0)


def live(background: LocalModel, options: HandoffOptions = OPTIONS) -> tuple[Runtime, Any]:
    """The model delegates once a session takes part: the warm-up is tick 0."""
    return make(
        background,
        lambda tick, slot: [DELEGATE if tick == 1 else SILENCE],
        config=FAST,
        options=options,
        realtime=True,
    )


def heard(background: LocalModel, until: str, options: HandoffOptions = OPTIONS) -> str:
    """What the live model reads, up to `until`; then it must tick on."""
    runtime, model = live(background, options)
    session = runtime.open_session()
    with runtime:
        wait_for(lambda: until in "".join(read(model)))
        ticks = runtime.metrics.count
        wait_for(lambda: runtime.metrics.count > ticks + 3)
        assert session.poll()
    return "".join(read(model))


class Asker:
    async def __call__(self, request: Request) -> str:
        return "42"


def pieces(request: Request) -> Iterator[str]:
    yield from ("4", "", "2")


async def text_later(request: Request) -> str:
    await asyncio.sleep(0)
    return "42"


async def pieces_later(request: Request) -> AsyncIterator[str]:
    for piece in ("4", "2"):
        await asyncio.sleep(0)
        yield piece


@pytest.mark.parametrize(
    "answer",
    [lambda request: "42", pieces, lambda request: ["4", "2"], text_later, pieces_later, Asker(),
     partial(pieces_later)],
    ids=["text", "generator", "list", "coroutine", "async generator", "object", "partial"],
)  # fmt: skip
def test_every_kind_of_function(answer: Callable) -> None:
    assert heard(LocalModel(answer), "[/result]") == "[result] 42 [/result]"


def raises(request: Request) -> str:
    raise KeyError("secret of the server")


async def raises_later(request: Request) -> AsyncIterator[str]:
    yield "4"
    raise errors.HandoffError("the line\nis dead")


def not_text(request: Request) -> Any:
    return ["4", b"2"]


def not_anything(request: Request) -> Any:
    return None


def leaves(request: Request) -> str:
    raise SystemExit(1)


async def leaves_later(request: Request) -> str:
    raise SystemExit(1)


async def cancels_itself(request: Request) -> str:
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (raises, "it failed with KeyError"),
        (raises_later, "the line is dead"),
        (not_text, "it failed with TypeError"),
        (not_anything, "it failed with TypeError"),
        (lambda request: "", "its answer was empty"),
        (leaves, "it failed with RuntimeError"),
        (leaves_later, "it failed with RuntimeError"),
        (cancels_itself, "it cancelled itself"),
    ],
)
def test_a_failure_is_told_to_the_model(answer: Callable, expected: str) -> None:
    text = heard(LocalModel(answer), expected)
    begun = "[result] 4 [/result]" if answer in (raises_later, not_text) else ""
    assert text == f"{begun}[notice] the background model did not answer: {expected}"


def test_an_endless_answer_is_cut_and_its_generator_left() -> None:
    left = threading.Event()

    def endless(request: Request) -> Iterator[str]:
        try:
            while True:
                yield "x" * 1_000_000
        finally:
            left.set()

    options = replace(OPTIONS, max_answer_tokens=40)
    assert heard(LocalModel(endless), "[/result]", options) == f"[result] {'x' * 40} [/result]"
    assert left.wait(30.0)
    wait_for(lambda: threading.active_count() == threads_before())


def threads_before() -> int:
    """Threads that are not the hand-off's."""
    return sum(not t.name.startswith("tml-handoff") for t in threading.enumerate())


def test_a_generator_is_no_more_than_a_few_pieces_ahead() -> None:
    made: list[str] = []

    def many(request: Request) -> Iterator[str]:
        for i in range(20 * PIECES_AHEAD):
            made.append(str(i))
            yield made[-1]

    async def take() -> list[str]:
        taken: list[str] = []
        async for piece in LocalModel(many).stream(Request(0, 0, 0.0, ())):
            taken.append(piece)
            assert len(made) <= len(taken) + PIECES_AHEAD + 1  # one that waits for room
        return taken

    assert asyncio.run(asyncio.wait_for(take(), 30.0)) == [str(i) for i in range(20 * PIECES_AHEAD)]


@pytest.mark.parametrize("kind", ["thread", "loop"])
def test_a_function_that_never_returns_is_timed_out(kind: str) -> None:
    released = threading.Event()

    def stuck(request: Request) -> str:
        wait_for(request.cancelled.is_set)
        assert released.wait(30.0)
        return "too late"

    async def stuck_later(request: Request) -> str:
        try:
            await asyncio.sleep(3600)
        finally:
            released.set()
        return "never"

    answer = stuck if kind == "thread" else stuck_later
    text = heard(LocalModel(answer), "0.2 s", replace(OPTIONS, timeout=0.2))
    assert text == "[notice] the background model did not answer: timed out after 0.2 s"
    released.set()
    wait_for(lambda: threading.active_count() == threads_before())


def test_threads_are_bounded() -> None:
    released = threading.Event()
    background = LocalModel(lambda request: str(released.wait(60.0)), max_threads=1)
    options = replace(OPTIONS, timeout=0.1, max_per_session=1)
    runtime, model = make(
        background,
        lambda tick, slot: [DELEGATE if tick in (1, 40) else SILENCE],
        config=FAST,
        options=options,
        realtime=True,
    )
    session = runtime.open_session()
    with runtime:
        wait_for(lambda: "all its 1 threads are busy" in "".join(read(model)))
        released.set()
    assert session.stats.ticks > 40
    report = runtime.report()["handoff"]
    assert (report["timed_out"], report["failed"]) == (1, 1)


def test_a_thread_that_cannot_start_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("tml-handoff-"):
            raise RuntimeError("can't start new thread")
        run(thread)

    run = threading.Thread.start
    background = LocalModel(lambda request: "42", max_threads=1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        for _ in range(3):
            assert "it failed with RuntimeError" in heard(background, "it failed", OPTIONS)
    assert heard(background, "42", OPTIONS) == "[result] 42 [/result]"


def test_stop_ends_what_runs() -> None:
    began, cancelled = threading.Event(), threading.Event()

    async def forever(request: Request) -> str:
        began.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return "never"

    runtime, _ = live(LocalModel(forever))
    session = runtime.open_session()
    with runtime:
        assert began.wait(30.0)
    assert cancelled.is_set() and session.poll()
    report = runtime.report()["handoff"]
    assert (report["started"], report["cancelled"]) == (1, 1)
    runtime.stop()


def test_ticks_go_on_while_a_function_blocks_the_hand_offs_loop() -> None:
    began, released = threading.Event(), threading.Event()

    async def blocks(request: Request) -> str:
        began.set()
        assert released.wait(60.0)
        return "42"

    runtime, model = live(LocalModel(blocks))
    session = runtime.open_session()
    with runtime:
        assert began.wait(30.0)
        ticks = session.stats.ticks
        wait_for(lambda: session.stats.ticks > ticks + 10)
        released.set()
        wait_for(lambda: "".join(read(model)) == "[result] 42 [/result]")


def test_a_request_that_waits_is_timed_out_too() -> None:
    requests: list[Request] = []

    def stuck(request: Request) -> str:
        requests.append(request)
        wait_for(request.cancelled.is_set)
        return ""

    options = replace(OPTIONS, timeout=0.5, max_running=1)
    runtime, model = make(
        LocalModel(stuck),
        lambda tick, slot: [DELEGATE if tick in (1, 2) else SILENCE],
        config=FAST,
        options=options,
        realtime=True,
    )
    session = runtime.open_session()
    with runtime:
        wait_for(lambda: "".join(read(model)).count("timed out") == 2)
    assert runtime.report()["handoff"]["timed_out"] == 2 and session.poll()
    assert 1 <= len(requests) <= 2  # the second began, if at all, when the first was over


def test_sessions_come_and_go_while_answers_do() -> None:
    """Many of both at once; then the books must balance."""

    async def answer(request: Request) -> AsyncIterator[str]:
        for piece in range(request.id % 4):
            await asyncio.sleep(0.01)
            yield str(piece)
        if request.id % 5 == 0:
            raise errors.HandoffError("no idea")
        await asyncio.sleep(0.05)

    runtime, _ = make(
        LocalModel(answer),
        lambda tick, slot: [(DELEGATE, SILENCE, 104)[(tick + slot) % 3]],
        config=FAST,
        options=replace(OPTIONS, policy=Policy.WHEN_IDLE, max_running=3, max_waiting=2),
        realtime=True,
        num_slots=4,
    )
    with runtime:
        for _ in range(4):
            sessions = [runtime.open_session() for _ in range(4)]
            wait_for(lambda some=sessions: all(s.stats.ticks >= 8 for s in some))
            for session in sessions[:2]:
                session.delegate("and now?")
                session.interrupt(0.1)
            sessions[2].poll()
            for session in sessions:
                session.close()
            wait_for(lambda: runtime.report()["slots_free"] == 4)
    report = runtime.report()
    counts = report["handoff"]
    assert report["faults"] == 0
    ended = ("finished", "failed", "timed_out", "cancelled")
    assert counts["started"] == sum(counts[name] for name in ended) > 0


@pytest.mark.parametrize(("most", "text", "t"), [(10, "hbbbbbb", 12.0), (11, "gbbbhbbbbbb", 11.8)])
def test_the_transcript_is_bounded(most: int, text: str, t: float) -> None:
    requests: list[Request] = []

    def answer(request: Request) -> str:
        requests.append(request)
        return "42"

    runtime, _ = make(
        LocalModel(answer),
        lambda tick, slot: [DELEGATE if tick == 60 else ord("a") + tick % 26, 98, 98, 98],
        options=HandoffOptions(transcript_tokens=most),
    )
    with runtime, runtime.open_session() as session:
        session.push_text("early")
        runtime.run_ticks(61)
    (turn,) = requests[0].turns
    assert (turn.role, turn.text, turn.t) == ("assistant", text, t)


@pytest.mark.parametrize(
    ("make_model", "error"),
    [
        (lambda: LocalModel("text"), TypeError),  # type: ignore[arg-type]
        (lambda: LocalModel(raises, max_threads=0), ValueError),
        (lambda: LocalModel(text_later, stream=object()), ValueError),  # type: ignore[arg-type]
        (lambda: HandoffOptions(policy="when_idle"), TypeError),  # type: ignore[arg-type]
        (lambda: HandoffOptions(timeout=0.0), ValueError),
        (lambda: HandoffOptions(timeout=float("nan")), ValueError),
        (lambda: HandoffOptions(timeout="20"), TypeError),  # type: ignore[arg-type]
        (lambda: HandoffOptions(max_running=0), ValueError),
        (lambda: HandoffOptions(snapshots=1.0), TypeError),  # type: ignore[arg-type]
    ],
)
def test_bad_settings_are_refused(make_model: Callable, error: type) -> None:
    with pytest.raises(errors.TmlRuntimeError) as caught:
        make_model()
    assert isinstance(caught.value, error)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["priority", "green context"])
def test_a_stream_of_its_own(kind: str) -> None:
    """A function's kernels run on the stream it was given: one of low priority, or one whose green
    context has only some of the SMs. What they cost a tick is for `bench` to measure."""
    if kind == "priority":
        stream = torch.cuda.Stream(priority=0)  # the lowest; lower numbers go first
    else:
        contexts = pytest.importorskip("torch.cuda.green_contexts")
        if not contexts.SUPPORTED or not hasattr(contexts.GreenContext, "Stream"):
            pytest.skip("this torch has no streams of green contexts")
        context = contexts.GreenContext.create(num_sms=16)  # to live as long as its stream
        stream = context.Stream()

    def answer(request: Request) -> str:
        # By number: a green context's stream is of another class than the current one.
        assert torch.cuda.current_stream().stream_id == stream.stream_id
        x = torch.ones(256, 256, device="cuda")
        return str(int((x @ x).sum().item()))

    background = LocalModel(answer, stream=stream)
    assert heard(background, "[/result]") == f"[result] {256**3} [/result]"
