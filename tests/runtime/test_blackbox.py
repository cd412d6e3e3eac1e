"""The black box: what a file holds, when one is written, and a disk that does not take it."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_model import CONFIG, MS40, FakeModel, make_runtime
from hypothesis import given, settings
from hypothesis import strategies as st

from tml_kernels.kv_cache import OutOfPages
from tml_runtime import blackbox, errors
from tml_runtime.blackbox import BlackBox, BlackBoxWriter, load
from tml_runtime.gpu import SAMPLE
from tml_runtime.metrics import RECORD
from tml_runtime.misses import Reason

PERIOD_NS = 200_000_000
SECOND_NS = 1_000_000_000


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def overrunning(late_ns: dict[int, int], **options):
    """A runtime on the virtual clock whose n-th tick takes `late_ns[n]`."""
    model = FakeModel(on_tick=lambda n: runtime.clock.advance(late_ns.get(n, 0)))
    runtime, _ = make_runtime(model, **options)
    return runtime


def make_box(cause: str = "miss", tick: int = 7, error: str = "") -> BlackBox:
    records = np.zeros(3, RECORD)
    records["tick"] = [tick - 2, tick - 1, tick]
    return BlackBox(
        cause=cause,
        tick=tick,
        error=error,
        records=records,
        stages=("take", "model"),
        samples=np.zeros(2, SAMPLE),
        sessions=[{"id": 1}],
        report={"period_ms": 200},
        config={"num_slots": 1},
    )


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_miss_is_written_with_the_newest_ticks(tmp_path: Path) -> None:
    runtime = overrunning({400: PERIOD_NS + 1}, black_box=tmp_path / "new" / "folder", num_slots=2)
    with runtime, runtime.open_session(seed=3) as session:
        runtime.run_ticks(401)
        wait_for(lambda: runtime.report()["black_box"]["written"] == 1)
        told = runtime.report()["black_box"]
    (name,) = files(tmp_path / "new" / "folder")
    assert name == told["newest"] and name.endswith("-miss-tick-400.npz")
    box = load(tmp_path / "new" / "folder" / name)
    assert (box.cause, box.tick, box.error, box.period_ns) == ("miss", 400, "", PERIOD_NS)
    assert box.records["tick"].tolist() == list(range(101, 401))
    assert box.records["missed"].tolist() == [False] * 299 + [True]
    assert Reason(int(box.records[-1]["reason"])) is not Reason.NONE
    assert box.stages == runtime.metrics.stages and len(box.samples) == 0
    (seen,) = box.sessions
    assert (seen["state"], seen["ticks"], seen["missing_windows"]) == ("running", 401, 401)
    assert session.stats.ticks == 401
    assert (box.report["misses"], box.report["slots"]) == (1, 2)
    assert (box.config["num_slots"], box.config["realtime"]) == (2, False)
    assert (box.config["global_pages"], box.config["probe_ticks"]) == (None, 0)
    assert box.config["background"] is None and box.config["handoff"]["snapshots"] == 0
    assert box.config["model"]["layout"]["period_ms"] == 200 and box.config["host"]["python"]


def test_a_skipped_tick_is_written_though_the_next_is_in_time(tmp_path: Path) -> None:
    runtime, _ = make_runtime(black_box=tmp_path)
    with runtime:
        runtime.run_ticks(1)
        runtime.clock.advance(3 * PERIOD_NS)  # nobody ran
        runtime.run_ticks(1)
    (name,) = files(tmp_path)
    box = load(tmp_path / name)
    assert box.cause == "miss" and box.records["skipped"][-1] == 2
    assert box.report["misses_by_reason"]["woke_late"] == 2


def test_a_fault_is_written(tmp_path: Path) -> None:
    runtime, _ = make_runtime(FakeModel(faulty={(2, 1)}), num_slots=2, black_box=tmp_path)
    with runtime:
        sessions = [runtime.open_session() for _ in range(2)]
        runtime.run_ticks(3)
        wait_for(lambda: files(tmp_path) != [])
        assert len(sessions) == 2
    (name,) = files(tmp_path)
    box = load(tmp_path / name)
    assert (box.cause, box.tick) == ("fault", 2)
    assert [session["state"] for session in box.sessions] == ["running", "faulted"]
    assert "not finite" in box.sessions[1]["fault"]


def test_a_fault_between_two_ticks_is_written(tmp_path: Path) -> None:
    class Broken(FakeModel):
        def read(self, state, slot, ids):
            raise OutOfPages("none left")

    runtime, _ = make_runtime(Broken(), black_box=tmp_path)
    with runtime, runtime.open_session(prompt="hi"):
        runtime.run_ticks(1)
        wait_for(lambda: files(tmp_path) != [])
    box = load(tmp_path / files(tmp_path)[0])
    assert (box.cause, box.tick, box.records["faults"].tolist()) == ("fault", 0, [1])
    assert "none left" in box.sessions[0]["fault"]


def test_a_tick_that_raises_is_written_though_another_file_is_just_out(tmp_path: Path) -> None:
    def explode(tick: int) -> None:
        runtime.clock.advance(2 * PERIOD_NS * (tick == 1))
        if tick == 3:
            raise ZeroDivisionError("tick 3")

    runtime, _ = make_runtime(FakeModel(on_tick=explode), black_box=tmp_path)
    with runtime, runtime.open_session(), pytest.raises(errors.LoopFailed):
        runtime.run_ticks(10)
    miss, failure = [load(tmp_path / name) for name in files(tmp_path)]
    assert (miss.cause, failure.cause) == ("miss", "failure")
    assert failure.error == "ZeroDivisionError('tick 3')"
    assert failure.records["tick"].tolist() == [0, 1, 3]  # the tick that raised has no record


def test_a_miss_in_real_time_is_written_while_the_loop_goes_on(tmp_path: Path) -> None:
    model = FakeModel(
        replace(CONFIG, layout=MS40), on_tick=lambda n: time.sleep(0.13 * (n == 5)), keep=False
    )
    runtime, _ = make_runtime(model, realtime=True, black_box=tmp_path)
    with runtime, runtime.open_session():
        wait_for(lambda: runtime.report()["black_box"]["written"] == 1)
        ticks = runtime.metrics.count
        wait_for(lambda: runtime.metrics.count > ticks)
    box = load(tmp_path / files(tmp_path)[0])
    assert box.cause == "miss" and box.period_ns == 40_000_000
    assert box.records["missed"].any() or box.records["skipped"].any()
    assert box.config["realtime"] is True


def test_without_a_folder_or_a_miss_nothing_is_written(tmp_path: Path) -> None:
    runtime, _ = make_runtime(black_box=tmp_path)
    with runtime, runtime.open_session():
        runtime.run_ticks(5)
    assert files(tmp_path) == []
    assert runtime.report()["black_box"]["written"] == 0
    plain = overrunning({1: PERIOD_NS + 1})
    with plain, plain.open_session():
        plain.run_ticks(3)
    assert plain.report()["misses"] == 1 and plain.report()["black_box"] is None
    with pytest.raises(errors.InputTypeError, match="black_box=3"):
        make_runtime(black_box=3)


def test_at_most_one_in_ten_seconds_and_twenty_are_kept(tmp_path: Path) -> None:
    (tmp_path / "other.npz").touch()
    writer = BlackBoxWriter(tmp_path, make_box)
    writer.start()
    for n in range(30):
        at_ns = n * 10 * SECOND_NS
        writer.ask("miss", n, at_ns)
        wait_for(lambda n=n: writer.report()["written"] == n + 1 and not writer._busy)
        writer.ask("fault", n, at_ns + 10 * SECOND_NS - 1)
    writer.stop()
    assert writer.report()["skipped"] == 30 and writer.report()["failed"] == 0
    ticks = [load(tmp_path / name).tick for name in files(tmp_path) if name != "other.npz"]
    assert ticks == list(range(10, 30))
    assert (tmp_path / "other.npz").exists()


def test_the_tick_never_waits_for_a_slow_disk(tmp_path: Path) -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    def fill(cause: str, tick: int, error: str) -> BlackBox:
        hangs.set()
        assert goes_on.wait(20)
        return make_box(cause, tick, error)

    writer = BlackBoxWriter(tmp_path, fill)
    writer.start()
    writer.ask("miss", 0, 0)
    assert hangs.wait(20)
    for n in range(1, 5):
        writer.ask("miss", n, n * 100 * SECOND_NS)  # returns, though the writer hangs
    assert (writer.report()["written"], writer.report()["skipped"]) == (0, 4)
    goes_on.set()
    writer.stop()
    assert [load(tmp_path / name).tick for name in files(tmp_path)] == [0]


def test_a_full_disk_is_counted_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    runtime = overrunning(dict.fromkeys((1, 60), PERIOD_NS + 1), black_box=tmp_path)
    with runtime, runtime.open_session() as session:
        with monkeypatch.context() as full_disk:
            full_disk.setattr(blackbox.os, "fsync", full)
            runtime.run_ticks(3)
            wait_for(lambda: runtime.report()["black_box"]["failed"] == 1)
        assert files(tmp_path) == []
        assert "No space left on device" in runtime.report()["black_box"]["error"]
        runtime.run_ticks(60)  # there is room again
        assert session.stats.ticks == 63
    assert runtime.report()["black_box"] | {"newest": "", "error": ""} == {
        "folder": str(tmp_path), "written": 1, "skipped": 0, "failed": 1, "newest": "", "error": "",
    }  # fmt: skip
    assert load(tmp_path / files(tmp_path)[0]).tick == 60


@pytest.mark.parametrize("kind", ["below a file", "read-only"])
def test_a_folder_that_cannot_be_written_is_counted(tmp_path: Path, kind: str) -> None:
    if kind == "below a file":
        (tmp_path / "file").touch()
        folder = tmp_path / "file" / "boxes"
    else:
        folder = Path("/proc/self/boxes")  # nobody may make one there, root neither
        if not folder.parent.exists():
            pytest.skip("no /proc")
    runtime = overrunning({1: PERIOD_NS + 1}, black_box=folder)
    with runtime, runtime.open_session() as session:
        runtime.run_ticks(4)
        assert session.stats.ticks == 4
    told = runtime.report()["black_box"]
    assert (told["written"], told["failed"]) == (0, 1) and "Error" in told["error"]


def test_stopping_ends_the_threads(tmp_path: Path) -> None:
    runtime, _ = make_runtime(black_box=tmp_path)
    assert any(thread.name == "tml-black-box" for thread in threading.enumerate())
    runtime.stop()
    runtime.stop()
    assert not any(thread.name == "tml-black-box" for thread in threading.enumerate())


def rewritten(path: Path, **members: bytes) -> Path:
    """The black box at `path` with members replaced; None as bytes takes one out."""
    with (
        zipfile.ZipFile(io.BytesIO(make_box().to_bytes())) as old,
        zipfile.ZipFile(path, "w") as new,
    ):
        for name in old.namelist():
            data = members.get(name.removesuffix(".npy"), old.read(name))
            if data:
                new.writestr(name, data)
    return path


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def about(**changes: object) -> bytes:
    with np.load(io.BytesIO(make_box().to_bytes())) as arrays:
        told = json.loads(arrays["about"].tobytes()) | changes
    return npy(np.frombuffer(json.dumps(told).encode(), np.uint8))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"records": b""}, "records is not a file"),
        ({"records": npy(np.zeros(3))}, "another version"),
        ({"records": npy(np.zeros((3, 1), RECORD))}, "are not lists"),
        ({"samples": npy(np.array([{}], object), allow_pickle=True)}, "allow_pickle=False"),
        ({"about": npy(np.frombuffer(b"{", np.uint8))}, "JSONDecodeError"),
        ({"about": npy(np.frombuffer(b"[]", np.uint8))}, "TypeError"),
        ({"about": about(version=2)}, "another version"),
        ({"about": about(stages=[1])}, "stages"),
        ({"about": about(report={"period_ms": 0})}, "period_ms=0"),
        ({"about": about(report={})}, "period_ms"),
    ],
)
def test_what_is_no_black_box_is_refused(
    members: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    path = rewritten(tmp_path / "box.npz", **members)
    with pytest.raises(errors.InputValueError, match="not a readable black box") as caught:
        load(path)
    assert message in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "box.npz"
    with pytest.raises(FileNotFoundError):
        load(path)
    for data in (b"", b"PK", b"\x80\x04N.", npy(np.zeros(3))):
        path.write_bytes(data)
        with pytest.raises(errors.InputValueError, match="not a readable black box"):
            load(path)
    path.write_bytes(make_box().to_bytes())
    assert load(str(path)).records["tick"].tolist() == [5, 6, 7]
    monkeypatch.setattr(blackbox, "MAX_BYTES", 1000)
    with pytest.raises(errors.InputValueError, match="more than 1000"):
        load(path)


@given(st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=8))
@settings(deadline=None, max_examples=100)
def test_damaged_bytes_are_refused_or_do_not_matter(damage: list[tuple[int, int]]) -> None:
    data = bytearray(make_box().to_bytes())
    for at, byte in damage:
        data[at % len(data)] = byte
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "box.npz"
        path.write_bytes(data)
        with contextlib.suppress(errors.InputValueError, OSError):
            assert load(path).records.dtype == RECORD
