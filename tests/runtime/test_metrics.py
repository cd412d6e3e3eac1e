from __future__ import annotations

import threading

import numpy as np
import pytest

from tml_runtime.metrics import MAX_STAGES, RECORD, Metrics, percentiles_ms


def fill(metrics: Metrics, ticks: range) -> None:
    for tick in ticks:
        metrics.open(tick, scheduled_ns=tick * 10, woke_ns=tick * 10 + 1)
        metrics.lap("take")
        metrics.set_stage("model.think", tick)
        metrics.add("rows", tick % 3)
        metrics.add("skipped", 2)
        metrics.close(done_ns=tick * 10 + tick % 4, deadline_ns=tick * 10 + 2)


def test_percentiles_are_values_that_occurred() -> None:
    values = np.random.default_rng(0).permutation(np.arange(1, 1001)) * 1_000_000
    assert percentiles_ms(values) == {"p50": 500.0, "p99": 990.0, "p999": 999.0, "max": 1000.0}
    assert percentiles_ms(values[:1])["p50"] == percentiles_ms(values[:1])["max"]
    assert set(percentiles_ms(values[:0]).values()) == {None}


@pytest.mark.parametrize("ticks", [0, 1, 7, 8, 9, 100])
def test_the_newest_records_are_kept_and_the_totals_are_of_all(ticks: int) -> None:
    metrics = Metrics(capacity=8)
    fill(metrics, range(ticks))
    records = metrics.records()
    assert records.dtype == RECORD
    assert records["tick"].tolist() == list(range(ticks))[-8:]
    assert (records["rows"] == records["tick"] % 3).all()
    assert (records["missed"] == (records["tick"] % 4 == 3)).all()
    report = metrics.report()
    missed = sum(tick % 4 == 3 for tick in range(ticks))
    assert (report["ticks"], report["records"]) == (ticks, min(ticks, 8))
    assert report["rows"] == sum(tick % 3 for tick in range(ticks))
    assert (report["skipped"], report["misses"]) == (2 * ticks, 2 * ticks + missed)


def test_a_record_starts_blank_though_its_row_was_used_before() -> None:
    metrics = Metrics(capacity=2)
    fill(metrics, range(5))
    metrics.open(5, scheduled_ns=50, woke_ns=50)
    metrics.close(done_ns=51, deadline_ns=52)
    newest = metrics.records()[-1]
    assert (newest["tick"], newest["rows"], newest["skipped"], newest["missed"]) == (5, 0, 0, False)
    assert not newest["stage_ns"].any()
    assert metrics.records()["tick"].tolist() == [4, 5]


def test_stages_are_columns() -> None:
    metrics = Metrics(capacity=4)
    fill(metrics, range(4))
    assert metrics.stages == ("take", "model.think")
    assert metrics.records()["stage_ns"][:, 1].tolist() == [0, 1, 2, 3]
    assert metrics.report()["stages_ms"]["model.think"]["max"] == 3e-6
    with pytest.raises(AssertionError, match="more than"):
        for i in range(MAX_STAGES):
            metrics.set_stage(f"another {i}", 1)


def test_pages_are_recorded_per_tick_and_summed() -> None:
    metrics = Metrics(capacity=3)
    names = ("anchor", "text", "audio", "video", "reply")
    assert metrics.report()["kv_pages"] == dict.fromkeys(names, 0)
    for tick in range(6):
        metrics.open(tick, scheduled_ns=0, woke_ns=0)
        if tick != 5:  # nobody took part
            metrics.set_kv_pages([1, 0, tick, 4 - tick, 7], [0, 0, 2, tick, 0])
        metrics.close(done_ns=1, deadline_ns=2)
        report = metrics.report()
        assert report["kv_pages"] == dict(
            zip(names, metrics.records()["kv_pages"][-1], strict=True)
        )
    assert metrics.records()["kv_pages"].tolist() == [[1, 0, 3, 1, 7], [1, 0, 4, 0, 7], [0] * 5]
    assert metrics.records()["kv_dropped"].tolist() == [[0, 0, 2, 3, 0], [0, 0, 2, 4, 0], [0] * 5]
    assert list(report["kv_pages_most"].values()) == [1, 0, 4, 4, 7]
    assert list(report["kv_pages_dropped"].values()) == [0, 0, 10, 10, 0]
    assert all(type(n) is int for n in report["kv_pages_dropped"].values())


def test_a_reader_beside_the_writer_sees_whole_records() -> None:
    metrics = Metrics(capacity=600)  # large enough that numpy copies it without the GIL
    writer = threading.Thread(target=fill, args=(metrics, range(20_000)))
    writer.start()
    reads = 0
    while writer.is_alive():
        ticks = (records := metrics.records())["tick"]
        assert (np.diff(ticks) == 1).all() and len(ticks) <= 600
        assert (records["scheduled_ns"] == ticks * 10).all()
        assert (records["stage_ns"][:, 1] == ticks)[records["stage_ns"][:, 1] > 0].all()
        reads += 1
    writer.join()
    assert reads > 0 and metrics.count == 20_000
