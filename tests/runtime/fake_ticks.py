"""Ticks as told, through a `Metrics` whose clock stands still unless told otherwise."""

from __future__ import annotations

import numpy as np
import pytest

from tml_runtime import clock, metrics
from tml_runtime.clock import Collections
from tml_runtime.metrics import Metrics
from tml_runtime.misses import Reason

MS = 1_000_000
PERIOD_MS = 200


class FakeTicks:
    """Times are in ms. Tick n is due at (n + 1) * 200, or once the tick before is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options) -> None:
        self.now_ns = 0
        monkeypatch.setattr(metrics, "now_ns", lambda: self.now_ns)
        monkeypatch.setattr(clock, "now_ns", lambda: self.now_ns)
        self.metrics = Metrics(period_ns=PERIOD_MS * MS, **options)
        self.metrics._collections = Collections()
        self.tick = 0

    def wait(self, ms: float) -> None:
        self.now_ns += round(ms * MS)

    def collect(self, ms: float) -> None:
        self.metrics._collections("start", {})
        self.wait(ms)
        self.metrics._collections("stop", {})

    def run(
        self,
        *,
        skip: int = 0,
        late: float = 0.0,
        late_gc: float = 0.0,
        take: float = 1.0,
        model: float = 50.0,
        gc: float = 0.0,
        gpu: tuple[float, float] | None = None,
        publish: float = 2.0,
        outside: float = 0.0,
        throttle: int = 0,
        rows: int = 1,
        faults: int = 0,
    ) -> np.void:
        """gc: within `model`; late_gc: from when the tick was due; gpu: from `launch` on."""
        self.tick += skip
        due_ns = (self.tick + 1) * PERIOD_MS * MS
        self.now_ns = max(self.now_ns, due_ns)
        self.wait(late)
        if late_gc:
            self.collect(late_gc)
        told = self.metrics
        told.open(self.tick, scheduled_ns=due_ns, woke_ns=self.now_ns)
        told.add("skipped", skip)
        told.add("rows", rows)
        self.wait(take)
        told.lap("take")
        told.launch()
        if gpu is not None:
            start, end = (self.now_ns + round(ms * MS) for ms in gpu)
            told.set_gpu(start, end)
            told.set_bucket(4, 128)
        self.collect(gc) if gc else None
        self.wait(model - gc)
        told.lap("model")
        told.add("faults", faults)
        told.set_tokens([0, 1, 2, 0, 4])
        told.set_kv_pages([1, 0, 2, 0, rows], [0] * 5)
        self.wait(publish)
        told.lap("publish")
        self.wait(outside)
        self.wrong = told.close(
            done_ns=self.now_ns, deadline_ns=due_ns + PERIOD_MS * MS, throttle=throttle
        )
        self.tick += 1
        return told.records(newest=1)[0]

    def reason(self, **parts) -> Reason:
        """Why a tick like this missed, after ten usual ones."""
        for _ in range(10):
            assert self.run()["reason"] == Reason.NONE and self.wrong is None
        record = self.run(**parts)
        assert record["missed"] and self.wrong == "miss"
        return Reason(int(record["reason"]))
