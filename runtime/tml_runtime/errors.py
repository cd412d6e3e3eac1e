"""Every error the runtime raises on purpose. Each is also the builtin error that fits it best.

Input is checked before anything is touched: after an `InputTypeError`, `InputValueError`,
`LateInput` or `InputBackpressure` the session is as it was, and the same call may be made again.
"""

from __future__ import annotations


class TmlRuntimeError(Exception):
    """Base of all of them."""


class InputTypeError(TmlRuntimeError, TypeError):
    """An argument of the wrong type or dtype."""


class InputValueError(TmlRuntimeError, ValueError):
    """An argument with a wrong rate, shape, size, sample, token id or time."""


class LateInput(InputValueError):
    """The input's media time lies before `open_t`, where the oldest window still open begins."""

    def __init__(self, message: str, *, t: float, open_t: float) -> None:
        super().__init__(message)
        self.t = t
        self.open_t = open_t


class InputBackpressure(TmlRuntimeError, BufferError):
    """A bounded queue is full, or the input lies too far ahead: push it again after a tick."""


class ResourceExhausted(TmlRuntimeError, RuntimeError):
    """One session more is too many: `in_use` of `capacity` are there, `closing` of them for this
    tick only. reason: "slots", "time" (more were not seen to meet the deadline) or "pages"."""

    def __init__(
        self, message: str, *, in_use: int, closing: int, capacity: int, reason: str
    ) -> None:
        super().__init__(message)
        self.in_use = in_use
        self.closing = closing
        self.capacity = capacity
        self.reason = reason


class SessionClosed(TmlRuntimeError, RuntimeError):
    """The session was closed by its client."""


class SessionFault(TmlRuntimeError, RuntimeError):
    """The model ended this session at media time `t`; no other session is affected."""

    def __init__(self, message: str, *, t: float) -> None:
        super().__init__(message)
        self.t = t


class HandoffError(TmlRuntimeError, RuntimeError):
    """A background model could not answer; the message tells the live model why."""


class NotRunning(TmlRuntimeError, RuntimeError):
    """The runtime was stopped, or is asked for what its mode (real time, virtual) cannot do."""


class RankLost(TmlRuntimeError, RuntimeError):
    """Another rank of the model has ended or does not answer: this one cannot go on alone."""


class RanksDiffer(TmlRuntimeError, RuntimeError):
    """Ranks of one model were given, or hold, what is not the same; the message names it."""


class ShardLost(TmlRuntimeError, ConnectionError):
    """The process that ran this session has ended or does not answer; the session is gone."""


class LoopFailed(NotRunning):
    """The tick itself raised, which ended the loop and all sessions; `__cause__` says why."""


class CaptureError(TmlRuntimeError, RuntimeError):
    """What a CUDA graph is to hold could not be captured; the message names it."""


class NotCaptured(TmlRuntimeError, RuntimeError):
    """A tick of shapes that no graph was captured for. The sessions are as they were before it."""
