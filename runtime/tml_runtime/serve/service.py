"""The service without its sockets: who is admitted, what ticks say to whom, and how it all ends.

Lives on the event loop's thread alone. Runtime and sessions are called from there too, since their
calls never wait for a tick; opening a session and reports, which take longer, have a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ..checks import FrameGrid
from ..errors import (
    InputTypeError,
    InputValueError,
    NotRunning,
    ResourceExhausted,
    SessionClosed,
    SessionFault,
)
from ..loop import Runtime
from ..model import ModelConfig
from .limits import Limits
from .protocol import CloseCode, ErrorCode, Hello, ProtocolError
from .served import MAX_TICKS, MakeIntake, ServedSession, token_digest

if TYPE_CHECKING:
    from .connection import Connection

DECODING_THREADS = 2
_STEP_S = 0.005  # between two looks for a tick that is due
_STALLED_TICKS = 5  # without a tick for so long, the service is not ready
logger = logging.getLogger("tml_runtime.serve")


class Refusal(Exception):
    """The end of a connection that the server wants: what to say, and the close code."""

    def __init__(self, code: ErrorCode, close: CloseCode, message: str, **figures: Any) -> None:
        super().__init__(message)
        self.code = code
        self.close = close
        self.figures = figures


@dataclass
class Counts:
    """Since the service began."""

    connections: int = 0
    sessions: int = 0
    resumed: int = 0
    expired: int = 0
    faults: int = 0
    slow_consumers: int = 0
    refused: dict[str, int] = field(  # before a welcome, by error; these three are always there
        default_factory=lambda: dict.fromkeys(("unauthorized", "forbidden", "exhausted"), 0)
    )

    def refuse(self, error: str) -> None:
        self.refused[error] = self.refused.get(error, 0) + 1


class Service:
    """Serves the sessions of `runtime`, which runs in real time already and belongs to it alone.

    make_intake: makes what a session's media go through. token: what a client must know, if given.
    origins: of web pages that may connect; programs other than browsers send none. options: of
    `Runtime.open_session`, where a client names none. hint: what to write to the model.
    """

    def __init__(
        self,
        runtime: Runtime,
        config: ModelConfig,
        *,
        make_intake: MakeIntake,
        limits: Limits | None = None,
        token: str | None = None,
        origins: tuple[str, ...] = (),
        options: Mapping[str, Any] | None = None,
        hint: str = "",
    ) -> None:
        self.runtime = runtime
        self.limits = Limits() if limits is None else limits
        self.origins = origins
        self.hint = hint
        self._options = dict(options or {})
        self.layout = config.layout
        self.grid = FrameGrid(
            patch=config.patch.patch,
            extra_columns=int(config.patch.extra_column),
            max_tokens=config.layout.max_video_tokens,
        )
        self.max_sessions: int = runtime.report()["admission"]["limit"]
        self.counts = Counts()
        self.connections: set[Connection] = set()
        self.decoders = ThreadPoolExecutor(DECODING_THREADS, "tml-serve-decode")
        self.failure: NotRunning | None = None
        self.draining = False
        self.over = asyncio.Event()  # set by a failure
        self._calls = ThreadPoolExecutor(1, "tml-serve-call")
        self._make_intake = make_intake
        self._token = None if token is None else token_digest(token)
        self._by_token: dict[bytes, ServedSession] = {}
        self._pump_task: asyncio.Task[None] | None = None
        self._ticked_s = 0.0
        self._snapshot: tuple[float, dict[str, Any]] = (-math.inf, {})

    @property
    def max_message_bytes(self) -> int:
        """Of a client's message: a control message, or a frame of the largest size."""
        return max(65_536, self.grid.max_bytes + 64)

    @property
    def sessions(self) -> list[ServedSession]:
        return list(self._by_token.values())

    @property
    def needs_token(self) -> bool:
        return self._token is not None

    @property
    def ready(self) -> bool:
        """New sessions would be heard: ticks run, and nothing is about to end."""
        limit_s = _STALLED_TICKS * self.layout.period_ms / 1000
        ticking = asyncio.get_running_loop().time() - self._ticked_s < limit_s
        return self.failure is None and not self.draining and ticking

    def is_token(self, token: str) -> bool:
        """In a time that does not depend on `token`."""
        return self._token is None or hmac.compare_digest(self._token, token_digest(token))

    def start(self) -> None:
        self._ticked_s = asyncio.get_running_loop().time()
        self._pump_task = asyncio.create_task(self._pump(), name="pump")

    async def stop(self) -> None:
        """End all sessions and connections; those that do not answer are cut."""
        self.draining = True
        refusal = Refusal(ErrorCode.DRAINING, CloseCode.DRAINING, "the service is going away")
        for connection in list(self.connections):
            connection.end(refusal)
        for served in self.sessions:
            self._forget(served)
        closing = [connection.done for connection in self.connections]
        if closing:
            await asyncio.wait(closing, timeout=2 * self.limits.close_s + 1.0)
        if self._pump_task is not None:
            self._pump_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._pump_task
        self.decoders.shutdown(wait=False, cancel_futures=True)
        self._calls.shutdown(wait=False, cancel_futures=True)

    # Admission

    def no_room(self) -> Refusal | None:
        """Why a session cannot be opened now, as far as that can be told without trying."""
        if self.failure is not None:
            return self._failed(self.failure)
        if self.draining:
            return Refusal(ErrorCode.DRAINING, CloseCode.DRAINING, "the service is going away")
        if (in_use := len(self._by_token)) >= self.max_sessions:
            message = (
                f"{in_use} sessions are all that are admitted: see report.admission of /status"
            )
            return _exhausted(message, in_use=in_use, closing=0, capacity=self.max_sessions)
        return None

    async def admit(self, connection: Connection, hello: Hello) -> tuple[ServedSession, bool]:
        """The connection's session, and whether it was there before. Raises Refusal."""
        if (self.failure is not None or self.draining) and (refusal := self.no_room()):
            raise refusal
        if hello.resume is not None:
            return self._resume(connection, hello.resume), True
        open_session = partial(self.runtime.open_session, **{**self._options, **hello.options})
        try:
            session = await asyncio.get_running_loop().run_in_executor(self._calls, open_session)
        except ResourceExhausted as error:
            raise _exhausted(
                str(error), in_use=error.in_use, closing=error.closing, capacity=error.capacity
            ) from None
        except (InputValueError, InputTypeError) as error:
            message = f"options: {error}"
            raise Refusal(
                ErrorCode.BAD_MESSAGE, CloseCode.BAD_MESSAGE, message, field="options"
            ) from None
        except NotRunning as error:
            raise self._failed(error) from error
        served = ServedSession(
            session,
            self._make_intake(session),
            sample_rate=self.layout.sample_rate,
            limits=self.limits,
        )
        self._by_token[token_digest(served.resume_token)] = served
        self.counts.sessions += 1
        served.connection = connection
        return served, False

    def _resume(self, connection: Connection, token: str) -> ServedSession:
        served = self._by_token.get(token_digest(token))
        if served is None:
            raise Refusal(
                ErrorCode.UNKNOWN_SESSION,
                CloseCode.UNKNOWN_SESSION,
                "no session waits for this token: its grace period is over, or it has ended",
            )
        old = served.connection
        served.connection = connection
        if old is not None:  # its client knows better than TCP that it is gone
            old.end(
                Refusal(ErrorCode.TAKEN_OVER, CloseCode.TAKEN_OVER, "another connection took over")
            )
        if served.expiry is not None:
            served.expiry.cancel()
            served.expiry = None
            with self.guard(served):
                served.session.resume()
        served.resumes += 1
        self.counts.resumed += 1
        return served

    def detach(self, connection: Connection, *, keep: bool) -> None:
        """The connection is over; with `keep`, its session waits for the client to come back."""
        served = connection.served
        if served is None or served.connection is not connection:
            return
        served.connection = None
        if not keep or self.draining or self.failure is not None:
            self._forget(served)
        elif token_digest(served.resume_token) in self._by_token:
            loop = asyncio.get_running_loop()
            served.expiry = loop.call_later(self.limits.grace_s, self._expire, served)
            with self.guard(served):
                served.session.pause()

    def _expire(self, served: ServedSession) -> None:
        self.counts.expired += 1
        self._forget(served)

    def _forget(self, served: ServedSession) -> None:
        self._by_token.pop(token_digest(served.resume_token), None)
        if served.expiry is not None:
            served.expiry.cancel()
        served.session.close()

    # Ticks

    @contextlib.contextmanager
    def guard(self, served: ServedSession) -> Iterator[None]:
        """Around calls of a session: its end, or the runtime's, reaches whom it concerns. What
        nobody expected ends this session and no other."""
        try:
            yield
        except ProtocolError:
            raise  # the client's, and answered there
        except SessionFault as error:
            self.counts.faults += 1
            self._end(served, ErrorCode.SESSION_FAULT, CloseCode.SESSION_FAULT, str(error))
        except SessionClosed as error:
            self._end(served, ErrorCode.INTERNAL, CloseCode.INTERNAL, str(error))
        except NotRunning as error:
            self.fail(error)
        except Exception:
            logger.exception("session %s failed", served.id)
            message = "the service has a bug; its log says more"
            self._end(served, ErrorCode.INTERNAL, CloseCode.INTERNAL, message)

    def _end(self, served: ServedSession, code: ErrorCode, close: CloseCode, message: str) -> None:
        self._forget(served)
        if served.connection is not None:
            served.connection.end(Refusal(code, close, message))

    async def _pump(self) -> None:
        """Shortly after each tick, take what it said to every session."""
        loop = asyncio.get_running_loop()
        period_ns = self.layout.period_ms * 1_000_000
        seen, told, due_ns = 0, -1, 0
        while self.failure is None:
            await asyncio.sleep(max(_STEP_S, (due_ns - self.runtime.media_ns()) / 1e9))
            try:
                self.runtime.check_alive()
            except NotRunning as error:
                self.fail(error)
                return
            if self.runtime.metrics.count == seen:
                continue
            seen = self.runtime.metrics.count
            records = self.runtime.metrics.records(MAX_TICKS)
            records, told = records[records["tick"] > told], int(records["tick"][-1])
            due_ns = (self.runtime.media_ns() // period_ns + 1) * period_ns
            self._ticked_s = loop.time()
            for served in self.sessions:
                served.tell_ticks(records, self.layout.samples_per_tick)
                self._deliver(served)

    def _deliver(self, served: ServedSession) -> None:
        lost = 0
        with self.guard(served):
            lost = served.poll()
        if served.connection is not None:
            served.connection.wake(lost)

    def fail(self, error: NotRunning) -> None:
        """The loop has ended: every client hears why."""
        if self.failure is not None or self.draining:
            return
        self.failure = error
        refusal = self._failed(error)
        logger.error("%s (%r)", refusal, error.__cause__)
        for connection in list(self.connections):
            connection.end(refusal)
        self.over.set()

    @staticmethod
    def _failed(error: NotRunning) -> Refusal:
        """What clients are told: what kind of error it was, and none of its words."""
        cause = "" if error.__cause__ is None else f": {type(error.__cause__).__name__}"
        return Refusal(ErrorCode.LOOP_FAILED, CloseCode.LOOP_FAILED, f"{error}{cause}")

    # Reports

    async def snapshot(self) -> dict[str, Any]:
        """What the runtime says of itself, asked at most twice a second: it copies all records."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._snapshot[0] > 0.5:
            found = await loop.run_in_executor(self._calls, self.runtime.status)
            self._snapshot = (loop.time(), found)
        return self._snapshot[1]

    async def call(self, function: Callable[[Runtime], bytes]) -> bytes:
        """`function(runtime)`, not on the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._calls, function, self.runtime)

    async def status(self) -> dict[str, Any]:
        state = "running" if self.ready else "not ready"
        if self.draining:
            state = "draining"
        if self.failure is not None:
            state = "failed"
        service = {
            "state": state,
            "connections": len(self.connections),
            "counts": asdict(self.counts),
            "sessions": [served.status() for served in self.sessions],
        }
        return {**await self.snapshot(), "service": service}


def _exhausted(message: str, *, in_use: int, closing: int, capacity: int) -> Refusal:
    return Refusal(
        ErrorCode.EXHAUSTED,
        CloseCode.EXHAUSTED,
        message,
        in_use=in_use,
        closing=closing,
        capacity=capacity,
        retry_after_s=1 if closing else 5,
    )
