"""Traces of ticks: what lies on which track, and from a black box file through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, make_runtime
from fake_ticks import MS, PERIOD_MS, FakeTicks

from tml_runtime import cli
from tml_runtime.blackbox import BlackBox, load
from tml_runtime.gpu import SAMPLE
from tml_runtime.perfetto import (
    FIRST_FREE,
    GPU,
    instant,
    tick_events,
    write_black_box,
    write_runtime,
    write_trace,
)


def box_of(ticks: FakeTicks, samples: np.ndarray | None = None) -> BlackBox:
    return BlackBox(
        cause="miss",
        tick=int(ticks.metrics.records()["tick"][-1]),
        error="",
        records=ticks.metrics.records(),
        stages=ticks.metrics.stages,
        samples=np.zeros(0, SAMPLE) if samples is None else samples,
        sessions=[],
        report={"period_ms": PERIOD_MS},
        config={},
    )


def trace_of(box: BlackBox, path: Path) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Events that are no names, and the names of threads."""
    write_black_box(path, box)
    trace = json.loads(path.read_text())
    assert trace["otherData"]["cause"] == box.cause
    events = [event for event in trace["traceEvents"] if event["ph"] != "M"]
    times = [event["ts"] for event in events]
    assert times == sorted(times) and (not times or times[0] == 0)
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")
    threads = [event for event in trace["traceEvents"] if event["name"] == "thread_name"]
    return events, {event["tid"]: event["args"]["name"] for event in threads}


def test_ticks_gpu_and_collections_have_tracks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ticks = FakeTicks(monkeypatch)
    ticks.run(take=2, gpu=(0.5, 45), model=50, gc=8, publish=3)
    events, threads = trace_of(box_of(ticks), tmp_path / "trace.json")
    spans = {
        (threads[event["tid"]], event["name"]): (event["ts"] / 1000, event["dur"] / 1000)
        for event in events
        if event["ph"] == "X"
    }
    assert spans == {  # in ms from the tick's wake
        ("ticks", "tick 0"): (0, 55),
        ("ticks", "take"): (0, 2),
        ("ticks", "model"): (2, 50),
        ("ticks", "publish"): (52, 3),
        ("GPU", "tick 0"): (2.5, 44.5),
        ("garbage collections", "collection"): (2, 8),
    }
    (on_gpu,) = [event for event in events if event.get("tid") == GPU and event["ph"] == "X"]
    assert on_gpu["args"] == {"bucket": [4, 128], "launch_gap_us": 500.0}
    (tick,) = [event for event in events if event["ph"] == "X" and event["dur"] == 55_000]
    assert tick["args"]["rows"] == 1 and tick["args"]["tokens"]["audio"] == 2


def test_misses_are_instants_with_their_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ticks = FakeTicks(monkeypatch)
    ticks.run()
    ticks.run(model=450)
    ticks.run(skip=3)
    events, _ = trace_of(box_of(ticks), tmp_path / "trace.json")
    misses = {
        event["args"]["tick"]: (event["name"], event["ts"] / 1000)
        for event in events
        if event["name"].startswith("MISS")
    }
    assert misses == {  # the first event is tick 0's wake, at 200 ms
        1: ("MISS: model", 400),
        2: ("MISS: skipped, overrun", 600),
        3: ("MISS: skipped, overrun", 800),
        4: ("MISS: skipped, woke_late", 1000),
    }


def test_counters_say_so_when_something_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ticks = FakeTicks(monkeypatch)
    for rows in (0, 2, 2, 3, 3, 0):
        ticks.run(rows=rows)
    samples = np.zeros(3, SAMPLE)
    samples["t_ns"] = np.array([200, 1200, 2200]) * MS
    samples["power_w"], samples["sm_mhz"] = [300.5, 650, 700], 1980
    samples["throttle"] = [0, 4, 4]
    events, threads = trace_of(box_of(ticks, samples), tmp_path / "trace.json")
    counters = [event for event in events if event["ph"] == "C"]
    sessions = [event["args"]["sessions"] for event in counters if event["name"] == "sessions"]
    assert sessions == [2, 3, 0]
    held = [event["args"]["reply"] for event in counters if event["name"] == "pages held"]
    assert held == [0, 2, 3, 0]
    power = [(e["ts"], e["args"]["W"]) for e in counters if e["name"] == "GPU power"]
    assert power == [(0, 300.5), (1e6, 650), (2e6, 700)]
    (throttled,) = [event for event in events if event["name"].startswith("clocks")]
    assert throttled["name"] == "clocks held by sw_power_cap" and throttled["ts"] == 1e6
    assert threads[throttled["tid"]] == "GPU"


def test_ticks_of_a_virtual_clock_never_overlap(tmp_path: Path) -> None:
    runtime, _ = make_runtime()
    with runtime, runtime.open_session():
        runtime.run_ticks(3)
    records = runtime.metrics.records()
    records["busy_ns"] = 250 * MS  # longer than the period that the clock stood still for
    events = list(tick_events(records, runtime.metrics.stages, PERIOD_MS * MS))
    begun = [event["ts"] for event in events if event["name"].startswith("tick ")]
    assert begun == [200 * MS, 450 * MS, 700 * MS]
    model = [event["ts"] for event in events if event["name"] == "model"]
    assert all(0 <= at - begin < 250 * MS for at, begin in zip(model, begun, strict=True))


def test_any_runtime_can_be_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, _ = make_runtime()
    with runtime, runtime.open_session():
        runtime.run_ticks(4)
        samples = np.zeros(1, SAMPLE)
        samples["t_ns"] = PERIOD_MS * MS
        monkeypatch.setattr(runtime._watch.gpu, "samples", lambda: samples)
        write_runtime(tmp_path / "trace.json", runtime)
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = [event["name"] for event in trace["traceEvents"]]
    assert [name for name in names if name.startswith("tick ")] == [f"tick {n}" for n in range(4)]
    assert names.count("GPU power") == 1
    assert trace["otherData"]["report"]["ticks"] == 4


def test_a_caller_adds_tracks_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace(path, [], about={})
    assert [e["name"] for e in json.loads(path.read_text())["traceEvents"]] == [
        "process_name",
        "thread_name",
        "thread_sort_index",
    ]
    events = [instant("hello", 5000, FIRST_FREE, {"n": 1})]
    write_trace(path, events, about={"a": 1}, process="mine", threads={FIRST_FREE: "people"})
    trace = json.loads(path.read_text())
    assert trace["traceEvents"][0]["args"] == {"name": "mine"}
    assert {"people", "ticks"} == {
        e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"
    }
    assert trace["traceEvents"][-1]["ts"] == 0


def test_a_black_box_becomes_a_trace_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = FakeModel(on_tick=lambda n: runtime.clock.advance(PERIOD_MS * MS * 2 * (n == 4)))
    runtime, _ = make_runtime(model, black_box=tmp_path / "boxes")
    with runtime, runtime.open_session():
        runtime.run_ticks(5)
    (path,) = (tmp_path / "boxes").iterdir()
    out = tmp_path / "trace.json"
    assert cli.main(["trace", str(path), "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"miss in tick 4, 5 ticks: wrote {out}\n"
    trace = json.loads(out.read_text())
    names = [event["name"] for event in trace["traceEvents"]]
    assert [name for name in names if name.startswith("tick ")] == [f"tick {n}" for n in range(5)]
    assert "MISS: other" in names  # the virtual clock moved, and no stage took that long
    assert trace["otherData"]["config"]["num_slots"] == 1
    assert trace["otherData"]["report"] == load(path).report


@pytest.mark.parametrize("kind", ["missing", "no box", "no folder for the trace"])
def test_trace_errors_are_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "box.npz", tmp_path / "trace.json"
    if kind == "no box":
        path.write_bytes(b"nothing\nlike it")
    elif kind == "no folder for the trace":
        ticks = FakeTicks(monkeypatch)
        ticks.run()
        path.write_bytes(box_of(ticks).to_bytes())
        out = tmp_path / "no" / "folder" / "trace.json"
    assert cli.main(["trace", str(path), "-o", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    assert not out.exists()
