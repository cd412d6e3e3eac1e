"""The load generator against a service in this process, over lines that are bad on purpose."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from local_service import serve

from tml_runtime import cli
from tml_runtime.serve.load import Caller, run_load, speech_noise
from tml_runtime.serve.load_report import SessionLoad, percentiles, summary


class PerfectLine:
    def send(self, now_ns: int, num_bytes: int) -> list[int]:
        return [now_ns]


class BadLine:
    """Loses what `lose(count)` says; all else comes `delay_ms` later, and every seventh twice."""

    def __init__(self, lose, delay_ms: int = 0) -> None:
        self._lose, self._delay_ns, self.count = lose, delay_ms * 1_000_000, 0

    def send(self, now_ns: int, num_bytes: int) -> list[int]:
        self.count += 1
        if self._lose(self.count):
            return []
        return [now_ns + self._delay_ns] * (2 if self.count % 7 == 0 else 1)


def call(run, lines: list[tuple], seconds: float = 1.2, slots: int = 2) -> list[SessionLoad]:
    loads: list[SessionLoad] = []

    async def talk() -> None:
        async with serve(slots=slots) as served:
            callers = [
                Caller(number, served.url, token=None, up=up, down=down)
                for number, (up, down) in enumerate(lines)
            ]
            frames: list[int] = []
            await run_load(
                callers, seconds=seconds, sample_rate=16_000, on_frame=lambda: frames.append(1)
            )
            done = [caller.load for caller in callers if caller.load.error is None]
            assert len(frames) == sum(load.frames_sent for load in done)
            loads.extend(caller.load for caller in callers)

    run(talk())
    return loads


def test_on_a_good_line_everything_arrives(run) -> None:
    loads = call(run, [(PerfectLine(), PerfectLine()), (PerfectLine(), PerfectLine())])
    for load in loads:
        assert load.error is None and load.frames_sent == 60
        assert load.frames_lost == load.outputs_lost == load.resumes == 0
        assert load.ticks >= 3 and len(load.latency_ms) == load.ticks
        assert all(ms > -20.0 for ms in load.latency_ms)  # a window is over before it is answered


def test_a_bad_line_is_counted(run) -> None:
    up = BadLine(lambda count: count % 5 == 0, delay_ms=30)
    down = BadLine(lambda count: count % 4 == 0, delay_ms=500)
    (load,) = call(run, [(up, down)])
    assert load.error is None
    assert load.frames_lost == 12 and load.outputs_lost >= 1 and load.gaps >= 1
    assert min(load.latency_ms) > 400.0


def test_a_line_that_is_dead_for_long_breaks_the_connection_which_resumes(run) -> None:
    up = BadLine(lambda count: 10 < count < 65)
    (load,) = call(run, [(up, PerfectLine())], seconds=1.8)
    assert load.error is None and load.resumes == 1


def test_a_refused_session_says_so_and_the_others_go_on(run) -> None:
    loads = call(run, [(PerfectLine(), PerfectLine())] * 2, slots=1)
    assert loads[0].error is None and loads[0].ticks > 0
    assert "exhausted" in str(loads[1].error) and loads[1].ticks == 0


def test_the_report_is_plain_data() -> None:
    loads = [SessionLoad(0, ticks=2, latency_ms=[5.0, 7.0]), SessionLoad(1, error="gone")]
    report = json.loads(json.dumps(summary(loads, {"title": "x"})))
    assert report["total"]["latency_ms"]["max"] == 7.0 and report["total"]["failed"] == 1
    assert report["sessions"][1]["latency_ms"]["p50"] is None
    assert percentiles(list(map(float, range(1, 101)))) == {
        "p50": 50.0, "p95": 95.0, "p99": 99.0, "max": 100.0,
    }  # fmt: skip


def test_the_noise_is_seeded_and_has_pauses() -> None:
    pcm = speech_noise(10.0, 16_000, 3)
    assert pcm.dtype == np.int16 and len(pcm) == 160_000
    assert (pcm == speech_noise(10.0, 16_000, 3)).all() and (
        pcm != speech_noise(10.0, 16_000, 4)
    ).any()
    syllables = np.abs(pcm.reshape(-1, 320).astype(float)).mean(1)
    assert syllables.max() > 500 and (syllables < 5).mean() > 0.3


def test_the_command_writes_what_it_shows(
    run, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tml_runtime.serve.load_command.line_maker", lambda profile: lambda seed: PerfectLine()
    )
    out = tmp_path / "new" / "load.json"

    async def talk() -> None:
        async with serve() as served:
            arguments = ["load", "--url", served.url, "--seconds", "0.5", "--json", str(out)]
            arguments += ["--sessions", "2"]
            status: list[int] = []
            thread = threading.Thread(target=lambda: status.append(cli.main(arguments)))
            thread.start()
            while thread.is_alive():
                await asyncio.sleep(0.02)
            assert status == [0]

    run(talk())
    report = json.loads(out.read_text())
    assert report["total"]["ticks"] > 0 and report["profile"] == "clean"
    shown = capsys.readouterr().out
    assert "2 sessions, clean, 0.5 s" in shown and f"wrote {out}" in shown.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sessions", "0"], "error: sessions=0 is not in 1..4096"),
        (["--seconds", "nan"], "error: seconds=nan is not in"),
        (["--seed", "-1"], "error: seed=-1 is negative"),
        (["--url", "http://x"], "error: url 'http://x' begins neither"),
        (["--json", "/"], "error: json: / is a folder"),
        (["--json", "/dev/null/x.json"], "error: json: /dev/null/x.json cannot be written"),
        (["--audio", "no-such.wav"], "error: audio: cannot read no-such.wav"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_of_load_is_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tml_runtime.serve.load_command.line_maker", lambda profile: None)
    assert cli.main(["load", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and len(error.splitlines()) == 1


def test_nobody_listening_is_an_error_of_every_session(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tml_runtime.serve.load_command.line_maker", lambda profile: lambda seed: PerfectLine()
    )
    assert cli.main(["load", "--url", "ws://127.0.0.1:1/v1/session", "--seconds", "0.2"]) == 1
    assert capsys.readouterr().err.startswith("error: session 0: ")
