"""`bench sessions` on a fake model and, but for one run of the command, on the virtual clock."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_model import CONFIG, FakeModel, make_runtime

from bench import models, sessions_run
from bench.__main__ import main
from bench.feed import Feed, Media
from bench.machine import machine
from bench.meter import gpu_figures, tick_counts
from bench.models import make_model
from bench.sessions_report import series, show
from bench.sessions_run import Combination, Setting, measure
from tml_runtime import InteractionModel, Runtime, errors
from tml_runtime.gpu import SAMPLE
from tml_runtime.model import KvBudget

VIRTUAL = Setting(warm_up_s=2.0, realtime=False)
ABOUT = {
    "preset": "fake",
    "layout": "ms200",
    "device": "cpu",
    "dtype": "float32",
    "experts": None,
    "rest": None,
}
GPU = {"name": "H200", "driver": "580", "cuda": "13.0"}


@pytest.fixture(autouse=True)
def fake_runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runtimes of a fake model have a fake vocoder."""

    def make(model: Any, **options: Any) -> Runtime:
        is_fake = isinstance(model, FakeModel)
        return make_runtime(model, **options)[0] if is_fake else Runtime(model, **options)

    monkeypatch.setattr(sessions_run, "Runtime", make)
    yield


def run(
    combination: Combination, seconds: float = 4.0, setting: Setting = VIRTUAL, **model: Any
) -> dict[str, Any]:
    fake: Any = FakeModel(**{"keep": False, **model})
    return measure(fake, combination, setting, seconds=seconds)


def test_a_good_line_loses_nothing() -> None:
    row = run(Combination(3, None, "clean"))
    assert row["error"] is None and row["opened"] == 3 and row["refused"] == {}
    assert (row["ticks"], row["windows"], row["missing_windows"]) == (20, 60, 0)
    assert (row["misses"], row["misses_per_million"]) == (0, 0.0)
    assert row["intake"]["packets_received"] == 3 * 200
    assert row["intake"]["packets_lost"] == row["intake"]["concealed_samples"] == 0
    assert row["tick_ms"] is row["wake_ms"] is row["turn_ms"] is row["gpu"] is None
    assert row["context"] is None and row["broken_invariant"] is None
    assert row["memory"]["rss"] > 1 << 20


def test_an_outage_is_counted_in_packets_and_windows() -> None:
    row = run(Combination(2, None, "outage"), seconds=10.0)  # one second in ten is lost
    assert row["intake"]["packets_lost"] == 2 * 50
    assert 2 * 5 <= row["missing_windows"] <= 2 * 7
    assert row["windows"] == 2 * 50


def test_pictures_are_seen() -> None:
    model: Any = FakeModel()
    row = measure(model, Combination(1, (120, 80), "clean"), VIRTUAL, seconds=2.0)
    assert row["error"] is None and row["intake"]["frames_received"] == 20
    assert row["shed_frames"] == 0
    assert all(rows[0].frames.shape == (1, 2, 80, 120, 3) for rows in model.heard[3:])


def test_every_session_that_asked_is_counted() -> None:
    row = run(Combination(5, None, "clean"), setting=Setting(slots=2, realtime=False))
    assert (row["sessions"], row["opened"], row["refused"]) == (5, 2, {"slots": 3})
    assert row["windows"] == 2 * row["ticks"]
    pages = 1 + 3 * sum(KvBudget().pages().values())
    row = run(Combination(5, None, "clean"), 1.0, Setting(global_pages=pages, realtime=False))
    assert (row["opened"], row["refused"]) == (3, {"pages": 2})


def test_what_cannot_be_measured_is_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "InputValueError: frame: " in run(Combination(1, (81, 80), "clean"))["error"]

    def fail(tick: int) -> None:
        raise MemoryError("no room")

    assert "LoopFailed: " in run(Combination(1, None, "clean"), on_tick=fail)["error"]

    def refuse(self: Runtime) -> None:
        raise errors.ResourceExhausted("full", in_use=0, closing=0, capacity=0, reason="pages")

    monkeypatch.setattr(Runtime, "open_session", refuse)
    row = run(Combination(2, None, "clean"))
    assert row["error"] == "NobodyAdmitted: none of 2 sessions was admitted: full"


def test_a_fault_ends_its_session_only() -> None:
    row = run(Combination(2, None, "clean"), faulty={(15, 1)})
    assert row["error"] is None and row["faults"] == 1
    assert len(row["session_faults"]) == 1 and "not finite" in row["session_faults"][0]
    assert row["windows"] == 2 * 20 - 14  # ticks 10 to 29 are measured


def test_misses_have_reasons_and_a_rate() -> None:
    made: list[Runtime] = []

    def late(tick: int) -> None:
        clock = made[0].clock
        assert clock is not None
        clock.advance(300_000_000 * (tick == 15))

    def make(model: Any, **options: Any) -> Runtime:
        made.append(make_runtime(model, **options)[0])
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions_run, "Runtime", make)
        row = run(Combination(1, None, "clean"), on_tick=late)
    # Tick 15 ends 300 ms after its window: it misses, and 16 runs when 17 is nearly due.
    assert (row["ticks"], row["skipped"], row["misses"]) == (20, 0, 1)
    assert sum(row["misses_by_reason"].values()) == 1
    assert row["misses_per_million"] == 50_000


def test_reasons_add_up_to_what_the_runtime_counts() -> None:
    runtime, _ = make_runtime()
    clock = runtime.clock
    assert clock is not None
    with runtime:
        for late_ms in (0, 500, 0, 1300, 0):
            clock.advance(late_ms * 1_000_000)
            runtime.run_ticks(2)
        report, records = runtime.metrics.report(), runtime.metrics.records()
    counted = tick_counts(records, 200_000_000)
    assert counted["misses"] == report["misses"] > 0 and counted["skipped"] > 0
    assert counted["misses_by_reason"] == report["misses_by_reason"]
    nothing = tick_counts(records[:0], 200_000_000)
    assert nothing["misses"] == nothing["windows"] == sum(nothing["kv_pages"].values()) == 0


def test_turns_last_from_a_windows_end_to_the_poll() -> None:
    taken: list[float] = []

    def keep(self: Any) -> list[float]:
        taken.extend(self._turn_ms)
        self._turn_ms = []
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.feed.Caller.take_turns", keep)
        row = run(Combination(2, None, "wifi"))
    assert len(taken) == 2 * 30  # the warm-up's too
    assert row["windows"] == 2 * 20
    assert all(0.0 <= ms <= 5.0 for ms in taken)  # of virtual time: a tick takes none


def test_a_run_can_be_repeated() -> None:
    one, two = (run(Combination(2, (40, 40), "4g"), seconds=3.0) for _ in range(2))
    for row in (one, two):
        del row["memory"]
    assert one == two


def test_tiny_holds_context_and_keeps_its_invariants() -> None:
    parser = argparse.ArgumentParser()
    models.add_arguments(parser)
    model, _ = make_model(parser.parse_args(["--device", "cpu"]))
    assert isinstance(model, InteractionModel)
    setting = Setting(warm_up_s=0.2, realtime=False)
    row = measure(model, Combination(1, (80, 80), "clean"), setting, seconds=0.6)
    assert row["error"] is None and row["ticks"] == 3 and row["broken_invariant"] is None
    assert row["context"]["pages"] == row["kv_pages"]
    held = row["context"]["tokens"]
    assert held["audio"] > 0 and held["reply"] == 4 * CONFIG.layout.num_steps
    assert set(held) == {"anchor", "text", "audio", "video", "reply"}


@pytest.mark.gpu
def test_gpu_energy_clock_and_memory_are_read() -> None:
    model = InteractionModel.random(CONFIG, device="cuda", dtype=torch.bfloat16)
    row = measure(model, Combination(1, None, "clean"), Setting(warm_up_s=1.0), seconds=3.0)
    assert row["error"] is None and row["broken_invariant"] is None
    assert row["gpu"]["energy_j_per_session_minute"] > 0 and row["gpu"]["sm_mhz"] > 0
    assert row["memory"]["gpu_peak"] >= row["memory"]["gpu_allocated"] > 0
    assert row["graphs"] is not None and row["turn_ms"]["count"] > 0


def test_the_command_writes_a_result_and_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "make_model", lambda args: (FakeModel(keep=False), dict(ABOUT)))
    stored, drawn = tmp_path / "a" / "s.json", tmp_path / "b" / "s.png"
    options = ["--sessions", "1,2", "--seconds", "0.7", "--warm-up", "0.3", "--slots", "1"]
    files = ["--json", str(stored), "--plot", str(drawn)]
    assert main(["sessions", *options, *files]) == 0
    printed = capsys.readouterr().out
    assert "2 sessions, none, clean: " in printed and "1 refused for slots" in printed
    assert drawn.read_bytes().startswith(b"\x89PNG")
    result = json.loads(stored.read_text())
    assert result["schema"] == 1 and result["kind"] == "sessions" and result["period_ms"] == 200
    assert {"machine", "clocks", "seconds", "warm_up_s", "slots", "seed", *ABOUT} <= set(result)
    assert [row["sessions"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        assert set(row["tick_ms"]) == {"p50", "p99", "p999", "max"}
        assert set(row["turn_ms"]) == {"count", "p50", "p95", "p99", "max"}
        assert row["ticks"] + row["skipped"] > 0
    assert result["rows"][1]["refused"] == {"slots": 1}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--sessions", "0"], "'0' is not a number in 1..4096"),
        (["--sessions", "1,,2"], "'' is not a number"),
        (["--video", "big"], "neither none nor a size"),
        (["--global-pages", "1"], "'1' is neither auto nor a number above 1"),
        (["--profile", "clean,moon"], "profile 'moon' is not one of clean"),
        (["--seconds", "nan"], "'nan' is not a number in 0..1200"),
    ],
)
def test_wrong_arguments_are_named(
    options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["sessions", *options])
    assert exit_info.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--soak"], "--soak runs one combination, not 4"),
        (["--fast"], "--fast goes with --soak"),
        (["--minutes", "5"], "--minutes goes with --soak"),
        (["--soak", "--sessions", "1", "--seconds", "5"], "--seconds goes without --soak"),
        (["--video", "10x10", "--keep", "5", "--device", "cpu"], "frame height 10 is not a mul"),
        (["--plot", "x.gif"], "--plot x.gif: expected a name that ends in .png"),
        (["--soak", "--sessions", "1", "--plot", "x.png"], "--plot goes without --soak"),
    ],
)
def test_what_does_not_go_together_is_refused(options: list[str], text: str) -> None:
    with pytest.raises(SystemExit, match=text):
        main(["sessions", *options])


def test_memory_has_room_for_the_largest_picture() -> None:
    parser = argparse.ArgumentParser()
    models.add_arguments(parser)
    args = parser.parse_args(["--keep", "1"])  # five ticks
    frames = [(80, 640), (640, 480), (800, 40)]  # 32, 192 and 20 patches
    for order in (frames, frames[::-1]):
        assert models.memory_options(args, CONFIG, order)["budget"].video == 5 * 192


def test_energy_is_of_the_samples_inside() -> None:
    samples = np.zeros(5, SAMPLE)
    samples["t_ns"] = np.arange(5) * 10**9
    samples["power_w"] = [900, 100, 300, 200, 900]
    samples["sm_mhz"] = [1, 1500, 1500, 1980, 1]
    samples["throttle"] = [8, 1, 0, 4, 8]
    found = gpu_figures(samples, 10**9, 4 * 10**9, 3.0, 4)
    assert found is not None
    assert found["energy_j"] == pytest.approx(600.0)
    assert found["energy_j_per_session_minute"] == pytest.approx(600 / (4 * 3 / 60))
    assert found["sm_mhz"] == 1500 and found["throttle"] == ["gpu_idle", "sw_power_cap"]
    assert gpu_figures(samples, 5 * 10**9, 6 * 10**9, 1.0, 4) is None
    assert gpu_figures(samples[:0], 0, 10**9, 1.0, 4) is None
    without = gpu_figures(samples, 10**9, 4 * 10**9, 3.0, 0)
    assert without is not None and without["energy_j_per_session_minute"] is None


def test_the_table_has_a_row_for_every_combination() -> None:
    rows = [run(Combination(1, None, "clean"), 1.0), run(Combination(1, (81, 80), "wifi"))]
    about = {"machine": machine(), "clocks": {}, "period_ms": 200, "seconds": 1.0}
    text = show({**ABOUT, **about, "rows": rows})
    assert "1 sessions, 81x80, wifi: not measured: InputValueError" in text
    assert [line.split()[:4] for line in text.splitlines()[4:6]] == [
        ["1", "1", "none", "clean"],
        ["1", "0", "81x80", "wifi"],
    ]
    assert series(rows) == {}  # no times, no points
    timed = {**rows[0], "tick_ms": {"p999": 7.0}}
    assert series([{**timed, "opened": 4}, timed]) == {"video none, clean": [(1, 7.0), (4, 7.0)]}


def test_a_feed_that_was_held_up_leaves_late_windows_out() -> None:
    runtime, model = make_runtime()
    with runtime, runtime.open_session() as session:
        feed = Feed(session, Media(runtime.layout, seed=1), runtime.layout)
        runtime.run_ticks(3)  # nobody fed them
        feed.push_until(session.media_time, 1)
        runtime.run_ticks(1)
        assert [rows[0].missing for rows in model.heard] == [True, True, True, False]


def test_media_go_round_without_a_seam() -> None:
    media = Media(CONFIG.layout, seed=3, frame=(80, 40))
    size = 10 * media.sample_rate
    first = media.pcm(0, 320)
    assert np.array_equal(first, media.pcm(size, 320)) and len(media.pcm(size - 1, 320)) == 320
    assert np.array_equal(media.pcm(size - 1, 320)[1:], first[:-1])
    assert not media.pcm(int(1.6 * media.sample_rate), 320).any()  # a pause
    assert media.picture(0).shape == (40, 80, 3)
    assert np.array_equal(media.picture(0), media.picture(8))
