"""One combination of `bench sessions`: a runtime, callers on bad lines, and what they measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tml_runtime import InteractionModel, Runtime
from tml_runtime.errors import ResourceExhausted
from tml_runtime.net.faults import Link, Profile

from .feed import PIECE_NS, Caller, Clock, FrameSize, Media, clock_of, pump
from .meter import Meter, broken_invariant, context_held, forget_memory


@dataclass(frozen=True)
class Combination:
    """sessions: that ask for a place. video: width and height, None without. profile: a name."""

    sessions: int
    video: FrameSize | None
    profile: str

    def __str__(self) -> str:
        return f"{self.sessions} sessions, video {video_name(self.video)}, {self.profile}"

    def report(self) -> dict[str, Any]:
        return {**asdict(self), "video": video_name(self.video)}


def video_name(video: FrameSize | None) -> str:
    return "none" if video is None else f"{video[0]}x{video[1]}"


@dataclass(frozen=True)
class Setting:
    """What all combinations share. slots: None for as many as there are sessions. global_pages and
    probe_ticks: as of Runtime. warm_up_s: not measured; the lines' delays are found in it.
    realtime: False runs ticks as fast as they go. memory: arguments of Runtime."""

    seed: int = 0
    slots: int | None = None
    global_pages: int | Literal["auto"] | None = None
    probe_ticks: int = 0
    warm_up_s: float = 3.0
    realtime: bool = True
    memory: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Loop:
    """A running runtime and the callers of those sessions that found a place in it. refused: the
    others, by reason; why: what the last of them was told."""

    runtime: Runtime
    clock: Clock
    callers: list[Caller]
    refused: Counter[str]
    why: str = ""

    def run(self, seconds: float, on_second: Callable[[], None]) -> None:
        until_ns = self.clock.now_ns() + round(seconds * 1e9)
        pump(self.callers, self.clock, until_ns, on_second)

    def admitted(self) -> dict[str, Any]:
        faults = [caller.fault for caller in self.callers if caller.fault is not None]
        report = self.runtime.report()
        return {
            "opened": len(self.callers),
            "refused": dict(self.refused),
            "session_faults": faults,
            "graphs": report["graphs"],
            "admission": report["admission"],
        }


class NobodyAdmitted(RuntimeError):
    """Every session of a combination was refused."""


@contextmanager
def open_loop(
    model: InteractionModel, combination: Combination, setting: Setting
) -> Iterator[Loop]:
    """Raises NobodyAdmitted, and what Runtime raises where there is no room for it."""
    forget_memory()
    runtime = Runtime(
        model,
        num_slots=setting.slots or combination.sessions,
        seed=setting.seed,
        realtime=setting.realtime,
        global_pages=setting.global_pages,
        probe_ticks=setting.probe_ticks,
        **setting.memory,
    )
    with runtime:
        clock = clock_of(runtime)
        loop = Loop(runtime, clock, [], Counter())
        media = Media(runtime.layout, seed=setting.seed, frame=combination.video)
        profile, begin_ns = Profile.named(combination.profile), clock.now_ns()
        for number in range(combination.sessions):
            try:
                session = runtime.open_session()
            except ResourceExhausted as error:
                loop.refused[error.reason] += 1
                loop.why = str(error)
                continue
            line = Link(profile, setting.seed * 65_537 + number)
            apart_ns = number * PIECE_NS // combination.sessions  # so that pieces interleave
            caller = Caller(session, media, line, runtime.layout, begin_ns + apart_ns)
            loop.callers.append(caller)
        if not loop.callers:
            raise NobodyAdmitted(
                f"none of {combination.sessions} sessions was admitted: {loop.why}"
            )
        yield loop


def measure(
    model: InteractionModel,
    combination: Combination,
    setting: Setting,
    *,
    seconds: float,
    on_second: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """A row of the result. error: why the combination could not be measured; its figures are then
    not there."""
    about = {**combination.report(), "error": None}
    try:
        with open_loop(model, combination, setting) as loop:
            loop.run(setting.warm_up_s, on_second)
            meter = Meter(loop.runtime, loop.callers, loop.clock, times=setting.realtime)
            loop.run(seconds, on_second)
            figures = meter.lap()
    except Exception as error:  # no memory, a frame too large, a tick that raised: others may run
        return {**about, "error": f"{type(error).__name__}: {error}"}
    held, broken = context_held(loop.runtime), broken_invariant(loop.runtime)
    return {**about, **loop.admitted(), **figures, "context": held, "broken_invariant": broken}
