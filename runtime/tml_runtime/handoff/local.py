"""A background model that is a function of this process."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import torch

from ..errors import HandoffError, InputTypeError, InputValueError
from .request import Request

PIECES_AHEAD = 32  # of a generator in a thread, before it waits for the loop


class LocalModel:
    """`answer(request)` gives a text, or yields it in pieces; plain or async.

    An async function runs on the hand-off's event loop: one that blocks it holds up the other
    requests, though no tick. A plain one runs in a thread of its own, at most `max_threads` at a
    time. A thread cannot be stopped: when the request is over, a generator is left at its next
    piece, and a function that never returns keeps its thread, a daemon, until the process ends;
    look at `request.cancelled` in anything long. Beyond `max_threads` requests fail.

    stream: the CUDA stream that a plain function's kernels go to. None: torch's default one, which
    is the ticks' too, so that they wait for what is queued there; beside ticks on the same GPU give
    it one of its own, of low priority, or of a green context with some of the multiprocessors;
    keep that context, since torch's stream of it does not.
    """

    def __init__(
        self,
        answer: Callable[[Request], Any],
        *,
        max_threads: int = 8,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        if not callable(answer):
            raise InputTypeError(f"answer={answer!r}: expected a function of a Request")
        if type(max_threads) is not int or max_threads < 1:
            raise InputValueError(f"max_threads={max_threads!r} is not a positive int")
        self._answer = answer
        self._is_async = _is_async(answer) or _is_async(type(answer).__call__)
        if stream is not None and self._is_async:
            raise InputValueError("stream: only for a plain function; an async one sets its own")
        self._threads = threading.BoundedSemaphore(max_threads)
        self._max_threads = max_threads
        self._stream = stream

    async def stream(self, request: Request) -> AsyncIterator[str]:
        if not self._is_async:
            async for piece in self._in_thread(request):
                yield piece
            return
        answer = self._answer(request)
        if inspect.isawaitable(answer):
            yield await answer
            return
        async with contextlib.aclosing(answer) as pieces:
            async for piece in pieces:
                yield piece

    async def close(self) -> None:
        """Nothing to do: threads end with their functions."""

    async def _in_thread(self, request: Request) -> AsyncIterator[str]:
        if not self._threads.acquire(blocking=False):
            raise HandoffError(f"all its {self._max_threads} threads are busy")
        worker = _Worker(self._answer, request, self._stream, self._threads.release)
        try:
            worker.thread.start()
        except BaseException:
            self._threads.release()  # nobody else will
            raise
        try:
            while (item := await worker.queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                worker.room.release()
                yield item
        finally:
            worker.left = True
            worker.room.release()


class _Worker:
    """A thread that runs a function and puts what it gives into an asyncio queue, None at last."""

    def __init__(
        self,
        answer: Callable[[Request], str | Iterable[str]],
        request: Request,
        stream: torch.cuda.Stream | None,
        on_end: Callable[[], None],
    ) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.room = threading.Semaphore(PIECES_AHEAD)
        self.left = False  # nobody takes pieces any more
        self._answer = answer
        self._request = request
        self._stream = stream
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self.thread = threading.Thread(
            target=self._run, name=f"tml-handoff-{request.id}", daemon=True
        )

    def _run(self) -> None:
        last: BaseException | None = None
        try:
            with torch.cuda.stream(self._stream):
                self._give(self._answer(self._request))
        except BaseException as error:  # whatever it is, the request has failed, and no more
            last = error
        finally:
            self._on_end()
        self._put(last)

    def _give(self, answer: str | Iterable[str]) -> None:
        for piece in [answer] if isinstance(answer, str) else answer:
            self.room.acquire()
            if self.left:
                return
            self._put(piece)

    def _put(self, item: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self.queue.put_nowait, item)


def _is_async(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
