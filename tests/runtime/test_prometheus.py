"""What a scrape reads, parsed back and compared with `Runtime.report`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from fake_model import FakeModel, make_runtime
from fake_ticks import MS, FakeTicks
from prometheus_client.parser import text_string_to_metric_families

from tml_runtime import Runtime, errors, prometheus
from tml_runtime._optional import MissingExtraError
from tml_runtime.gpu import THROTTLE

PERIOD_NS = 200_000_000


def read(runtime: Runtime, refused: dict[str, int] | None = None) -> dict[tuple[str, ...], float]:
    """{(sample's name, label values...): value}; nothing may come twice."""
    found: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(prometheus.render(runtime, refused).decode()):
        assert family.documentation and family.type in ("counter", "gauge", "histogram")
        for sample in family.samples:
            key = (sample.name.removeprefix("tml_runtime_"), *sample.labels.values())
            assert sample.name.startswith("tml_runtime_") and key not in found
            found[key] = sample.value
    return found


@pytest.fixture
def busy(tmp_path) -> Iterator[Runtime]:
    """Some of everything: misses, skips, a fault, a refusal, lost outputs, a black box."""
    late = {3: 7 * PERIOD_NS // 4, 5: 3 * PERIOD_NS, 8: PERIOD_NS // 2}
    model = FakeModel(
        on_tick=lambda n: runtime.clock.advance(late.get(n, 0)), faulty={(10, 1)}, keep=False
    )
    runtime, _ = make_runtime(model, num_slots=2, output_queue_ticks=5, black_box=tmp_path)
    with runtime:
        sessions = [runtime.open_session() for _ in range(2)]
        with pytest.raises(errors.ResourceExhausted):
            runtime.open_session()
        sessions[0].push_audio(np.ones(5 * 3200, np.float32), 0.0)
        runtime.run_ticks(40)
        yield runtime


def test_a_scrape_says_what_the_report_says(busy: Runtime) -> None:
    busy.stop()  # so that the black box is out
    found, report = read(busy), busy.report()
    for reason, count in report["misses_by_reason"].items():
        assert found["misses_total", reason] == count
    assert sum(v for key, v in found.items() if key[0] == "misses_total") == report["misses"] == 4
    expected = {
        "ticks_total": report["ticks"],
        "skipped_ticks_total": report["skipped"],
        "session_ticks_total": report["rows"],
        "missing_windows_total": report["missing"],
        "dropped_samples_total": report["dropped_samples"],
        "shed_frames_total": report["shed_frames"],
        "lost_outputs_total": report["lost_outputs"],
        "faults_total": report["faults"],
        "sessions_opened_total": 2,
        "refused_admissions_total": 1,
        "period_seconds": 0.2,
        "slots": 2,
        "sessions": 1,
    }
    assert {name: found[name,] for name in expected} == expected
    assert report["faults"] == 1 and report["lost_outputs"] > 0 and report["missing"] > 0
    for name, pages in report["kv_pages"].items():
        assert found["kv_pages", name] == pages
        assert found["kv_pages_dropped_total", name] == report["kv_pages_dropped"][name]
        assert found["tokens_total", name] == report["tokens"][name]
    for outcome in ("written", "skipped", "failed"):
        assert found["black_box_files_total", outcome] == report["black_box"][outcome]
    assert report["black_box"]["written"] == 1 and report["black_box"]["skipped"] > 0
    assert not any(name.startswith("gpu") for name, *_ in found)


def test_what_a_service_refused_is_told_by_error(busy: Runtime) -> None:
    found = read(busy, {"exhausted": 3, "forbidden": 0})
    assert found["refused_requests_total", "exhausted"] == 3
    assert found["refused_requests_total", "forbidden"] == 0
    assert not any(name.startswith("refused_requests") for name, *_ in read(busy))


def test_the_histograms_hold_every_tick_at_the_deadline_s_shares(busy: Runtime) -> None:
    found, records = read(busy), busy.metrics.records()
    late_ns = records["woke_ns"] - records["scheduled_ns"]
    tick_ns = late_ns + records["busy_ns"]
    for name, values_ns, bounds in (
        ("tick_duration_seconds", tick_ns, busy.metrics.tick_times.bounds_ns),
        ("wake_lateness_seconds", late_ns, busy.metrics.wake_times.bounds_ns),
    ):
        for bound_ns in bounds:
            assert found[f"{name}_bucket", repr(bound_ns / 1e9)] == (values_ns <= bound_ns).sum()
        assert found[f"{name}_bucket", "+Inf"] == found[f"{name}_count",] == 40
        assert found[f"{name}_sum",] == pytest.approx(values_ns.sum() / 1e9)
    shares = [
        float(le) for name, *le in found if name == "tick_duration_seconds_bucket" for le in le
    ]
    assert shares[:-1] == [0.02, 0.05, 0.1, 0.15, 0.18, 0.19, 0.2, 0.25, 0.3, 0.4]
    assert found["wake_lateness_seconds_bucket", "0.1"] == 39  # one began 150 ms late


def test_the_histograms_outlive_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = FakeTicks(monkeypatch, capacity=3)
    for _ in range(50):
        ticks.run(model=97)
    runtime, _ = make_runtime()
    monkeypatch.setattr(runtime, "_metrics", ticks.metrics)
    found = read(runtime)
    assert found["tick_duration_seconds_bucket", "0.1"] == 50
    assert found["tick_duration_seconds_bucket", "0.05"] == 0
    assert found["tick_duration_seconds_sum",] == pytest.approx(50 * 100 * MS / 1e9)
    assert runtime.report()["records"] == 3


def test_gpu_readings_are_in_base_units(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, _ = make_runtime()
    reading = {
        "power_w": 512.5,
        "sm_mhz": 1980,
        "temperature_c": 61,
        "memory_used_bytes": 3 << 30,
        "throttle": ["sw_power_cap"],
    }
    monkeypatch.setattr(runtime._watch.gpu, "newest", lambda: reading)
    found = read(runtime)
    assert found["gpu_power_watts",] == 512.5
    assert found["gpu_sm_clock_hertz",] == 1.98e9
    assert found["gpu_temperature_celsius",] == 61
    assert found["gpu_memory_used_bytes",] == 3 << 30
    held = {reason: found["gpu_throttle", reason] for reason in THROTTLE.values()}
    assert held == dict.fromkeys(THROTTLE.values(), 0.0) | {"sw_power_cap": 1.0}


def test_a_runtime_that_did_nothing_yet_can_be_scraped() -> None:
    runtime, _ = make_runtime(realtime=True)
    found = read(runtime)
    assert found["ticks_total",] == found["tick_duration_seconds_count",] == 0
    assert prometheus.CONTENT_TYPE.startswith("text/plain; version=")


def test_two_runtimes_share_nothing() -> None:
    one, _ = make_runtime()
    two, _ = make_runtime(num_slots=3)
    with one, two:
        one.run_ticks(2)
        assert (read(one)["ticks_total",], read(two)["ticks_total",]) == (2, 0)
        assert (read(one)["slots",], read(two)["slots",]) == (1, 3)


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "tml_runtime.prometheus")
    with pytest.raises(MissingExtraError, match=r'pip install "tml-kernels\[serve\]"'):
        importlib.import_module("tml_runtime.prometheus")
