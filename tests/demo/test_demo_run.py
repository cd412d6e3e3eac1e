"""Whole runs: the four files, their contents, and that the same seed gives the same bytes."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from tml_runtime.demo import run
from tml_runtime.demo.prepare import DemoError, Options
from tml_runtime.demo.run import FILES, run_demo

ROOT = Path(__file__).parents[2]
PERCENTILES = {"p50", "p99", "p999", "max"}


def fast(talk: Path, film: Path, out: Path, **changed: Any) -> Options:
    asked = {"audio": str(talk), "video": str(film), "seconds": 1.5, "realtime": False, "out": out}
    return Options(**{"preset": "tiny", **asked, **changed})


class Runs:
    """Fast runs, each made once."""

    def __init__(self, talk: Path, film: Path, folder: Path) -> None:
        self._talk, self._film, self._folder = talk, film, folder
        self._made: dict[str, tuple[dict, Path, str]] = {}

    def __call__(self, name: str, **changed: Any) -> tuple[dict, Path, str]:
        """(report, folder, what was shown)"""
        if name not in self._made:
            shown = io.StringIO()
            options = fast(self._talk, self._film, self._folder / name, **changed)
            self._made[name] = run_demo(options, shown), options.out, shown.getvalue()
        return self._made[name]


@pytest.fixture(scope="module")
def runs(talk: Path, film: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(talk, film, tmp_path_factory.mktemp("runs"))


@pytest.fixture(params=[1, 3], ids=["1-session", "3-sessions"])
def made(request: pytest.FixtureRequest, runs: Runs) -> tuple[dict, Path, str]:
    return runs(f"sessions-{request.param}", sessions=request.param)


def test_writes_the_four_files_and_says_so(made: tuple[dict, Path, str]) -> None:
    report, out, shown = made
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    assert json.loads((out / "report.json").read_text()) == report
    assert f"{report['sessions']} session" in shown
    assert "untrained weights: shows the loop, not a conversation" in shown
    assert "8 ticks (1.6 s on a virtual clock), 0 misses" in shown
    assert "tick ms: p50 " in shown
    assert "\x1b" not in shown  # no terminal, no escapes


def test_report_counts_what_went_in_and_out(made: tuple[dict, Path, str]) -> None:
    report, _, _ = made
    assert report["ticks"] == 8  # 1.5 s are 7.5 ticks
    assert report["misses"] == report["skipped"] == report["missing"] == 0
    assert report["shed_frames"] == report["lost_outputs"] == report["faults"] == 0
    assert not report["interrupted"]
    assert len(report["clients"]) == report["sessions"]
    for number, client in enumerate(report["clients"]):
        assert client["media_start_s"] == 5.0 * number
        assert (client["audio_pieces"], client["video_frames"]) == (80, 16)
        assert (client["refused"], client["late"], client["missing_windows"]) == (0, 0, 0)
        assert client["ticks"] == 8
        assert client["speech_s"] == pytest.approx(1.6)
        assert client["speech_dbfs"] < 0
        assert client["fault"] is None
    speech = [client["speech_sha256"] for client in report["clients"]]
    assert len(set(speech)) == len(speech)  # each session has its own seed and media


def test_fast_report_has_no_measured_time(made: tuple[dict, Path, str]) -> None:
    report, _, _ = made
    assert report["mode"] == "fast"
    assert report["tick_ms"] == report["wake_ms"] == dict.fromkeys(PERCENTILES)
    assert report["stages_ms"] == {}


def test_report_fields_are_those_documented(made: tuple[dict, Path, str]) -> None:
    report, _, _ = made
    text = (ROOT / "docs" / "report.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in row.replace("`", "").replace(",", " ").split()}
    fields = set(report) | set(report["clients"][0]) | set(report["kv"])
    assert fields == named - set(FILES)
    assert (report["schema"], report["version"]) == ("tml-runtime-report", 1)
    assert set(report["backends"].values()) <= {"plain", "triton"}
    assert {"dmel", "patch_embed", "flow_head", "sample"} <= set(report["backends"])


def test_speech_wav_is_what_session_0_spoke(made: tuple[dict, Path, str]) -> None:
    report, out, _ = made
    pcm, rate = soundfile.read(out / "speech.wav", dtype="float32")
    assert rate == 16_000
    assert len(pcm) == round(1.8 * 16_000)  # the last tick speaks for the period after it
    assert not pcm[:3200].any()  # nothing can be said before the first tick ran
    level = 10 * np.log10(np.mean(np.square(pcm, dtype=np.float64)))
    assert level == pytest.approx(report["clients"][0]["speech_dbfs"], abs=0.02)
    assert -50 < level < -8  # untrained speech is noise, at a level that can be played


def test_trace_is_valid_and_in_order(made: tuple[dict, Path, str]) -> None:
    report, out, _ = made
    trace = json.loads((out / "trace.json").read_text())
    events = [event for event in trace["traceEvents"] if event["ph"] != "M"]
    times = [event["ts"] for event in events]
    assert times == sorted(times)
    assert times[0] == 0
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")
    assert {event["ph"] for event in events} == {"X", "i", "C"}
    ticks = [event for event in events if event["name"].startswith("tick ")]
    assert [event["name"] for event in ticks] == [f"tick {n}" for n in range(8)]
    begun = [event["ts"] for event in ticks]
    ended = [event["ts"] + event["dur"] for event in ticks]
    for n in range(1, 8):  # tick 0's window is 200 ms long, and the first event lies at its begin
        assert begun[n] == pytest.approx(max(200_000 * (n + 1), ended[n - 1]), abs=0.01)
    assert all(event["args"]["rows"] == report["sessions"] for event in ticks)
    pushed = [event["name"] for event in events if event["ph"] == "i"]
    assert pushed.count("audio") == 80 * report["sessions"]
    assert pushed.count("video") == 16 * report["sessions"]
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert len(names - {"garbage collections"}) == 1 + 2 * report["sessions"]


def test_stages_lie_within_their_ticks(made: tuple[dict, Path, str]) -> None:
    trace = json.loads((made[1] / "trace.json").read_text())
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["tid"] == 1]
    ticks = [span for span in spans if span["name"].startswith("tick ")]
    for tick in ticks:
        end = tick["ts"] + tick["dur"]
        inside = [s for s in spans if s is not tick and tick["ts"] <= s["ts"] < end - 0.001]
        assert {"take", "model", "model.prefill", "model.steps"} <= {s["name"] for s in inside}
        assert all(s["ts"] + s["dur"] <= end + 0.001 for s in inside)


def test_timeline_is_a_picture_with_everything_on_it(made: tuple[dict, Path, str]) -> None:
    picture = np.asarray(Image.open(made[1] / "timeline.png").convert("RGB"), dtype=int)
    height, width, _ = picture.shape
    assert width >= 1200
    assert height >= 500
    rows = (picture.min(axis=2) < 200).mean(axis=1)
    assert (rows > 0).mean() > 0.4  # drawn all over
    heard = np.abs(picture - (47, 111, 171)).sum(axis=2) < 60
    spoken = np.abs(picture - (194, 86, 26)).sum(axis=2) < 60
    assert heard.sum() > 2000
    assert spoken.sum() > 2000
    assert (picture.reshape(-1, 3) == 255).all(axis=1).mean() < 0.95


@pytest.mark.parametrize("name", ["report.json", "speech.wav", "timeline.png"])
def test_same_seed_same_bytes(name: str, runs: Runs) -> None:
    _, first, _ = runs("sessions-3", sessions=3)
    _, again, _ = runs("again", sessions=3)
    assert (first / name).read_bytes() == (again / name).read_bytes()


def test_another_seed_says_something_else(runs: Runs) -> None:
    first, _, _ = runs("sessions-1", sessions=1)
    other, _, _ = runs("other-seed", seed=1)
    assert first["clients"][0]["text"] != other["clients"][0]["text"]
    assert first["clients"][0]["speech_sha256"] != other["clients"][0]["speech_sha256"]


def test_a_session_does_not_depend_on_the_others(runs: Runs) -> None:
    alone, _, _ = runs("sessions-1", sessions=1)
    among_three, _, _ = runs("sessions-3", sessions=3)
    assert alone["clients"][0] == among_three["clients"][0]


def test_nothing_to_hear_or_see(runs: Runs) -> None:
    report, out, _ = runs("dark", audio="none", video="none", seconds=0.4)
    assert report["media"] == {"audio": None, "video": None}
    assert report["clients"][0]["video_frames"] == 0
    assert (report["missing"], report["clients"][0]["audio_pieces"]) == (0, 20)
    assert {path.name for path in out.iterdir()} == set(FILES)


def test_a_film_brings_its_own_sound(tmp_path: Path) -> None:
    from demo_recordings import write_film

    film = write_film(tmp_path / "film.mp4", tone_hz=500.0)
    options = Options(video=str(film), seconds=0.2, realtime=False, out=tmp_path / "out")
    report = run_demo(options, io.StringIO())
    assert report["media"]["audio"]["source"] == "film.mp4"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_gets_a_live_table(talk: Path, film: Path, tmp_path: Path) -> None:
    shown = Terminal()
    run_demo(fast(talk, film, tmp_path, seconds=0.6), shown)
    text = shown.getvalue()
    for word in (
        "stage, ms",
        "prefill",
        "publish",
        "hears",
        "says",
        "of 200 ms",
        "misses",
        "holds",
        "█",
    ):
        assert word in text, word
    assert "3 ticks (0.6 s on a virtual clock), 0 misses" in text


def test_real_time_run(talk: Path, film: Path, tmp_path: Path) -> None:
    options = fast(talk, film, tmp_path, realtime=True, seconds=2.0)
    report = run_demo(options, io.StringIO())
    assert report["mode"] == "realtime"
    assert 1 <= report["ticks"] <= 10
    assert set(report["tick_ms"]) == PERCENTILES
    assert 0 < report["tick_ms"]["p50"] <= report["tick_ms"]["max"]
    assert report["wake_ms"]["p50"] >= 0
    assert {"take", "model", "model.steps", "publish"} <= set(report["stages_ms"])
    (client,) = report["clients"]
    # pieces are handed in 60 ms early, over the two seconds and half a tick that were played
    assert 90 <= client["audio_pieces"] + client["refused"] <= 120
    trace = json.loads((tmp_path / "trace.json").read_text())
    ticks = [e for e in trace["traceEvents"] if e["name"].startswith("tick ")]
    assert len(ticks) == report["ticks"] - report["skipped"]
    misses = [e for e in trace["traceEvents"] if e["name"].startswith("MISS")]
    assert len(misses) == report["misses"]


def test_ctrl_c_on_the_virtual_clock_keeps_what_was_made(
    talk: Path, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver = run.LiveSource.deliver

    def interrupted_in_the_third_tick(source: run.LiveSource, until_ns: int) -> None:
        if until_ns == 600_000_000:
            raise KeyboardInterrupt
        deliver(source, until_ns)

    monkeypatch.setattr(run.LiveSource, "deliver", interrupted_in_the_third_tick)
    report = run_demo(fast(talk, film, tmp_path), io.StringIO())
    assert report["interrupted"]
    assert report["ticks"] == 2
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)


def test_ctrl_c_in_real_time_writes_the_report(talk: Path, film: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tml_runtime.cli", "demo", "--seconds", "600"]
    command += ["--audio", str(talk), "--video", str(film), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        process.stdout.readline()  # the title: everything is loaded
        time.sleep(3.0)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "wrote report.json" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["interrupted"]
    assert report["ticks"] < 600 * 5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"preset": "huge"}, "preset 'huge' is not one of tiny, slice, inkling-small, cue"),
        ({"seconds": 0.0}, "seconds=0 is not in"),
        ({"seconds": -1.0}, "seconds=-1 is not in"),
        ({"seconds": float("nan")}, "seconds=nan is not in"),
        ({"seconds": float("inf")}, "seconds=inf is not in"),
        ({"sessions": 0}, "sessions=0 is not in 1..256"),
        ({"device": "tpu"}, "device 'tpu' is not one of auto, cpu, cuda"),
        ({"seed": -1}, "seed=-1 is not in"),
        ({"keep": 0.0}, "keep=0 is not in 0..600 (above 0)"),
        ({"keep": float("inf")}, "keep=inf is not in"),
        ({"keep": 600.1}, "keep=600.1 is not in"),
        ({"keep_video": -2.0}, "keep_video=-2 is not in"),
        ({"out": Path(__file__)}, "is a file, not a folder"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(next(iter(value.items()))),
)
def test_options_are_checked(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DemoError) as error:
        Options(**changed)
    assert message in str(error.value)


def test_a_model_that_does_not_fit_is_refused(
    talk: Path, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tml_runtime.random_model._free_bytes", lambda device: 10**9)
    options = fast(talk, film, tmp_path / "out", preset="inkling-small", device="cpu")
    with pytest.raises(DemoError, match=r"needs \d+ GB .* and cpu has 1 GB free"):
        run_demo(options, io.StringIO())
    assert not options.out.exists()
