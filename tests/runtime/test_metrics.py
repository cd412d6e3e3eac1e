from __future__ import annotations

import gc
import sys
import threading

import numpy as np
import pytest
from fake_ticks import MS, PERIOD_MS, FakeTicks

from tml_runtime.clock import Collections, garbage_collections
from tml_runtime.metrics import MAX_STAGES, RECORD, Metrics, percentiles_ms
from tml_runtime.nvtx import Ranges


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


@pytest.mark.parametrize("newest", [0, 1, 3, 7, 8, 50])
def test_the_newest_records_alone(newest: int) -> None:
    metrics = Metrics(capacity=7)
    assert len(metrics.records(newest)) == 0
    fill(metrics, range(20))
    assert metrics.records(newest)["tick"].tolist() == list(range(20))[-7:][7 - min(newest, 7) :]


def test_a_record_has_the_launch_the_gpu_and_the_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = FakeTicks(monkeypatch)
    record = ticks.run(late=3, take=2, gpu=(0.5, 40), throttle=0x44)
    woke_ns = PERIOD_MS * MS + 3 * MS
    assert record["woke_ns"] == woke_ns and record["launched_ns"] == woke_ns + 2 * MS
    assert record["gpu_start_ns"] == woke_ns + 2.5 * MS
    assert record["gpu_end_ns"] == woke_ns + 42 * MS
    assert (record["bucket_rows"], record["bucket_tokens"], record["throttle"]) == (4, 128, 0x44)
    assert record["tokens"].tolist() == [0, 1, 2, 0, 4]
    plain = ticks.run()
    assert plain["gpu_end_ns"] == plain["bucket_rows"] == plain["throttle"] == 0
    assert plain["before_done_ns"] == record["done_ns"]
    tokens = {"anchor": 0, "text": 2, "audio": 4, "video": 0, "reply": 8}
    assert ticks.metrics.report()["tokens"] == tokens


def test_on_a_virtual_clock_the_launch_lies_after_the_wake_by_real_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = FakeTicks(monkeypatch)
    ticks.now_ns = 10**15
    ticks.metrics.open(0, scheduled_ns=200 * MS, woke_ns=200 * MS)
    ticks.wait(1.5)
    ticks.metrics.launch()
    ticks.collect(0.25)
    ticks.metrics.close(done_ns=200 * MS, deadline_ns=400 * MS)
    (record,) = ticks.metrics.records()
    assert record["launched_ns"] == 201.5 * MS
    assert (record["gc_end_ns"], record["gc_ns"]) == (201.75 * MS, 0.25 * MS)


def test_collections_are_counted_in_the_tick_they_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = FakeTicks(monkeypatch)
    ticks.run()
    ticks.collect(5)  # in the slack: nobody waited
    quiet = ticks.run(gc=7)
    assert (quiet["gc_runs"], quiet["gc_ns"]) == (1, 7 * MS)
    assert quiet["gc_end_ns"] == quiet["launched_ns"] + 7 * MS
    ticks.now_ns = (ticks.tick + 1) * PERIOD_MS * MS - 4 * MS
    ticks.collect(10)  # of these, 6 ms after the tick was due
    held = ticks.run(gc=1)
    assert held["woke_ns"] - held["scheduled_ns"] == 6 * MS
    assert (held["gc_runs"], held["gc_ns"]) == (2, 7 * MS)
    none = ticks.run()
    assert none["gc_runs"] == none["gc_ns"] == none["gc_end_ns"] == 0


def test_a_collection_that_has_not_said_it_is_over_counts_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its thread waits for the GIL to say so, while the tick it held up runs already."""
    ticks = FakeTicks(monkeypatch)
    ticks.run()
    ticks.now_ns = 2 * PERIOD_MS * MS - 5 * MS
    ticks.metrics._collections("start", {})
    held = ticks.run(late=30)
    assert (held["gc_runs"], held["gc_ns"]) == (1, 30 * MS)
    assert held["gc_end_ns"] == held["woke_ns"]
    ticks.metrics._collections("stop", {})
    assert ticks.run()["gc_runs"] == 0


def test_many_collections_in_a_tick_are_counted_up_to_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = FakeTicks(monkeypatch)
    ticks.metrics.open(0, scheduled_ns=0, woke_ns=0)
    for _ in range(Collections.KEPT + 7):
        ticks.collect(1)
    ticks.metrics.close(done_ns=1, deadline_ns=2)
    (record,) = ticks.metrics.records()
    assert (record["gc_runs"], record["gc_ns"]) == (Collections.KEPT, Collections.KEPT * MS)


def test_a_real_collection_is_seen() -> None:
    metrics = Metrics()
    assert gc.callbacks.count(garbage_collections()) == 1
    metrics.open(0, scheduled_ns=0, woke_ns=0)
    gc.collect()
    metrics.close(done_ns=1, deadline_ns=2)
    (record,) = metrics.records()
    assert record["gc_runs"] >= 1 and 0 < record["gc_ns"] <= record["busy_ns"]


def test_histograms_count_every_tick_that_ever_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = FakeTicks(monkeypatch, capacity=4)
    for late, model in [(0, 17), (0, 17.001), (0.06, 100), (30, 167), (30, 168), (120, 500)]:
        ticks.now_ns = 0
        ticks.run(late=late, model=model)  # and 3 ms for the other stages
    tick_times, wake_times = ticks.metrics.tick_times, ticks.metrics.wake_times
    assert [ns / MS for ns in tick_times.bounds_ns] == [
        20, 50, 100, 150, 180, 190, 200, 250, 300, 400
    ]  # fmt: skip
    assert tick_times.counts.tolist() == [1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 1]
    assert tick_times.sum_ns == round((20 + 20.001 + 103.06 + 200 + 201 + 623) * MS)
    assert wake_times.counts.tolist() == [2, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1]
    assert len(ticks.metrics.records()) == 4


class NullNvtx:
    def range_push(self, name: str) -> None: ...
    def range_pop(self) -> None: ...


def test_ten_thousand_ticks_with_everything_on_allocate_nothing_that_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = FakeTicks(monkeypatch, capacity=500, ranges=Ranges(NullNvtx()))

    def run(num_ticks: int) -> int:
        for n in range(num_ticks):
            # every seventh misses, and every fifth skips some and has a fault
            ticks.run(
                model=50 + 250 * (n % 7 == 0),
                gc=1,
                gpu=(1, 49),
                throttle=4,
                skip=2 * (n % 5 == 0),
                faults=n % 5 == 0,
            )
        gc.collect()
        return sys.getallocatedblocks()

    after_some = run(1000)
    after_all = run(9000)
    assert ticks.metrics.count == 10_000 and ticks.metrics.report()["misses"] > 4000
    assert after_all - after_some < 1000  # one object kept per tick would be 9000
