"""`tml-runtime top` against real HTTP servers, good and bad, and `Runtime.status` that it shows."""

from __future__ import annotations

import functools
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, make_runtime

from tml_runtime import cli, top

PERIOD_NS = 200_000_000
Answer = tuple[int, bytes]


@contextmanager
def serving(answer: Callable[[str], Answer]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server's URL, and the headers of the requests that it got."""
    asked: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(dict(self.headers))
            status, body = answer(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def status_of(ticks: int = 6) -> dict[str, Any]:
    model = FakeModel(on_tick=lambda n: runtime.clock.advance(2 * PERIOD_NS * (n == 3)))
    runtime, _ = make_runtime(model, num_slots=3)
    with runtime:
        first, second = runtime.open_session(), runtime.open_session()
        first.push_audio(np.ones(3200, np.float32), 0.0)
        runtime.run_ticks(ticks)
        second.close()
        third = runtime.open_session()
        status = runtime.status()
        del third
    return status


def answering(status: object) -> Callable[[str], Answer]:
    body = json.dumps(status).encode()
    return lambda path: (200, body) if path == "/status" else (404, b"")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(["top", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_status_is_plain_data_about_every_session() -> None:
    status = status_of()
    assert json.loads(json.dumps(status, allow_nan=False)) == status
    assert status["report"]["misses"] == 2 and len(status["recent_ms"]) == 6
    assert all(0 <= ms < 10_000 for ms in status["recent_ms"])
    # On a virtual clock the closed session's slot is free as soon as somebody asks for one.
    running, waiting = status["sessions"]
    assert (running["state"], waiting["state"]) == ("running", "waiting")
    assert running["ticks"] == 6 and running["missing_windows"] == 5
    assert running["age_s"] == pytest.approx(1.4) and waiting["age_s"] == 0
    assert running["id"] != waiting["id"] and running["fault"] is None
    assert {"slot", "shed_frames", "lost_outputs", "skipped_ticks"} <= set(running)


def test_states_of_sessions() -> None:
    runtime, _ = make_runtime(FakeModel(faulty={(1, 0)}), num_slots=2)
    with runtime:
        faulty, closing = runtime.open_session(), runtime.open_session()
        runtime.run_ticks(2)
        closing.close()
        states = [session["state"] for session in runtime.status()["sessions"]]
        assert states == ["faulted", "closing"]
        assert "not finite" in runtime.status()["sessions"][0]["fault"]
        del faulty
        runtime.run_ticks(1)
        session = runtime.open_session()
        for pause in (True, False):
            session.pause() if pause else session.resume()
            (told,) = runtime.status()["sessions"]
            assert told["state"] == ("paused" if pause else "waiting")
        runtime.run_ticks(1)
        assert runtime.status()["sessions"][0]["state"] == "running"


def test_one_frame(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    status = status_of()
    status["report"]["tick_ms"] = {"p50": 41.5, "p99": 118.25, "p999": 187.75, "max": 203.5}
    status["report"]["kv_pages"] = {"anchor": 0, "text": 1, "audio": 4, "video": 0, "reply": 2}
    status["recent_ms"] = [0, 50, 100, 199, 350]
    with serving(answering(status)) as (url, _):
        code, out, err = run(capsys, url + "/", "--once")
    assert (code, err) == (0, "")
    for shown in (
        url, "virtual", "ticks 6", "sessions 2 of 3", "41.50", "118.25", "187.75", "203.50",
        "max of 200 ms", "misses 2   overrun 1   other 1", "recent ▁▃▅██",
        "holds text 1 audio 4 reply 2 pages",
        "running", "waiting", "missing windows", "GPU: nothing reads", "publish",
    ):  # fmt: skip
        assert shown in out, shown
    assert "\x1b" not in out  # no terminal, no colours


def test_a_gpu_and_a_black_box_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    status = status_of(0)
    status["report"]["gpu"] = {
        "power_w": 512.4, "sm_mhz": 1980, "temperature_c": 61, "memory_used_bytes": 3 << 30,
        "throttle": ["sw_power_cap"],
    }  # fmt: skip
    status["report"]["black_box"] = {"written": 2, "skipped": 0, "failed": 1, "error": "full"}
    with serving(answering(status)) as (url, _):
        code, out, _ = run(capsys, url, "--once")
    assert code == 0
    assert "GPU: 512 W   1980 MHz   61 °C   3.0 GiB   clocks held by sw_power_cap" in out
    assert "black box written 2 failed 1   full" in out
    assert "recent" in out and "holds no pages" in out


def test_json_is_the_status_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    status = status_of()
    with serving(answering(status)) as (url, asked):
        code, out, _ = run(
            capsys, url.removeprefix("http://"), "--once", "--json", "--token", "abc"
        )
    assert code == 0 and len(out.splitlines()) == 1
    assert json.loads(out) == status
    assert asked[0]["Authorization"] == "Bearer abc"


def test_it_ends_when_nobody_reads_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with serving(answering(status_of())) as (url, _), open(write, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert cli.main(["top", url, "--json"]) == 141
        unread.flush()  # as Python does when it exits


def test_it_goes_on_until_the_server_is_gone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top.time, "sleep", lambda _: None)
    left, good = [3], answering(status_of())

    def answer(path: str) -> Answer:
        left[0] -= 1
        return good(path) if left[0] >= 0 else (503, b"")

    with serving(answer) as (url, _):
        code, out, err = run(capsys, url, "--json")
        assert (code, len(out.splitlines())) == (1, 3)
        left[0] = 3
        code, out, err = run(capsys, url)
    assert code == 1 and "answers 503" in err and "tml-runtime" in out


def test_what_a_server_says_cannot_harm_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    status = status_of()
    evil = "\x1b]0;owned\x07\n[bold red]x[/bold red][/]"
    status["report"] |= {"mode": evil, "gpu_note": evil, "scheduling": evil}
    status["report"]["stages_ms"] = {evil: status["report"]["tick_ms"]}
    status["report"]["misses_by_reason"] = {evil: 1}
    status["report"]["kv_pages"] = {evil: 1}
    for session in status["sessions"]:
        session |= {"id": evil, "state": evil, "ticks": evil}
    with serving(answering(status)) as (url, _):
        code, out, err = run(capsys, url, "--once")
    assert code == 0 and "\x1b" not in out + err and "\x07" not in out + err


def one_line(code: int, out: str, err: str) -> str:
    assert code == 1 and err.startswith("error: ") and len(err.splitlines()) == 1
    assert "\x1b" not in err
    return err


def broken(**changes: object) -> dict[str, Any]:
    status = status_of()
    report = status["report"] | changes
    return {**status, "report": report}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda _: (404, b""), "/status answers 404"),
        (lambda _: (401, b""), "/status answers 401"),
        (lambda _: (200, b"<html>\x1b[31m"), "is not the status of a tml-runtime server"),
        (lambda _: (200, b"[]"), "is not the status"),
        (lambda _: (200, b"\xff\xfe"), "is not the status"),
        (lambda _: (200, b"[" * 100_000), "is not the status"),
        (answering({}), "is not the status"),
        (answering({"report": {"period_ms": 0, "tick_ms": {}}, "sessions": []}), "no period"),
        (answering({"report": {"period_ms": 9, "tick_ms": {}}, "sessions": [1]}), "not objects"),
        (answering({"report": {"period_ms": 9, "tick_ms": {}}, "sessions": []}), "cannot be shown"),
    ],
)
def test_wrong_answers_are_one_line(
    answer: Callable[[str], Answer], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(answer) as (url, _):
        assert message in one_line(*run(capsys, url, "--once"))


@pytest.mark.parametrize(
    "changes",
    [
        {"misses": "\x1b"},
        {"tick_ms": {"p50": "fast"}},
        {"stages_ms": None},
        {"gpu": {"power_w": "hot"}},
        {"black_box": 3},
        {"slots": None},
        {"misses": float("inf")},
        {"mode": functools.reduce(lambda inner, _: [inner], range(600), [])},
    ],
    ids=range(8),
)
def test_a_status_that_lacks_something_is_one_line(
    changes: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(answering(broken(**changes))) as (url, _):
        assert "cannot be shown" in one_line(*run(capsys, url, "--once"))


def test_too_long_an_answer_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top, "MAX_BYTES", 100)
    with serving(answering(status_of())) as (url, _):
        assert "more than 100 bytes" in one_line(*run(capsys, url, "--once"))


def test_nobody_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        assert "refused" in one_line(*run(capsys, f"http://127.0.0.1:{port}", "--once"))


@pytest.mark.parametrize(
    "url",
    ["ftp://localhost", "file:///etc/passwd", "http://", "http://[::1", "http://a b", "\x1b[31m",
     "http://localhost:port"],
)  # fmt: skip
def test_wrong_addresses_are_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    one_line(*run(capsys, url, "--once"))


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH_9.9\r\n", b""])
def test_another_protocol_is_one_line(said: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(said)

        thread = threading.Thread(target=greet)
        thread.start()
        one_line(*run(capsys, f"http://127.0.0.1:{server.getsockname()[1]}", "--once"))
        thread.join()


@pytest.mark.parametrize("every", ["0", "nan", "-1", "often"])
def test_how_often_is_checked(every: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["top", "--every", every])
    assert stop.value.code == 2 and "--every" in capsys.readouterr().err


def test_without_rich_the_error_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    error = one_line(*run(capsys, "--once"))
    assert 'pip install "tml-kernels[serve]"' in error
