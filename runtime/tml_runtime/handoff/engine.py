"""The hand-off's own thread: an event loop that runs a background model's requests.

The tick thread appends to a bounded deque and wakes the loop through its socket, which takes no
lock and does not block. Everything else here happens in the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from ..errors import HandoffError
from ..model.config import Vocabulary
from ..text import Tokenizer
from .answer import Answer
from .options import HandoffOptions
from .request import BackgroundModel, Request
from .transcript import turns

STOP_S = 2.0  # for cancelled requests, and for a model's `close`, to end in
CHARS_PER_TOKEN = 16  # at most, of a piece: so a huge one is cut before it is encoded

COUNTS = ("started", "finished", "failed", "timed_out", "cancelled")

_log = logging.getLogger(__name__)


class Engine:
    """`push`, `drop`, `is_full` and `released` are the tick thread's side."""

    def __init__(
        self,
        model: BackgroundModel,
        options: HandoffOptions,
        tokenizer: Tokenizer,
        vocab: Vocabulary,
    ) -> None:
        self._model = model
        self._options = options
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._controls = frozenset(vocab.specials.values())
        self.counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
        self.released: deque[int] = deque()  # slots of snapshots that are not needed any more
        self._waiting: deque[Answer] = deque()
        self._running: dict[asyncio.Task[None], Answer] = {}
        self._num_pushed = self._num_ended = 0  # written by the tick thread; by the loop
        self._changed = threading.Condition()  # clients wait on it, the tick thread does not
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop = asyncio.Event()

    def start(self) -> None:
        if self._thread is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._run, name="tml-handoff", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Returns when the thread has ended, or when a model blocks its loop for too long."""
        if self._thread is not None:
            self._call(self._stop.set)
            self._thread.join(3 * STOP_S)

    def settle(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._num_ended >= self._num_pushed)

    @property
    def is_full(self) -> bool:
        most = self._options.max_running + self._options.max_waiting
        return len(self._running) + len(self._waiting) >= most

    def push(self, answer: Answer) -> None:
        self._num_pushed += 1
        self._waiting.append(answer)
        self._call(self._accept, answer)

    def drop(self, answer: Answer) -> None:
        self._call(self._end, answer, "cancelled", "")

    def encode(self, text: str) -> list[int]:
        """Text that no one can give orders with: ids with a meaning of their own are left out."""
        ids = map(int, self._tokenizer.encode(text))
        return [i for i in ids if 0 <= i < self._vocab.num_valid and i not in self._controls]

    def _call(self, function: Callable[..., Any], *args: Any) -> None:
        assert self._loop is not None, "the hand-off was not started"
        with contextlib.suppress(RuntimeError):  # the loop is closed: `stop` has ended everything
            self._loop.call_soon_threadsafe(function, *args)

    # The loop's thread

    def _run(self) -> None:
        loop = self._loop
        assert loop is not None
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(self._serve())
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()

    async def _serve(self) -> None:
        await self._stop.wait()
        tasks = list(self._running)
        for answer in [*self._waiting, *self._running.values()]:
            self._end(answer, "cancelled", "the runtime stopped")
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_S)
        try:
            await asyncio.wait_for(self._model.close(), STOP_S)
        except Exception:
            _log.warning("the background model did not close", exc_info=True)

    def _accept(self, answer: Answer) -> None:
        self.counts["started"] += 1
        if not answer.ended:  # it may have run already, in the turn of an earlier one
            timeout = self._options.timeout
            answer.timer = asyncio.get_running_loop().call_later(
                timeout, self._end, answer, "timed_out", f"timed out after {timeout:g} s"
            )
        self._pump()

    def _pump(self) -> None:
        while self._waiting and len(self._running) < self._options.max_running:
            answer = self._waiting.popleft()
            answer.task = asyncio.get_running_loop().create_task(self._stream(answer))
            self._running[answer.task] = answer
            answer.task.add_done_callback(self._on_done)

    async def _stream(self, answer: Answer) -> None:
        answer.request = request = Request(
            id=answer.id,
            epoch=answer.epoch,
            t=answer.t_ns / 1e9,
            turns=turns(answer.entries, self._tokenizer),
            trigger=answer.trigger,
            snapshot=answer.snapshot,
        )
        try:
            async with _closing(self._model.stream(request)) as pieces:
                await self._take(answer, pieces)
        except (KeyboardInterrupt, SystemExit) as error:  # either would end the loop
            raise RuntimeError(repr(error)) from error

    async def _take(self, answer: Answer, pieces: AsyncIterator[str]) -> None:
        room = self._options.max_answer_tokens
        async for piece in pieces:
            if answer.ended:  # a model that was cancelled and goes on
                return
            if not isinstance(piece, str):
                raise TypeError(f"the background model gave {piece!r:.80}, not text")
            start = piece[: CHARS_PER_TOKEN * room]
            ids = self.encode(start)[:room]
            answer.ids.extend(ids)
            room -= len(ids)
            if room <= 0 or len(start) < len(piece):
                return
        if room == self._options.max_answer_tokens:
            raise HandoffError("its answer was empty")

    def _on_done(self, task: asyncio.Task[None]) -> None:
        answer = self._running.pop(task)
        self._release(answer)
        if task.cancelled():
            self._end(answer, "failed", "it cancelled itself")
        elif (error := task.exception()) is not None:
            if isinstance(error, HandoffError):
                self._end(answer, "failed", str(error))
                _log.info("request %d of the hand-off failed: %s", answer.id, error)
            else:
                self._end(answer, "failed", f"it failed with {type(error).__name__}")
                _log.warning("request %d of the hand-off failed", answer.id, exc_info=error)
        else:
            self._end(answer, "finished", "")
        self._pump()

    def _end(self, answer: Answer, outcome: str, reason: str) -> None:
        """The first end counts. A task that still runs is cancelled."""
        if answer.ended:
            return
        self.counts[outcome] += 1
        if answer.timer is not None:
            answer.timer.cancel()
        if reason:
            answer.notice = self._notice(reason)
        answer.ended = True
        if answer.task is None:
            self._waiting.remove(answer)
            self._release(answer)
        else:
            answer.task.cancel()
        if answer.request is not None:
            answer.request.cancelled.set()
        with self._changed:
            self._num_ended += 1
            self._changed.notify_all()

    def _notice(self, reason: str) -> list[int]:
        line = " ".join(reason.split())[:200]
        try:
            return self.encode(f"{self._options.notice}the background model did not answer: {line}")
        except Exception:  # a plugged-in tokenizer may raise anything
            _log.warning("a notice could not be encoded", exc_info=True)
            return []

    def _release(self, answer: Answer) -> None:
        if answer.snapshot is not None:
            self.released.append(answer.snapshot.session.slot)


@contextlib.asynccontextmanager
async def _closing(pieces: AsyncIterator[str]) -> AsyncIterator[AsyncIterator[str]]:
    """`contextlib.aclosing`, for iterators that need no closing too."""
    try:
        yield pieces
    finally:
        if (close := getattr(pieces, "aclose", None)) is not None:
            await close()
