"""How sessions and the service end: faults, a tick that raises, signals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import torch
from fake_model import FakeModel
from local_service import FAST, eventually, serve
from tokenizer_file import write_tokenizer

from tml_runtime import InteractionModel, ModelConfig, cli, errors
from tml_runtime.model.checkpoint import SINGLE
from tml_runtime.model.load import save_weights
from tml_runtime.model.weights import MoeWeights
from tml_runtime.serve.client import connect
from tml_runtime.serve.events import ServiceError, Speech
from tml_runtime.serve.protocol import CloseCode
from tml_runtime.text import TOKENIZER_FILE, HfTokenizer

HERE = Path(__file__).parent


def test_a_fault_ends_its_session_and_no_other(run) -> None:
    model = FakeModel(FAST)

    async def talk() -> None:
        async with serve(model) as served, connect(served.url) as good:
            async with served.raw(hello={}) as raw:
                await raw.until("welcome")
                (slot,) = {s.session._seat.slot for s in served.service.sessions[1:]}
                model.faulty |= {(tick, slot) for tick in range(model.ticks, model.ticks + 50)}
                error = await raw.until("error")
                assert error["code"] == "session_fault" and error["fatal"]
                assert await raw.closed() == CloseCode.SESSION_FAULT
            assert served.service.counts.faults == 1
            await eventually(lambda: len(served.service.sessions) == 1)
            model.faulty.clear()
            count = 0
            async for event in good:
                count += isinstance(event, Speech)
                if count > 20:
                    break
            assert good.resumes == 0

    run(talk())


@pytest.mark.parametrize("method", ["poll", "interrupt", "push_text"])
def test_a_bug_in_one_session_ends_no_other(
    run, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def talk() -> None:
        async with serve() as served, connect(served.url) as good:
            async with served.raw(hello={}) as raw:
                await raw.until("welcome")

                def fail(*arguments: object) -> None:
                    raise ZeroDivisionError("a bug")

                setattr(served.service.sessions[1].session, method, fail)
                await raw.say(type="text", seq=0, text="hi")
                await raw.say(type="interrupt")
                error = await raw.until("error")
                assert error["code"] == "internal" and "a bug;" in error["message"]
                assert await raw.closed() == CloseCode.INTERNAL
            await eventually(lambda: len(served.service.sessions) == 1)
            async for event in good:
                if isinstance(event, Speech) and event.seq > 3:
                    break
            assert good.resumes == 0

    run(talk())
    assert "a bug" in caplog.text


def test_a_tick_that_raises_is_told_to_every_client(run) -> None:
    now = False

    def explode(tick: int) -> None:
        if now:
            raise ZeroDivisionError("on purpose")

    async def talk() -> None:
        nonlocal now
        async with (
            serve(FakeModel(FAST, on_tick=explode), slots=3) as served,
            served.raw(hello={}) as one,
            served.raw(hello={}) as two,
            served.raw() as none_yet,
        ):
            await asyncio.gather(one.until("welcome"), two.until("welcome"))
            now = True
            for raw in (one, two, none_yet):
                error = await raw.until("error")
                assert error["code"] == "loop_failed" and "ZeroDivisionError" in error["message"]
                assert "on purpose" not in error["message"]  # that is for the log
                assert await raw.closed() == CloseCode.LOOP_FAILED
            assert served.service.over.is_set()
            assert await served.get("/healthz") == (503, {"alive": False, "ready": False})
            assert (await served.get("/status"))[1]["service"]["state"] == "failed"
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                async with served.raw():
                    pass
            assert caught.value.status == 503

    run(talk())


@contextlib.asynccontextmanager
async def child(
    explode: int, *arguments: str
) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """`tml-runtime serve` with the fake model, and the URL it listens on."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(HERE / "serve_child.py"), str(explode), "--port", "0", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    try:
        line = (await process.stdout.readline()).decode()
        if not line.startswith("listening on ws://127.0.0.1:"):
            raise AssertionError(line + (await process.stderr.read()).decode())
        yield line.split()[-1], process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_the_process_ends_as_its_supervisor_expects(run) -> None:
    """Status 0 after SIGTERM, 1 when a tick raises; both at once, since a start takes seconds."""

    async def drain() -> None:
        async with child(-1, "--demo") as (url, process), connect(url) as client:
            assert process.stdout is not None
            shown = (await process.stdout.readline()).decode()
            page = url.replace("ws:", "http:").removesuffix("v1/session")
            assert shown == f"the demo is at {page}\n"
            async with aiohttp.ClientSession() as http, http.get(page) as response:
                assert response.status == 200 and response.content_type == "text/html"
            async for event in client:
                if isinstance(event, Speech):
                    break
            process.send_signal(signal.SIGTERM)
            with pytest.raises(ServiceError) as caught:
                async for _ in client:
                    pass
            assert caught.value.code == "draining"
            assert await asyncio.wait_for(process.wait(), 20) == 0
            assert process.stderr is not None and await process.stderr.read() == b""

    async def fail() -> None:
        async with child(100) as (url, process):  # four seconds after it began
            with pytest.raises(ServiceError) as caught:
                async with connect(url) as client:
                    async for _ in client:
                        pass
            assert caught.value.code == "loop_failed"
            assert await asyncio.wait_for(process.wait(), 20) == 1
            assert process.stderr is not None
            assert b"error: the tick loop failed" in await process.stderr.read()

    async def both() -> None:
        await asyncio.gather(drain(), fail())

    run(both(), 100.0)


@pytest.mark.parametrize(
    ("ended", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (None, 1)]
)
def test_exit_status(ended, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tml_runtime.serve.server.run_service", lambda *args, **options: ended)
    monkeypatch.setattr("tml_runtime.serve.command.make_runtime", lambda *args: (None, FAST))
    assert cli.main(["serve"]) == status


def test_draining_lets_nobody_in(run) -> None:
    async def talk() -> None:
        async with serve() as served, connect(served.url) as client:
            served.service.draining = True
            with pytest.raises(ServiceError) as caught:
                async with connect(served.url):
                    pass
            assert caught.value.retry_after_s is not None
            assert (await served.get("/healthz"))[1] == {"alive": True, "ready": False}
            assert client.welcome
            served.service.draining = False

    run(talk())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "error: host '0.0.0.0' is not a loopback address"),
        (["--token", "short"], "error: token: shorter than 16 characters"),
        (["--port", "70000"], "error: port=70000 is not in 0..65535"),
        (["--sessions", "0"], "error: sessions=0 is not in 1..4096"),
        (["--grace", "nan"], "error: grace=nan is not in 0..3600"),
        (["--max-connections", "0"], "error: max_connections=0 is less than 1"),
        (["--preset", "huge"], "error: preset 'huge' is not one of"),
        (["--device", "tpu"], "error: device 'tpu' is not one of"),
        (["--seed", "-1"], "error: seed=-1 is negative"),
        (["--keep", "0"], "error: --keep 0 is not in 0..86400"),
        (["--keep", "9", "--video", "big"], "error: --video 'big' is not a size such as 320x240"),
        (["--keep", "9", "--video", "50x40"], "error: "),
        (["--demo", "--rest", "fp8"], "error: preset='cue' is never packed"),
        (["--tokenizer", "no/such.json"], "error: no/such.json cannot be read as a tokenizer"),
        (["--probe-ticks", "-1"], "error: probe_ticks=-1 is negative"),
        (["--background", "http://x/v1"], "error: --background and --background-model need"),
        (["--background", "x", "--background-model", "m"], "error: base_url='x': expected http"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and len(error.splitlines()) == 1


def test_a_packed_model_with_fp8_pages_and_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    runtimes = []

    def run(make_service, runtime, **options) -> signal.Signals:
        runtimes.append(runtime)
        return signal.SIGTERM

    monkeypatch.setattr("tml_runtime.serve.server.run_service", run)
    options = "--experts int4 --rest fp8 --page-dtype fp8 --keep 20 --keep-video 2 --video 80x40"
    assert cli.main(["serve", "--sessions", "1", *options.split()]) == 0
    (runtime,) = runtimes
    state, layers = runtime._state, runtime._model.weights.layers
    assert (state.budget.audio, state.budget.video, state.budget.reply) == (400, 20, 400)
    assert state.groups[0].pages.k_pages_L_P_G_R_C.dtype == torch.float8_e4m3fn
    routed = [w.mlp.experts.w13.format.name for w in layers if isinstance(w.mlp, MoeWeights)]
    assert set(routed) == {"int4"}
    assert {w.attention.out_D_I.format.name for w in layers} == {"fp8"}


def test_a_checkpoint_is_written_to_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tokenizer.json, which comes along when it is converted, or another one."""
    runtimes = []

    def run(make_service, runtime, **options) -> signal.Signals:
        runtimes.append(runtime)
        return signal.SIGTERM

    monkeypatch.setattr("tml_runtime.serve.server.run_service", run)
    plain, out, other = tmp_path / "plain", tmp_path / "out", tmp_path / "other.json"
    plain.mkdir()
    config = ModelConfig.preset("tiny")
    save_weights(plain / SINGLE, config, InteractionModel.random(config).weights)
    write_tokenizer(plain / TOKENIZER_FILE, config.vocab.num_valid)
    write_tokenizer(other, 300)
    assert cli.main(["convert", str(plain), str(out), "--preset", "tiny"]) == 0
    for checkpoint in (plain, plain / SINGLE, out):
        assert cli.main(["serve", "--checkpoint", str(checkpoint), "--sessions", "1"]) == 0
    ids = HfTokenizer(plain).encode("hello")
    assert [runtime._tokenizer.encode("hello") for runtime in runtimes] == [ids] * 3
    assert len(ids) < 5  # as bytes they would be
    capsys.readouterr()
    wrong = ["serve", "--checkpoint", str(out), "--tokenizer", str(other)]
    assert cli.main(wrong) == 2
    assert "other.json has ids up to 2" in capsys.readouterr().err
    assert cli.main(["serve", "--demo", "--tokenizer", str(other)]) == 2
    assert "has words of its own" in capsys.readouterr().err


def test_a_background_model_answers_what_is_delegated(monkeypatch: pytest.MonkeyPatch) -> None:
    runtimes = []

    def run(make_service, runtime, **options) -> signal.Signals:
        runtimes.append(runtime)
        return signal.SIGTERM

    monkeypatch.setattr("tml_runtime.serve.server.run_service", run)
    server = ["--background", "http://localhost:9/v1", "--background-model", "deep"]
    assert cli.main(["serve", *server, "--handoff-policy", "silent"]) == 0
    assert cli.main(["serve"]) == 0
    with_one, without = runtimes
    assert with_one.report()["handoff"] is not None
    assert with_one._handoff.options.policy.value == "silent"
    assert with_one.open_session().delegate("why?") >= 0
    with pytest.raises(errors.NotRunning, match="no background model"):
        without.open_session().delegate("why?")


@pytest.mark.parametrize("module", ["aiohttp", "PIL", "prometheus_client"])
def test_a_missing_extra_is_one_line(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "tml_runtime.prometheus", raising=False)
    monkeypatch.delattr("tml_runtime.prometheus", raising=False)
    assert cli.main(["serve"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {module} is needed to ")
    assert 'pip install "tml-kernels[serve]"' in error and len(error.splitlines()) == 1


def test_help_says_how_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "under a supervisor",
        "exits with status 1",
        "SIGTERM",
        "examples:",
        "TML_SERVE_TOKEN",
    ):
        assert words in text
    for option in ("host", "port", "token", "allow-origin", "max-connections", "sessions", "grace"):
        assert f"--{option}" in text
