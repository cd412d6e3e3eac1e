"""The black box: the newest ticks as one file, when one of them misses, faults or raises.

A file is an .npz without pickles: `records` and `samples` are structured arrays, `about` is JSON.
"""

from __future__ import annotations

import io
import json
import os
import queue
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputValueError
from .gpu import SAMPLE
from .metrics import MAX_STAGES, RECORD

SCHEMA = "tml-runtime-blackbox"
SCHEMA_VERSION = 1
MAX_BYTES = 64 << 20  # of a file that `load` takes; one that was written here has a few hundred KiB


@dataclass(frozen=True, eq=False)
class BlackBox:
    """What was known when something went wrong.

    cause: "miss", "fault" or "failure", in tick `tick`; error: what a tick raised, or "". records:
    the newest ticks as `Metrics.records` gives them; the columns of their `stage_ns` are `stages`.
    samples: the GPU's, dtype `gpu.SAMPLE`. sessions, report: as in `Runtime.status`. config: the
    runtime's options, the model's sizes and the host.
    """

    cause: str
    tick: int
    error: str
    records: np.ndarray
    stages: tuple[str, ...]
    samples: np.ndarray
    sessions: list[dict[str, Any]]
    report: dict[str, Any]
    config: dict[str, Any]

    @property
    def period_ns(self) -> int:
        return round(self.report["period_ms"] * 1e6)

    def to_bytes(self) -> bytes:
        names = ("cause", "tick", "error", "stages", "sessions", "report", "config")
        about = {name: getattr(self, name) for name in names}
        text = json.dumps({"schema": SCHEMA, "version": SCHEMA_VERSION, **about}, default=str)
        file = io.BytesIO()
        np.savez(
            file,
            records=self.records,
            samples=self.samples,
            about=np.frombuffer(text.encode(), np.uint8),
        )
        return file.getvalue()


def load(path: Path | str) -> BlackBox:
    """Read a black box. Raises OSError, and InputValueError for what is none or is damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            size = sum(member.file_size for member in file.infolist())
        if size > MAX_BYTES:
            raise ValueError(f"{size} bytes, more than {MAX_BYTES}")
        with np.load(path, allow_pickle=False) as arrays:
            records, samples = arrays["records"], arrays["samples"]
            about = json.loads(arrays["about"].tobytes())
        _check(records, samples, about)
        return BlackBox(
            cause=about["cause"],
            tick=about["tick"],
            error=about["error"],
            records=records,
            stages=tuple(about["stages"]),
            samples=samples,
            sessions=about["sessions"],
            report=about["report"],
            config=about["config"],
        )
    except OSError:
        raise
    except Exception as error:  # numpy, zipfile and json raise all sorts for damaged bytes
        raise InputValueError(f"{path}: not a readable black box: {error!r}") from error


def _check(records: np.ndarray, samples: np.ndarray, about: dict[str, Any]) -> None:
    found = (about["schema"], about["version"])
    if found != (SCHEMA, SCHEMA_VERSION) or records.dtype != RECORD or samples.dtype != SAMPLE:
        raise ValueError(f"{found}: written by another version of tml-runtime")
    if records.ndim != 1 or samples.ndim != 1:
        raise ValueError(f"records {records.shape} and samples {samples.shape} are not lists")
    stages = about["stages"]
    if len(stages) > MAX_STAGES or not all(isinstance(name, str) for name in stages):
        raise ValueError(f"{stages=}")
    if not 0 < float(about["report"]["period_ms"]) < 1e6:
        raise ValueError(f"period_ms={about['report']['period_ms']}")


class BlackBoxWriter:
    """Writes black boxes into `folder` on a thread of its own.

    At most one in EVERY_NS of the runtime's clock, and KEEP files: the oldest go. A disk that is
    full or a folder that cannot be written is counted, and nobody hears of it but `report`.
    `fill(cause, tick, error)` collects what a file holds; it runs on the writer's thread.
    """

    RECORDS = 300
    KEEP = 20
    EVERY_NS = 10_000_000_000

    def __init__(self, folder: Path, fill: Callable[[str, int, str], BlackBox]) -> None:
        self._folder, self._fill = folder, fill
        self._asked: queue.SimpleQueue[tuple[str, int, str] | None] = queue.SimpleQueue()
        self._busy = False
        self._last_ns: int | None = None
        self._thread: threading.Thread | None = None
        self._written = self._skipped = self._failed = 0
        self._newest = self._error = ""

    def start(self) -> None:
        self._thread = threading.Thread(target=self._loop, name="tml-black-box", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """What was asked for is written first, unless the disk takes longer than five seconds."""
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join(timeout=5.0)

    def ask(self, cause: str, tick: int, now_ns: int) -> None:
        """For the tick thread: skipped and counted if it is too early or a file is under way."""
        if self._busy or (self._last_ns is not None and now_ns - self._last_ns < self.EVERY_NS):
            self._skipped += 1
            return
        self._busy, self._last_ns = True, now_ns
        self._asked.put((cause, tick, ""))  # takes no lock: a C function that never blocks

    def ask_last(self, cause: str, tick: int, error: str) -> None:
        """The last one, which is never skipped."""
        self._asked.put((cause, tick, error))

    def report(self) -> dict[str, Any]:
        return {
            "folder": str(self._folder),
            "written": self._written,
            "skipped": self._skipped,
            "failed": self._failed,
            "newest": self._newest,
            "error": self._error,  # of the last that failed
        }

    def _loop(self) -> None:
        while (asked := self._asked.get()) is not None:
            try:
                box = self._fill(*asked)
                self._newest = self._write(box)
                self._written += 1
            except Exception as error:
                self._failed += 1
                self._error = repr(error)
            self._busy = False

    def _write(self, box: BlackBox) -> str:
        """The file's name. It is there whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        now = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")  # sorts by age
        path = self._folder / f"blackbox-{now}-{box.cause}-tick-{box.tick}.npz"
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                file.write(box.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        for old in sorted(self._folder.glob("blackbox-*.npz"))[: -self.KEEP]:
            old.unlink(missing_ok=True)
        return path.name
