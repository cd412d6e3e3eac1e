"""A runtime's counts for Prometheus: `render(runtime)` is the body that a scrape asks for.

Everything is counted since the runtime was made; rates and quantiles are the reader's to take. The
tick histogram's bounds lie at shares of the period, so that "in time" is a bucket of its own.
Needs the `serve` extra: importing this module raises MissingExtraError without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ._optional import require
from .gpu import THROTTLE
from .loop import Runtime
from .metrics import Histogram

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

_PURPOSE = "render metrics for Prometheus"
_client = require("prometheus_client", _PURPOSE, extra="serve")
_core = require("prometheus_client.core", _PURPOSE, extra="serve")

CONTENT_TYPE: str = _client.CONTENT_TYPE_LATEST

_PREFIX = "tml_runtime_"

# (name, key of the report, help)
_COUNTERS = (
    ("ticks", "ticks", "Ticks that ran."),
    ("skipped_ticks", "skipped", "Ticks that never ran because their time had passed."),
    ("session_ticks", "rows", "Ticks that ran, summed over sessions."),
    ("missing_windows", "missing", "Windows whose sound was not whole when their tick ran."),
    ("dropped_samples", "dropped_samples", "Samples of sound that came as their window closed."),
    ("shed_frames", "shed_frames", "Video frames beyond what a tick takes."),
    ("lost_outputs", "lost_outputs", "Ticks of a session whose output found its queue full."),
    ("faults", "faults", "Sessions that the runtime ended."),
    ("sessions_opened", "sessions_opened", "Sessions opened."),
    ("refused_admissions", "sessions_refused", "Sessions refused: no slot, no time or no page."),
)
_BY_CLASS = (
    ("tokens", "tokens", "Tokens appended."),
    ("kv_pages_dropped", "kv_pages_dropped", "Pages of keys and values dropped."),
)
_READINGS = (
    ("gpu_power_watts", "power_w", 1, "Power the GPU draws."),
    ("gpu_sm_clock_hertz", "sm_mhz", 1_000_000, "Clock of the GPU's multiprocessors."),
    ("gpu_temperature_celsius", "temperature_c", 1, "Temperature of the GPU."),
    ("gpu_memory_used_bytes", "memory_used_bytes", 1, "Memory in use on the GPU."),
)


def render(runtime: Runtime, refused: Mapping[str, int] | None = None) -> bytes:
    """The text exposition format. From any thread; the tick does not wait for it.

    refused: of a service, by error, requests that it refused and connections without a welcome.
    """
    registry = _client.CollectorRegistry(auto_describe=False)
    registry.register(_Collector(runtime, refused))
    return _client.generate_latest(registry)


class _Collector:
    def __init__(self, runtime: Runtime, refused: Mapping[str, int] | None) -> None:
        self._runtime = runtime
        self._refused = refused

    def collect(self) -> Iterator[Metric]:
        metrics, report = self._runtime.metrics, self._runtime.report()
        yield _histogram(
            "tick_duration_seconds",
            "From the moment a tick was due until its output was out, of ticks that ran.",
            metrics.tick_times,
        )
        yield _histogram("wake_lateness_seconds", "How late ticks began.", metrics.wake_times)
        yield _labelled(
            _core.CounterMetricFamily,
            "misses",
            "Ticks not done one period after they were due, or skipped, by reason.",
            "reason",
            report["misses_by_reason"],
        )
        for name, key, help_text in _COUNTERS:
            yield _core.CounterMetricFamily(_PREFIX + name, help_text, value=report[key])
        for name, key, help_text in _BY_CLASS:
            yield _labelled(_core.CounterMetricFamily, name, help_text, "class", report[key])
        yield from _gauges(report)
        if self._refused is not None:
            yield _labelled(
                _core.CounterMetricFamily,
                "refused_requests",
                "Requests that the service refused, and connections that it did not welcome.",
                "error",
                self._refused,
            )
        if report["black_box"] is not None:
            yield _labelled(
                _core.CounterMetricFamily,
                "black_box_files",
                "Black box files written, skipped (too soon, or one was under way) and failed.",
                "outcome",
                {name: report["black_box"][name] for name in ("written", "skipped", "failed")},
            )


def _gauges(report: dict[str, Any]) -> Iterator[Metric]:
    def gauge(name: str, help_text: str, value: float) -> Metric:
        return _core.GaugeMetricFamily(_PREFIX + name, help_text, value=value)

    taken = report["slots"] - report["slots_free"]
    yield gauge("period_seconds", "Length of a tick.", report["period_ms"] / 1000)
    yield gauge("slots", "Sessions that there is room for.", report["slots"])
    yield gauge("sessions", "Sessions that hold a slot.", taken)
    yield _labelled(
        _core.GaugeMetricFamily,
        "kv_pages",
        "Pages of keys and values that the newest tick's sessions hold.",
        "class",
        report["kv_pages"],
    )
    if (gpu := report["gpu"]) is not None:
        for name, key, scale, help_text in _READINGS:
            yield gauge(name, help_text, gpu[key] * scale)
        held = {reason: float(reason in gpu["throttle"]) for reason in THROTTLE.values()}
        help_text = "1 for each reason that holds the GPU's clocks down."
        yield _labelled(_core.GaugeMetricFamily, "gpu_throttle", help_text, "reason", held)


def _labelled(
    family: Any, name: str, help_text: str, label: str, values: Mapping[str, float]
) -> Metric:
    made = family(_PREFIX + name, help_text, labels=[label])
    for value, amount in values.items():
        made.add_metric([value], amount)
    return made


def _histogram(name: str, help_text: str, histogram: Histogram) -> Metric:
    bounds = [*(repr(ns / 1e9) for ns in histogram.bounds_ns), "+Inf"]
    buckets = list(zip(bounds, accumulate(histogram.counts.tolist()), strict=True))
    made = _core.HistogramMetricFamily(_PREFIX + name, help_text)
    made.add_metric([], buckets, histogram.sum_ns / 1e9)
    return made
