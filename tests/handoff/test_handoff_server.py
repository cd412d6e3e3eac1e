"""OpenAIModel against a server that streams, stalls, drops and lies, while the loop runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("openai")

from aiohttp import web
from chat_server import Answer, Call, ChatServer, chunk, event
from fake_model import CONFIG, DELEGATE, MS40, SILENCE
from handoff_tools import line, make, read, wait_for

from tml_runtime import errors
from tml_runtime.handoff import HandoffOptions, OpenAIModel, Policy, Request, Turn

FAST = replace(CONFIG, layout=MS40)
OPTIONS = HandoffOptions(
    policy=Policy.INTERRUPT, tokens_per_tick=60, timeout=60.0, max_answer_tokens=400
)
DONE = event("[DONE]")
LIMIT = 100_000  # bytes of a response


def heard(
    server: ChatServer, until: str, options: HandoffOptions = OPTIONS, **settings: Any
) -> tuple[str, dict[str, int]]:
    """What the live model reads, to the end of what holds `until`, and the counts; its ticks go on
    all the while."""
    settings = {"idle_timeout": 30.0, "max_retries": 0, "max_bytes": LIMIT} | settings
    background = OpenAIModel(server.url, "deep", **settings)
    runtime, model = make(
        background,
        lambda tick, slot: [DELEGATE if tick == 1 else SILENCE],
        config=FAST,
        options=options,
        realtime=True,
    )
    session = runtime.open_session()
    with runtime:
        wait_for(lambda: until in "".join(read(model)))
        wait_for(lambda: not line(session)._answers)  # all of it has been read
        ticks = runtime.metrics.count
        wait_for(lambda: runtime.metrics.count > ticks + 3)
        assert session.poll()
    return "".join(read(model)), runtime.report()["handoff"]


async def streams_well(call: Call) -> None:
    await call.send(chunk(""), chunk("forty"), chunk(" two"), b": ping\n\n", chunk(None))
    await call.send(chunk(None, "stop"), chunk(None, None, choices=[], usage=None), DONE)


async def says_nothing_more(call: Call) -> None:
    """The answer is whole, the connection stays open, and nothing ever comes again."""
    await call.send(chunk("forty"), chunk(" two", "stop"))
    await call.stall()


async def cuts_where_it_likes(call: Call) -> None:
    whole = b"".join([chunk("forty"), chunk(" two"), chunk("\u20ac" * 2, "stop"), DONE])
    await call.send(*(whole[at : at + 7] for at in range(0, len(whole), 7)))


@pytest.mark.parametrize(
    ("answer", "text"),
    [(streams_well, "forty two"), (says_nothing_more, "forty two"),
     (cuts_where_it_likes, "forty two\xe2\x82\xac\xe2\x82\xac")],
)  # fmt: skip
def test_an_answer_reaches_the_model(answer: Answer, text: str) -> None:
    with ChatServer(answer) as server:
        said, counts = heard(server, "[/result]")
    assert said == f"[result] {text} [/result]"
    assert (counts["started"], counts["finished"]) == (1, 1)


async def stalls_before(call: Call) -> None:
    await call.stall()


async def stalls_after_the_headers(call: Call) -> None:
    await call.begin()
    await call.stall()


async def stalls_in_the_middle(call: Call) -> None:
    await call.send(chunk("forty"))
    await call.stall()


async def only_pings(call: Call) -> None:
    await call.begin()
    while True:
        await call.send(b": ping\n\n")


async def drops_before(call: Call) -> None:
    call.drop()


async def drops_in_the_middle(call: Call) -> None:
    await call.send(chunk("forty"))
    call.drop()


async def drops_within_an_event(call: Call) -> None:
    await call.send(chunk("forty"), chunk("forever")[:-10])
    call.drop()


async def ends_too_early(call: Call) -> None:
    await call.send(chunk("forty"))


async def sends_no_json(call: Call) -> None:
    await call.send(chunk("forty"), event('{"choices": [{"delta'))


async def sends_no_utf8(call: Call) -> None:
    await call.send(chunk("forty"), event(b'{"choices": "\xff\xfe"}'))


async def sends_no_events(call: Call) -> None:
    await call.send(b"\x00\x01\x02 forty two\n\n" * 10)


async def sends_another_shape(call: Call) -> None:
    await call.send(chunk("forty"), event('{"choices": 5}'))


async def sends_no_object(call: Call) -> None:
    await call.send(chunk("forty"), event("[1, 2]"))


async def sends_no_text(call: Call) -> None:
    await call.send(chunk("forty"), chunk({"text": "two"}), DONE)


async def reports_an_error(call: Call) -> None:
    await call.send(chunk("forty"), event('{"error": {"message": "out of memory"}}'))


async def sends_a_page(call: Call) -> None:
    await call.begin("text/html; charset=utf-8")
    await call.send(b"<html>forty two</html>")


async def sends_a_whole_answer(call: Call) -> web.Response:
    return web.json_response({"choices": [{"message": {"content": "forty two"}}]})


async def compresses(call: Call) -> None:
    await call.begin(Content_Encoding="gzip")
    await call.send(chunk("forty two", "stop"))


async def sends_a_line_without_end(call: Call) -> None:
    await call.begin()
    while True:
        await call.send(b"data: " + b"x" * 10_000)


async def fails_at_length(call: Call) -> web.StreamResponse:
    response = web.StreamResponse(status=500)
    await response.prepare(call.request)
    while True:
        await response.write(b"x" * 10_000)


async def says_nothing(call: Call) -> None:
    await call.send(chunk(""), chunk(None, "stop"), DONE)


async def redirects(call: Call) -> web.Response:
    return web.Response(status=307, headers={"Location": str(call.request.url)})


async def forbids(call: Call) -> web.Response:
    return web.json_response({"error": {"message": "your key sk-123 is wrong"}}, status=401)


async def asks_for_an_hour(call: Call) -> web.Response:
    return web.Response(status=429, headers={"Retry-After": "3600"})


SILENT = "its server was silent for 0.3 s"
BROKE = "its answer broke off"
LOST = "the connection to its server failed"
STRANGE = "its server sent what is no chat completion"
MUCH = f"its server sent more than {LIMIT} bytes"


@pytest.mark.parametrize(
    ("answer", "begun", "reason"),
    [
        (stalls_before, False, SILENT),
        (stalls_after_the_headers, False, SILENT),
        (stalls_in_the_middle, True, SILENT),
        (only_pings, False, (SILENT, MUCH)),
        (drops_before, False, LOST),
        (drops_in_the_middle, True, LOST),
        (drops_within_an_event, True, LOST),
        (ends_too_early, True, BROKE),
        (sends_no_json, True, STRANGE),
        (sends_no_utf8, True, STRANGE),
        (sends_no_events, False, BROKE),
        (sends_another_shape, True, STRANGE),
        (sends_no_object, True, STRANGE),
        (sends_no_text, True, STRANGE),
        (reports_an_error, True, "its server reported an error"),
        (sends_a_page, False, "its server sent 'text/html', not a stream of events"),
        (sends_a_whole_answer, False, "its server sent 'application/json', not a stream of events"),
        (compresses, False, "its server sent 'gzip', which was not asked for"),
        (sends_a_line_without_end, False, MUCH),
        (fails_at_length, False, MUCH),
        (says_nothing, False, "its answer was empty"),
        (redirects, False, LOST),
        (forbids, False, "its server said 401"),
        (asks_for_an_hour, False, "its server said 429"),
    ],
)
def test_a_bad_server_becomes_a_notice(
    answer: Answer, begun: bool, reason: str | tuple[str, ...]
) -> None:
    reasons = (reason,) if isinstance(reason, str) else reason
    idle = 0.3 if SILENT in reasons else 30.0
    with ChatServer(answer) as server:
        said, counts = heard(server, "[notice]", idle_timeout=idle)
        calls = len(server.calls)
    result = "[result] forty [/result]" if begun else ""
    assert said in [f"{result}[notice] the background model did not answer: {r}" for r in reasons]
    assert (counts["started"], counts["failed"]) == (1, 1)
    assert calls == 1 or answer is redirects


def test_ticks_go_on_while_a_server_stalls() -> None:
    with ChatServer(stalls_in_the_middle) as server:
        background = OpenAIModel(server.url, "deep")
        runtime, model = make(
            background,
            lambda tick, slot: [DELEGATE if tick == 1 else SILENCE],
            config=FAST,
            options=OPTIONS,
            realtime=True,
        )
        session = runtime.open_session()
        with runtime:
            assert server.stalled.wait(30.0)
            wait_for(lambda: "forty" in "".join(read(model)))
            ticks = session.stats.ticks
            wait_for(lambda: session.stats.ticks >= ticks + 10)
            assert "".join(read(model)) == "[result] forty"
            session.close()
            wait_for(lambda: runtime.report()["handoff"]["cancelled"] == 1)
    assert runtime.report()["handoff"]["failed"] == 0


def test_an_endless_answer_is_cut() -> None:
    async def goes_on(call: Call) -> None:
        while True:
            await call.send(chunk("word "))

    with ChatServer(goes_on) as server:
        said, counts = heard(server, "[/result]", max_bytes=4 << 20)
    assert said == f"[result] {'word ' * 80} [/result]" and counts["finished"] == 1


def test_a_slow_answer_is_timed_out() -> None:
    async def crawls(call: Call) -> None:
        await call.send(chunk("forty"))
        await call.stall()

    with ChatServer(crawls) as server:
        said, counts = heard(server, "[notice]", replace(OPTIONS, timeout=1.5))
    end = "[notice] the background model did not answer: timed out after 1.5 s"
    assert said in ("[result] forty [/result]" + end, end)
    assert counts["timed_out"] == 1


@pytest.mark.parametrize("status", [429, 500])
def test_a_request_is_tried_again_before_its_first_token(status: int) -> None:
    async def recovers(call: Call) -> web.Response | None:
        if call.number == 0:
            return web.Response(status=status, headers={"Retry-After": "0.01"})
        await streams_well(call)
        return None

    with ChatServer(recovers) as server:
        said, counts = heard(server, "[/result]", max_retries=1)
        assert len(server.calls) == 2
    assert said == "[result] forty two [/result]" and counts["finished"] == 1


def test_and_not_for_ever_nor_after_it() -> None:
    async def fails(call: Call) -> web.Response:
        return web.Response(status=503, headers={"Retry-After": "0.01"})

    with ChatServer(fails) as server:
        said, _ = heard(server, "[notice]", max_retries=2)
        assert len(server.calls) == 3 and said.endswith("its server said 503")
    with ChatServer(drops_in_the_middle) as server:
        heard(server, "[notice]", max_retries=2)
        assert len(server.calls) == 1


def test_what_the_server_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "ORG_ID", "PROJECT_ID", "ADMIN_KEY"):
        monkeypatch.setenv(f"OPENAI_{name}", "not for this server")
    secrets = "X-Secret: not for this server\nAuthorization: not for this server"
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", secrets)
    with ChatServer(streams_well) as server:
        heard(
            server,
            "[/result]",
            extra={"temperature": 0.5, "top_k": 3},
            instructions="Think.",
            ask="So?",
        )
        (call,) = server.calls
    assert call.body == {
        "model": "deep",
        "stream": True,
        "max_tokens": 1024,
        "temperature": 0.5,
        "top_k": 3,
        "messages": [{"role": "system", "content": "Think."}, {"role": "user", "content": "So?"}],
    }
    assert call.request.headers["Authorization"] == "Bearer none"
    assert "not for this server" not in str(call.request.headers)


def test_a_key_is_sent_and_what_is_not_given_is_not() -> None:
    with ChatServer(streams_well) as server:
        heard(server, "[/result]", api_key="sk-1", max_tokens=None, instructions="", ask="So?")
        (call,) = server.calls
    assert call.request.headers["Authorization"] == "Bearer sk-1"
    messages = [{"role": "user", "content": "So?"}]
    assert call.body == {"model": "deep", "stream": True, "messages": messages}


def test_messages_alternate() -> None:
    turns = (Turn("system", "Be nice.", 0.0), Turn("assistant", "hi", 0.2), Turn("user", "why?", 1))
    model = OpenAIModel("http://localhost:1/v1", "deep", instructions="Think.", ask="So?")
    assert model._messages(Request(0, 0, 1.2, turns, trigger="how?")) == [
        {"role": "system", "content": "Think.\nBe nice."},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "why?\nhow?"},
    ]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"base_url": "localhost:8000"}, "base_url"),
        ({"model": None}, "model"),
        ({"idle_timeout": 0.0}, "idle_timeout"),
        ({"connect_timeout": "1"}, "connect_timeout"),
        ({"max_retries": -1}, "max_retries"),
        ({"max_bytes": 0}, "max_bytes"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(errors.TmlRuntimeError, match=name):
        OpenAIModel(**{"base_url": "http://localhost:1/v1", "model": "deep"} | settings)


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"tml-kernels\[handoff\]"):
        OpenAIModel("http://localhost:1/v1", "deep")
