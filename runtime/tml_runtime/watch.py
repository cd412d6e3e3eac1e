"""What runs beside the loop and looks at it: the GPU's sampler and the black box."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Protocol

from .blackbox import BlackBox, BlackBoxWriter
from .errors import InputTypeError
from .gpu import GpuSampler, Reader, make_reader
from .host import host_facts
from .metrics import Metrics
from .model import InteractionModel
from .slots import Seat


class Watched(Protocol):
    """What is looked at: a `Runtime`."""

    @property
    def metrics(self) -> Metrics: ...

    def report(self) -> dict[str, Any]: ...

    def status(self) -> dict[str, Any]: ...


class Watch:
    """A context manager that starts the threads and stops them; the tick never waits for either.

    options: of the runtime, as they are written into a black box. On a virtual clock (`realtime` is
    False) no GPU is read: its samples would lie on another clock than the ticks. Raises
    InputTypeError for a `folder` that is no path.
    """

    def __init__(
        self,
        runtime: Watched,
        model: InteractionModel,
        folder: Path | None,
        options: dict[str, Any],
    ) -> None:
        if folder is not None and not isinstance(folder, Path):
            raise InputTypeError(f"black_box={folder!r}: expected a pathlib.Path or None")
        self._runtime, self._model, self._options = runtime, model, options
        self.gpu = GpuSampler(self._make_reader)
        self._writer = None if folder is None else BlackBoxWriter(folder, self._fill)

    @property
    def throttle(self) -> int:
        return self.gpu.throttle

    def __enter__(self) -> Watch:
        self.gpu.start()
        if self._writer is not None:
            self._writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        """The last black box asked for is written, if its disk takes it within seconds."""
        self.gpu.stop()
        if self._writer is not None:
            self._writer.stop()

    def went_wrong(self, cause: str, tick: int, now_ns: int) -> None:
        """A tick missed or had a fault. `now_ns` is on the runtime's clock."""
        if self._writer is not None:
            self._writer.ask(cause, tick, now_ns)

    def failed(self, tick: int, error: BaseException) -> None:
        """The tick raised, and the loop is over."""
        if self._writer is not None:
            self._writer.ask_last("failure", tick, repr(error))

    def report(self) -> dict[str, Any]:
        return {
            "gpu": self.gpu.newest(),
            "gpu_note": self.gpu.note,
            "black_box": None if self._writer is None else self._writer.report(),
        }

    def status(self, seats: list[Seat], media_ns: int) -> dict[str, Any]:
        """What `Runtime.status` returns. recent_ms: the newest ticks, oldest first."""
        return {
            "report": self._runtime.report(),
            "sessions": [session_status(seat, media_ns) for seat in seats],
            "recent_ms": self._runtime.metrics.recent_ms(),
        }

    def _make_reader(self) -> Reader | str:
        if not self._options["realtime"]:
            return "nothing reads the GPU on a virtual clock"
        return make_reader(self._model.device)

    def _fill(self, cause: str, tick: int, error: str) -> BlackBox:
        status, metrics = self._runtime.status(), self._runtime.metrics
        model, options = self._model, self._options
        return BlackBox(
            cause=cause,
            tick=tick,
            error=error,
            records=metrics.records(BlackBoxWriter.RECORDS),
            stages=metrics.stages,
            samples=self.gpu.samples(),
            sessions=status["sessions"],
            report=status["report"],
            config={
                **{name: _plain(value) for name, value in options.items()},
                "model": asdict(model.config),
                "host": host_facts(),
            },
        )


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value


def session_status(seat: Seat, media_ns: int) -> dict[str, Any]:
    """One session for `Runtime.status`. `state` is waiting (for its first tick), reading (its
    prompt), running, paused, closing or faulted; `age_s` its media time."""
    if seat.fault is not None:
        state = "faulted"
    elif seat.closed:
        state = "closing"
    elif seat.paused:
        state = "paused"
    elif not seat.admitted:
        state = "waiting"
    else:
        state = "running" if seat.present else "reading"
    age_s = (media_ns - seat.open_tick * seat.spec.window_ns) / 1e9
    return {
        "id": seat.number,
        "slot": seat.slot,
        "state": state,
        "age_s": round(max(0.0, age_s), 3),
        "fault": None if seat.fault is None else str(seat.fault),
        **asdict(seat.copy_stats()),
    }
