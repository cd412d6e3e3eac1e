from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_model import FakeModel, make_runtime

from bench import models, sessions_run
from bench.__main__ import main
from bench.soak import LEAK, slope, summarize
from tml_runtime.metrics import by_class

ABOUT = {"preset": "fake", "device": "cpu", "dtype": "float32", "experts": None, "rest": None}
MIB = 1 << 20


def minute(number: int, rss: float = 100 * MIB, p99: float | None = 20.0, **other: Any) -> dict:
    times = None if p99 is None else {"p50": p99 / 2, "p99": p99, "max": 2 * p99}
    return {
        "minute": number,
        "ticks": 300,
        "misses": 1,
        "tick_ms": times,
        "kv_pages": by_class([0, 0, 4, 2, 4]),
        "kv_pages_dropped": by_class([0, 0, number, 1, 0]),
        "memory": {"rss": rss, "gpu_allocated": None},
        **other,
    }


def test_the_last_minute_against_the_first() -> None:
    rows = [minute(1), minute(2, p99=90.0), minute(3, rss=110 * MIB, p99=30.0)]
    found = summarize(rows)
    assert found["first"]["tick_p99_ms"] == 20.0 and found["last"]["tick_p99_ms"] == 30.0
    assert found["change"]["tick_p99_ms"] == found["change"]["tick_p50_ms"] == 1.5
    assert found["change"]["pages"] == 1.0 and found["change"]["rss"] == pytest.approx(1.1)
    assert found["change"]["gpu_allocated"] is None
    assert found["rollovers"] == by_class([0, 0, 1 + 2 + 3, 3, 0])
    assert found["misses"] == 3 and found["problems"] == []


def test_without_times_nothing_is_said_of_them() -> None:
    found = summarize([minute(1, p99=None), minute(2, p99=None)])
    assert found["first"]["tick_p50_ms"] is found["change"]["tick_p50_ms"] is None
    assert found["problems"] == []


def test_growth_in_the_second_half_is_a_leak() -> None:
    filling = [minute(m, rss=(100 + min(m, 5) * 50) * MIB) for m in range(1, 13)]
    assert summarize(filling)["problems"] == []
    leaking = [minute(m, rss=100 * MIB + 2 * LEAK * m) for m in range(1, 13)]
    assert summarize(leaking)["problems"] == ["rss grows by 2.00 MiB a minute"]
    assert summarize(leaking[:5])["problems"] == []  # too few to tell
    assert slope(leaking, "rss") == pytest.approx(2 * LEAK)
    assert slope(leaking[:2], "rss") is None and slope(leaking, "gpu_allocated") is None


def test_what_must_not_be_is_named() -> None:
    rows = [minute(1), minute(2, ticks=0)]
    found = summarize(rows, session_faults=["gone"], broken="page 3 is nobody's", failure="oops")
    assert found["problems"] == [
        "session fault: gone",
        "the loop ended after minute 2: oops",
        "cache invariant: page 3 is nobody's",
        "minute 2: no tick ran",
    ]


def fake(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    model = FakeModel(keep=False, **options)
    monkeypatch.setattr(models, "make_model", lambda args: (model, dict(ABOUT)))
    monkeypatch.setattr(sessions_run, "Runtime", lambda model, **o: make_runtime(model, **o)[0])


SOAK = ["sessions", "--soak", "--fast", "--sessions", "1", "--warm-up", "1"]


def test_the_command_on_the_virtual_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch)
    stored = tmp_path / "soak.json"
    assert main([*SOAK, "--minutes", "2", "--profile", "wifi", "--json", str(stored)]) == 0
    result = json.loads(stored.read_text())
    assert result["kind"] == "soak" and result["realtime"] is False and result["problems"] == []
    assert [row["minute"] for row in result["minutes"]] == [1, 2]
    for row in result["minutes"]:
        assert (row["ticks"], row["windows"], row["tick_ms"]) == (300, 300, None)
    assert "last minute / first:" in capsys.readouterr().out


def test_a_session_that_ends_early_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, faulty={(20, 0)})
    assert main([*SOAK, "--minutes", "1"]) == 1
    assert "PROBLEM: session fault: the tick at t=4.0" in capsys.readouterr().out


def test_a_loop_that_ends_early_keeps_its_minutes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(tick: int) -> None:
        if tick == 400:
            raise ValueError("bad weights")

    fake(monkeypatch, on_tick=fail)
    assert main([*SOAK, "--minutes", "3"]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM: the loop ended after minute 1: ValueError('bad weights')" in out

    fake(monkeypatch, on_tick=lambda tick: fail(tick + 380))
    with pytest.raises(SystemExit, match="bad weights"):
        main([*SOAK, "--minutes", "1"])
