"""What a running loop and its callers did since the last look: times, misses, media, energy.

Everything is of one stretch of time, so that warming up can be left out and an hour cut in minutes.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from tml_runtime import Runtime
from tml_runtime.gpu import throttle_names
from tml_runtime.metrics import CLASS_NAMES, by_class, percentiles_ms
from tml_runtime.misses import Reason, skipped_behind
from tml_runtime.serve.load_report import percentiles

from .feed import Caller, Clock

INTAKE = (
    "packets_received",
    "packets_lost",
    "packets_discarded",
    "packets_duplicated",
    "concealed_samples",
    "late_samples",
    "frames_received",
    "frames_dropped",
)


class Meter:
    """Readings between two calls of `lap`. Call it from the thread that runs the callers.

    times: False leaves every time out, as on a virtual clock, where none means anything.
    """

    def __init__(
        self, runtime: Runtime, callers: Sequence[Caller], clock: Clock, *, times: bool
    ) -> None:
        self._runtime, self._callers, self._clock = runtime, callers, clock
        self._times = times
        self._period_ns = runtime.layout.period_ms * 1_000_000
        self._begin_ns, self._ticks = clock.now_ns(), runtime.metrics.count
        self._before = self._intake()
        for caller in callers:
            caller.take_turns()

    def lap(self) -> dict[str, Any]:
        """Plain data. missing_windows of `windows`: those flagged to the model as not whole.
        misses are of all ticks that were due, whether they ran or not. At most 18,000 ticks."""
        end_ns, after, records = self._clock.now_ns(), self._intake(), self._take_records()
        begin_ns, before, self._begin_ns, self._before = self._begin_ns, self._before, end_ns, after
        seconds = (end_ns - begin_ns) / 1e9
        counts = tick_counts(records, self._period_ns)
        due = counts["ticks"] + counts["skipped"]
        return {
            "seconds": seconds,
            **counts,
            "misses_per_million": 1e6 * counts["misses"] / due if due else None,
            "intake": {name: after[name] - before[name] for name in INTAKE},
            **self._all_times(records),
            "gpu": self._gpu(begin_ns, end_ns, seconds),
            "memory": memory(),
        }

    def _take_records(self) -> np.ndarray:
        """Of the ticks that ended since the last call; one that runs now is the next call's."""
        metrics = self._runtime.metrics
        while True:
            count = metrics.count
            records = metrics.records(newest=count - self._ticks)
            if metrics.count == count:
                self._ticks = count
                return records

    def _intake(self) -> Counter[str]:
        sums: Counter[str] = Counter()
        for caller in self._callers:
            stats = asdict(caller.intake.stats())
            sums.update({name: stats[name] for name in INTAKE})
        return sums

    def _all_times(self, records: np.ndarray) -> dict[str, Any]:
        """tick_ms and wake_ms as in `Metrics.report`; turn_ms: from the end of a window to the
        moment that its speech was polled, of every window of every session."""
        turns = [ms for caller in self._callers for ms in caller.take_turns()]
        if not self._times:
            return {"tick_ms": None, "wake_ms": None, "turn_ms": None}
        wake_ns = records["woke_ns"] - records["scheduled_ns"]
        return {
            "tick_ms": percentiles_ms(wake_ns + records["busy_ns"]),
            "wake_ms": percentiles_ms(wake_ns),
            "turn_ms": {"count": len(turns), **percentiles(turns)},
        }

    def _gpu(self, begin_ns: int, end_ns: int, seconds: float) -> dict[str, Any] | None:
        sessions = sum(caller.fault is None for caller in self._callers)
        samples = self._runtime.gpu_samples if self._times else np.zeros(0)
        return gpu_figures(samples, begin_ns, end_ns, seconds, sessions)


def tick_counts(records: np.ndarray, period_ns: int) -> dict[str, Any]:
    """Sums of `metrics.RECORD`s, and the misses by reason as `Metrics.report` counts them."""
    skipped = int(records["skipped"].sum())
    reasons = Counter(records["reason"][records["missed"]].tolist())
    for record in records[records["skipped"] > 0]:
        number = int(record["skipped"])
        behind = skipped_behind(
            number,
            scheduled_ns=int(record["scheduled_ns"]),
            before_done_ns=int(record["before_done_ns"]),
            period_ns=period_ns,
        )
        reasons[Reason.OVERRUN] += behind
        reasons[int(record["skip_reason"])] += number - behind
    return {
        "ticks": len(records),
        "skipped": skipped,
        "misses": skipped + int(records["missed"].sum()),
        "misses_by_reason": {r.name.lower(): reasons[r] for r in Reason if r},
        "windows": int(records["rows"].sum()),
        "missing_windows": int(records["missing"].sum()),
        **{name: int(records[name].sum()) for name in ("shed_frames", "lost_outputs", "faults")},
        "tokens": by_class(records["tokens"].sum(0)),
        "kv_pages": by_class(records["kv_pages"][-1] if len(records) else [0] * len(CLASS_NAMES)),
        "kv_pages_dropped": by_class(records["kv_dropped"].sum(0)),
    }


def gpu_figures(
    samples: np.ndarray, begin_ns: int, end_ns: int, seconds: float, sessions: int
) -> dict[str, Any] | None:
    """Of `gpu.SAMPLE`s in that time; None without any. The energy is the whole GPU's: its mean
    power, idle power included, over the minutes that all sessions had together."""
    if len(samples) == 0:
        return None
    inside = samples[(samples["t_ns"] >= begin_ns) & (samples["t_ns"] < end_ns)]
    if len(inside) == 0:
        return None
    power_w = float(inside["power_w"].mean())
    energy_j = power_w * seconds
    minutes = sessions * seconds / 60
    return {
        "power_w": power_w,
        "energy_j": energy_j,
        "energy_j_per_session_minute": energy_j / minutes if minutes and power_w else None,
        "sm_mhz": float(np.median(inside["sm_mhz"])),
        "temperature_c": int(inside["temperature_c"].max()),
        "throttle": throttle_names(int(np.bitwise_or.reduce(inside["throttle"]))),
    }


def memory() -> dict[str, int | None]:
    """Bytes: the process's resident set, and torch's on the GPU, None without one."""
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[1])
    device: dict[str, int | None] = dict.fromkeys(("gpu_allocated", "gpu_reserved", "gpu_peak"))
    if torch.cuda.is_available():
        device = {
            "gpu_allocated": torch.cuda.memory_allocated(),
            "gpu_reserved": torch.cuda.memory_reserved(),
            "gpu_peak": torch.cuda.max_memory_allocated(),
        }
    return {"rss": pages * os.sysconf("SC_PAGE_SIZE"), **device}


def forget_memory() -> None:
    """Before another runtime: give back what the last one held, and begin its peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def context_held(runtime: Runtime) -> dict[str, Any] | None:
    """Tokens and pages that all slots hold in global layers, by class, of a runtime that is not
    in a tick; None for a model without such a cache."""
    state = runtime._state  # no client can ask for that
    cache = getattr(state, "cache", None)
    if cache is None:
        return None
    tokens, pages = Counter(), Counter()
    for group, spec in enumerate(cache.groups):
        if spec.spec.window is not None:
            continue
        for slot in range(state.num_slots):
            for page in cache.pages(state.session(slot), group):
                name = page.page_class.name.lower()
                tokens[name] += page.used
                pages[name] += 1
    return {
        "tokens": {name: tokens[name] for name in CLASS_NAMES},
        "pages": {name: pages[name] for name in CLASS_NAMES},
    }


def broken_invariant(runtime: Runtime) -> str | None:
    """What the cache of a runtime that is not in a tick says of itself; None: all is well."""
    cache = getattr(runtime._state, "cache", None)
    try:
        if cache is not None:
            cache.check_invariants()
    except RuntimeError as error:
        return str(error)
    return None
