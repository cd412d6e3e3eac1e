"""Who may connect, who is turned away, and what is said over plain HTTP."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace
from functools import partial

import aiohttp
import pytest
from local_service import LIMITS, eventually, serve

from tml_runtime import cli, prometheus
from tml_runtime.errors import InputValueError
from tml_runtime.serve.client import connect
from tml_runtime.serve.events import ServiceError
from tml_runtime.serve.protocol import SUBPROTOCOL, CloseCode
from tml_runtime.serve.server import check_reachable
from tml_runtime.top import run_top

TOKEN = "a token of some length"


def test_a_token_is_wanted(run) -> None:
    async def talk() -> None:
        async with serve(token=TOKEN) as served:
            async with connect(served.url, token=TOKEN) as client:
                assert client.welcome.session
            for hello in ({}, {"token": "wrong"}, {"token": TOKEN + "x"}):
                async with served.raw(hello=hello) as raw:
                    assert (await raw.until("error"))["code"] == "unauthorized"
                    assert await raw.closed() == CloseCode.UNAUTHORIZED
            async with served.raw(hello={"token": TOKEN}) as raw:
                await raw.until("welcome")
            with pytest.raises(ServiceError) as caught:
                async with connect(served.url, token="wrong"):
                    pass
            assert caught.value.code == "unauthorized"
            assert served.service.counts.sessions == 2

    run(talk())


def test_reports_want_the_token_too(run) -> None:
    async def talk() -> None:
        metrics = (lambda runtime, refused: b"ticks 1\n", "text/plain; version=0.0.4")
        async with serve(token=TOKEN, metrics=metrics) as served:
            right = {"Authorization": f"Bearer {TOKEN}"}
            for path in ("/status", "/metrics"):
                for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": TOKEN}):
                    status, told = await served.get(path, headers=headers)
                    assert (status, told["error"]) == (401, "unauthorized")
            assert (await served.get("/status", headers=right))[0] == 200
            assert (await served.get("/healthz"))[0] == 200
            async with (
                aiohttp.ClientSession() as http,
                http.get(served.http + "/metrics", headers=right) as response,
            ):
                assert await response.read() == b"ticks 1\n"
                assert response.headers["Content-Type"] == "text/plain; version=0.0.4"

    run(talk())


def test_status_and_health(run) -> None:
    async def talk() -> None:
        async with serve() as served, connect(served.url) as client:
            status, told = await served.get("/status")
            service = told["service"]
            assert status == 200 and service["state"] == "running"
            assert told["report"]["slots"] == 2 and service["counts"]["sessions"] == 1
            (session,) = service["sessions"]
            assert session["id"] == client.welcome.session and session["connected"]
            assert client.welcome.resume not in str(told)  # it would let anybody take over
            assert await served.get("/healthz") == (200, {"alive": True, "ready": True})

    run(talk())


def test_metrics_and_top_read_it(run) -> None:
    async def talk() -> None:
        metrics = (prometheus.render, prometheus.CONTENT_TYPE)
        async with serve(metrics=metrics, token=TOKEN) as served, connect(served.url, token=TOKEN):
            assert "tml_runtime_" in await scraped(served.http)
            assert "sessions 1 of 2" in await shown_by_top(served.http)

    run(talk())


async def scraped(url: str) -> str:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with (
        aiohttp.ClientSession() as http,
        http.get(url + "/metrics", headers=headers) as response,
    ):
        return await response.text()


async def shown_by_top(url: str) -> str:
    shown = io.StringIO()
    await asyncio.to_thread(partial(run_top, url, once=True, token=TOKEN, stream=shown))
    return shown.getvalue()


def test_who_is_refused_is_counted_by_error(run) -> None:
    """Before the upgrade and after it, in the status, a scrape and top."""

    async def talk() -> None:
        metrics = (prometheus.render, prometheus.CONTENT_TYPE)
        async with (
            serve(slots=1, metrics=metrics, token=TOKEN) as served,
            connect(served.url, token=TOKEN),
        ):
            right, wrong = ({"Authorization": f"Bearer {t}"} for t in (TOKEN, "no"))
            for headers in (right, right, wrong, {**right, "Origin": "https://evil.example"}):
                with pytest.raises(aiohttp.WSServerHandshakeError):
                    async with served.raw(headers=headers):
                        pass
            for hello in ({"token": "wrong"}, {"token": TOKEN}, {"token": TOKEN, "resume": "?"}):
                async with served.raw(hello=hello) as raw:
                    await raw.closed()
            assert (await served.get("/status"))[0] == 401
            assert (await served.get("/v1/session", headers=right))[0] == 426
            expected = {
                "exhausted": 3, "unauthorized": 3, "forbidden": 1, "unknown_session": 1,
                "upgrade_required": 1,
            }  # fmt: skip
            _, told = await served.get("/status", headers=right)
            assert told["service"]["counts"]["refused"] == expected
            lines = (await scraped(served.http)).splitlines()
            for error, count in expected.items():
                name = f'tml_runtime_refused_requests_total{{error="{error}"}}'
                assert f"{name} {count}.0" in lines
            assert "refused 9 " in await shown_by_top(served.http)

    run(talk())


def test_who_was_welcomed_counts_as_refused_no_more(run) -> None:
    async def talk() -> None:
        limits = replace(LIMITS, messages_per_s=5.0, burst_s=4.0)
        async with serve(limits=limits) as served, served.raw(hello={}) as raw:
            resume = (await raw.until("welcome"))["resume"]
            async with served.raw(hello={"resume": resume}) as other:
                assert await raw.closed() == CloseCode.TAKEN_OVER
                for _ in range(50):
                    await other.say(type="position", played=0)
                assert await other.closed() == CloseCode.RATE_LIMITED
            assert not any(served.service.counts.refused.values())

    run(talk())


def test_top_takes_the_token_of_the_environment(
    run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def talk() -> None:
        async with serve(token=TOKEN) as served:
            ask = partial(cli.main, ["top", served.http, "--once"])
            assert await asyncio.to_thread(ask) == 1
            monkeypatch.setenv("TML_SERVE_TOKEN", TOKEN)
            assert await asyncio.to_thread(ask) == 0

    run(talk())
    assert "sessions 0 of 2" in capsys.readouterr().out


def test_pages_of_other_origins_are_refused(run) -> None:
    async def talk() -> None:
        async with serve(origins=("https://good.example",)) as served:
            async with served.raw(hello={}, origin="https://good.example") as raw:
                await raw.until("welcome")
            host = served.http.removeprefix("http://")
            for origin in ("https://evil.example", f"http://{host}", "null"):
                with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                    async with served.raw(origin=origin):
                        pass
                assert caught.value.status == 403

    run(talk())


def test_what_speaks_another_protocol_is_told_so(run) -> None:
    async def talk() -> None:
        async with serve() as served:
            status, told = await served.get("/v1/session")
            assert status == 426 and SUBPROTOCOL in told["message"]
            async with aiohttp.ClientSession() as http:
                with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                    await http.ws_connect(served.url, protocols=("tml.v9",))
            assert caught.value.status == 426

    run(talk())


def test_without_a_slot_the_answer_has_figures_and_a_time(run) -> None:
    async def talk() -> None:
        async with serve(slots=1) as served, connect(served.url):
            headers = {
                "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
                "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
                "Sec-WebSocket-Protocol": SUBPROTOCOL,
            }  # fmt: skip
            async with (
                aiohttp.ClientSession() as http,
                http.get(served.http + "/v1/session", headers=headers) as response,
            ):
                told = await response.json()
                assert response.status == 503 and int(response.headers["Retry-After"]) > 0
            assert (told["error"], told["in_use"]) == ("exhausted", 1)
            with pytest.raises(ServiceError) as caught:
                async with connect(served.url):
                    pass
            assert caught.value.code == "exhausted" and caught.value.retry_after_s is not None

    run(talk())


def test_a_refusal_that_comes_after_the_upgrade_says_the_same(run) -> None:
    """The runtime may know better than the service's own count of sessions."""

    async def talk() -> None:
        async with serve(slots=1) as served:
            other = served.service.runtime.open_session()
            async with served.raw(hello={}) as raw:
                error = await raw.until("error")
                assert await raw.closed() == CloseCode.EXHAUSTED
            assert (error["code"], error["in_use"]) == ("exhausted", 1)
            assert error["retry_after_s"] > 0
            other.close()

    run(talk())


def test_connections_are_counted_before_they_cost(run) -> None:
    async def talk() -> None:
        async with serve(limits=replace(LIMITS, max_connections=1)) as served:
            async with served.raw():
                await eventually(lambda: served.service.connections)
                with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                    async with served.raw():
                        pass
                assert caught.value.status == 503
            await eventually(lambda: not served.service.connections)
            async with served.raw(hello={}) as raw:
                await raw.until("welcome")

    run(talk())


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    check_reachable(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_another_host_needs_one(host: str) -> None:
    with pytest.raises(InputValueError, match="give a token"):
        check_reachable(host, None)
    check_reachable(host, TOKEN)
    with pytest.raises(InputValueError, match="guessed"):
        check_reachable(host, "short")
