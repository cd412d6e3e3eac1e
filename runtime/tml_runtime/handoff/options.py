"""How hand-off behaves: when a result is injected, and the bound of everything."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from ..errors import InputTypeError, InputValueError


class Policy(enum.Enum):
    """When a result that is there begins to reach the model. Once begun, it goes on every tick."""

    INTERRUPT = "interrupt"  # with the next tick
    WHEN_IDLE = "when_idle"  # when the model has been silent for a while, or has let it wait long
    SILENT = "silent"  # with the next tick, marked as not to be spoken
    SKIP_IF_BUSY = "skip_if_busy"  # with the next tick, or never if the model is speaking


@dataclass(frozen=True)
class HandoffOptions:
    """Times of the background model in seconds, those of the live one in ticks.

    policy: of sessions that are opened without one. timeout: from the tick that delegated to the
    end of the answer. max_running, max_waiting, max_per_session: requests; what is beyond is
    refused. A session's count until their answers were read. max_answer_tokens: a longer answer is
    cut. tokens_per_tick: of answers, to one session. idle_ticks: ticks without text that make a
    model idle; max_wait_ticks: how long an answer waits for that. transcript_tokens: the newest
    ones a request tells, beside the prompt. snapshots: spare slots for forks of the model's state;
    a request that finds none goes without. result, silent_result: what a result is put between;
    notice: what a notice begins with. wait: on the virtual clock, a tick waits for all requests to
    be answered, so that runs can be repeated.

    Raises InputTypeError or InputValueError naming the field.
    """

    policy: Policy = Policy.WHEN_IDLE
    timeout: float = 30.0
    max_running: int = 8
    max_waiting: int = 16
    max_per_session: int = 2
    max_answer_tokens: int = 2048
    tokens_per_tick: int = 16
    idle_ticks: int = 2
    max_wait_ticks: int = 50
    transcript_tokens: int = 4096
    snapshots: int = 0
    result: tuple[str, str] = ("[result] ", " [/result]")
    silent_result: tuple[str, str] = ("[silent result] ", " [/silent result]")
    notice: str = "[notice] "
    wait: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.policy, Policy):
            raise InputTypeError(f"policy={self.policy!r}: expected a Policy")
        if type(self.timeout) not in (int, float):
            raise InputTypeError(f"timeout={self.timeout!r}: expected seconds as a number")
        if not 0.0 < self.timeout < math.inf:
            raise InputValueError(f"timeout={self.timeout} is not a positive number of seconds")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if type(value) is not int:
                raise InputTypeError(f"{name}={value!r}: expected an int")
            if value < least:
                raise InputValueError(f"{name}={value} is less than {least}")


_LEAST = {
    "max_running": 1,
    "max_waiting": 1,
    "max_per_session": 1,
    "max_answer_tokens": 1,
    "tokens_per_tick": 1,
    "idle_ticks": 0,
    "max_wait_ticks": 0,
    "transcript_tokens": 1,
    "snapshots": 0,
}
