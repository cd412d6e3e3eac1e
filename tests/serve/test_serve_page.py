"""The demo's page: how it is served, its parts in node, and what every tick is told."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import aiohttp
import pytest
from local_service import N, Raw, serve

from tml_runtime.serve.page import page_origins
from tml_runtime.serve.protocol import Hello, ProtocolError, decode_control
from tml_runtime.serve.served import MAX_TICKS

HERE = Path(__file__).parent
WEB = HERE.parents[1] / "runtime" / "tml_runtime" / "serve" / "web"


def node_is_missing() -> str | None:
    node = shutil.which("node")
    if node is None:
        return "node is not installed: the page's parts are not tested"
    version = subprocess.run([node, "--version"], capture_output=True, text=True).stdout
    if int(re.findall(r"\d+", version)[0]) < 20:
        return f"node {version.strip()} is older than 20: the page's parts are not tested"
    return None


@pytest.mark.parametrize("path", sorted(HERE.glob("*.test.mjs")), ids=lambda path: path.stem)
def test_parts_of_the_page(path: Path) -> None:
    if (reason := node_is_missing()) is not None:
        pytest.skip(reason)
    done = subprocess.run(["node", "--test", path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_is_served_and_nothing_else(run) -> None:
    async def talk() -> None:
        async with serve(page=True) as served, aiohttp.ClientSession() as http:
            for file in WEB.iterdir():
                path = "" if file.name == "index.html" else file.name
                async with http.get(f"{served.http}/{path}") as response:
                    assert response.status == 200
                    assert await response.read() == file.read_bytes()
                    kind = {"html": "text/html", "css": "text/css", "mjs": "text/javascript"}
                    assert response.content_type == kind[file.suffix[1:]]
                    policy = response.headers["Content-Security-Policy"]
                    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
                    assert "unsafe" not in policy and "*" not in policy and "http" not in policy
                    assert response.headers["X-Content-Type-Options"] == "nosniff"
            for path in ("index.html", "../page.py", "%2e%2e/page.py", "web/main.mjs", "main.mjs/"):
                async with http.get(f"{served.http}/{path}") as response:
                    assert response.status == 404

    run(talk())


def test_the_page_asks_nothing_of_other_hosts() -> None:
    """And has no script or style in its HTML, which its policy would not run."""
    for file in WEB.iterdir():
        text = file.read_text()
        assert not re.search(r"(https?|wss?)://", text), file.name
        assert len(text.splitlines()) < 400
    page = (WEB / "index.html").read_text()
    assert not re.search(r"\son\w+=|style=|<style|javascript:", page)
    assert all(" src=" in script for script in re.findall(r"<script[^>]*>", page))


def test_without_demo_there_is_no_page(run) -> None:
    async def talk() -> None:
        async with serve() as served, aiohttp.ClientSession() as http:
            for path in ("/", "/main.mjs"):
                async with http.get(served.http + path) as response:
                    assert response.status == 404

    run(talk())


def test_the_page_may_connect_and_no_other(run) -> None:
    async def talk() -> None:
        async with serve(page=True) as served:
            port = served.http.rpartition(":")[2]
            for host in ("127.0.0.1", "localhost"):
                async with served.raw(hello={}, origin=f"http://{host}:{port}") as raw:
                    await raw.until("welcome")
            for origin in (f"http://evil.example:{port}", "http://127.0.0.1", "null"):
                host = {"Host": origin.removeprefix("http://")}  # a name that leads here
                with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                    async with served.raw(origin=origin, headers=host):
                        pass
                assert caught.value.status == 403

    run(talk())


def test_origins_are_those_of_the_address() -> None:
    assert page_origins("127.0.0.1", 80) == ("http://127.0.0.1", "http://localhost")
    assert page_origins("::1", 8760) == ("http://[::1]:8760", "http://localhost:8760")
    assert page_origins("192.0.2.7", 8760) == ("http://192.0.2.7:8760",)
    assert page_origins("0.0.0.0", 8760) == page_origins("::", 8760) == ()


# Ticks


async def ticks(raw: Raw, count: int) -> list[dict]:
    return [await raw.until("tick") for _ in range(count)]


def test_who_asks_is_told_every_tick_once(run) -> None:
    async def talk() -> None:
        async with serve() as served, served.raw(hello={"ticks": True}) as raw:
            welcome = await raw.until("welcome")
            told = await ticks(raw, 40)
            records = served.service.runtime.metrics.records()
            (session,) = served.service.sessions
        due = (records["tick"] + 1 - session.session.first_tick) * N
        tick_ns = records["woke_ns"] - records["scheduled_ns"] + records["busy_ns"]
        expected = {
            int(at): (round(float(ns) / 1e6, 3), bool(missed), int(skipped))
            for at, ns, missed, skipped in zip(
                due, tick_ns, records["missed"], records["skipped"], strict=True
            )
        }
        stamps = [tick["stamp"] for tick in told]
        first = max(1, stamps[0])
        assert stamps == [at for at in expected if first <= at <= stamps[-1]]
        assert stamps[0] > max(0, welcome["media_now"])
        for tick in told:
            assert (tick["ms"], tick["missed"], tick["skipped"]) == expected[tick["stamp"]]

    run(talk())


def test_who_does_not_ask_is_told_none(run) -> None:
    async def talk() -> None:
        async with serve(slots=4) as served:
            async with served.raw(hello={"ticks": True}) as raw:
                resume = (await raw.until("welcome"))["resume"]
                await ticks(raw, 2)
            for hello in ({}, {"ticks": None}, {"resume": resume}):
                async with served.raw(hello=hello) as raw:
                    await raw.until("welcome")
                    for _ in range(10):
                        assert b"tick" not in (await raw.ws.receive_bytes(timeout=5))

    run(talk())


def test_ticks_that_nobody_reads_are_lost_and_bounded(run) -> None:
    async def talk() -> None:
        async with serve() as served, served.raw(hello={"ticks": True}) as raw:
            await ticks(raw, 3)
            (session,) = served.service.sessions
            for _ in range(100):
                session.tell_ticks(served.service.runtime.metrics.records(), N)
            assert session.ticks is not None and len(session.ticks) == MAX_TICKS

    run(talk())


def test_ticks_is_true_or_false() -> None:
    assert decode_control('{"type":"hello","version":1,"ticks":true}') == Hello(
        1, None, None, {}, ticks=True
    )
    for value in ("1", '"yes"', "[]"):
        with pytest.raises(ProtocolError) as caught:
            decode_control(f'{{"type":"hello","version":1,"ticks":{value}}}')
        assert caught.value.field == "ticks"
