"""The client's side of one conversation: push media in, poll speech, text and actions out.

Media time is in seconds since the session opened. Tick n hears [n * period, (n + 1) * period), runs
when that window has ended, and speaks for the period after it: its speech begins, and its first
output step lies, at (n + 1) * period. An epoch is the time between two interruptions.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np

from . import checks
from .errors import (
    InputBackpressure,
    InputTypeError,
    InputValueError,
    LateInput,
    NotRunning,
    SessionClosed,
    SessionFault,
)
from .mailbox import Output
from .model import TurnLayout
from .model.config import Vocabulary
from .slots import Interruption, Seat, SessionStats
from .text import Tokenizer


@dataclass(frozen=True, eq=False)
class SpeechOut:
    """Speech to be heard from media time `t` on: float32 mono, read-only."""

    pcm: np.ndarray
    t: float
    sample_rate: int
    epoch: int = 0


@dataclass(frozen=True)
class TextOut:
    """Text of consecutive output steps, and its ids. `t` is the first one's.

    A character whose bytes a tick cuts in two comes whole, with its last id.
    """

    text: str
    ids: tuple[int, ...]
    t: float
    epoch: int = 0


@dataclass(frozen=True)
class ActionOut:
    """Something to be done at media time `t`: "delegate" or "yield"."""

    name: str
    t: float
    epoch: int = 0


class Host(Protocol):
    """What a session needs of its runtime."""

    def check_alive(self) -> None:
        """Raises NotRunning once the runtime has stopped."""

    def media_ns(self) -> int:
        """Time since tick 0's window began."""
        ...


class Session:
    """Made by `Runtime.open_session`; a context manager that closes it.

    Any thread may call any method; calls of one session take turns, and never wait for a tick.
    Input is refused before anything is touched, so after an input error the session is as it was.
    """

    def __init__(
        self,
        seat: Seat,
        host: Host,
        *,
        layout: TurnLayout,
        vocab: Vocabulary,
        tokenizer: Tokenizer,
    ) -> None:
        self._seat = seat
        self._host = host
        self._layout = layout
        self._vocab = vocab
        self._tokenizer = tokenizer
        self._decoder = tokenizer.decoder()
        self._actions = {vocab.delegate: "delegate", vocab.yield_turn: "yield"}
        self._quiet = {vocab.silence, vocab.missing}
        self._fenced_outputs = 0
        self._lock = threading.Lock()  # clients only; the tick thread does not know it

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def media_time(self) -> float:
        """Seconds on this session's clock: negative until its first window begins."""
        return (self._host.media_ns() - self._seat.open_tick * self._seat.spec.window_ns) / 1e9

    @property
    def first_tick(self) -> int:
        """The runtime's tick that hears this session's first window."""
        return self._seat.open_tick

    @property
    def open_t(self) -> float:
        """Where the oldest window still open begins: input before it is late."""
        return self._seat.open_window * self._seat.spec.window_ns / 1e9

    @property
    def epoch(self) -> int:
        """How often the session was interrupted. All that `poll` returns is of this epoch."""
        return self._seat.interruption.epoch

    @property
    def stats(self) -> SessionStats:
        """A copy of the counts so far."""
        return self._seat.copy_stats(self._fenced_outputs)

    def push_audio(self, pcm: np.ndarray, t: float, *, sample_rate: int | None = None) -> None:
        """Mono samples [n], float32 or int16, the first at media time `t`.

        Any length and order; where pieces overlap, the last one pushed wins. What is not there when
        its window closes is concealed, and the window is flagged to the model. `sample_rate`,
        if given, is compared with the model's.
        """
        with self._lock:
            self._check_open()
            checks.checked_rate(sample_rate, self._layout.sample_rate)
            samples = checks.checked_pcm(pcm)
            start = checks.whole(checks.checked_time(t), self._layout.sample_rate)
            size = self._seat.spec.window_samples
            self._check_windows(start // size, (start + max(len(pcm), 1) - 1) // size, t)
            if len(pcm) > 0 and not self._seat.inbox.put_audio(start, samples):
                raise InputBackpressure(f"the audio queue is full; {len(pcm)} samples at {t=}")

    def push_video(self, frame: np.ndarray, t: float) -> None:
        """An RGB frame uint8 [H, W, 3] taken at media time `t`, H and W multiples of 40.

        Of a window's frames the newest are seen, in pairs; an odd one out is paired with itself,
        the others are shed. All have the size of the newest.
        """
        with self._lock:
            self._check_open()
            checks.checked_frame(frame, self._seat.spec.grid)
            stamp = checks.whole(checks.checked_time(t), 1_000_000_000)
            window = stamp // self._seat.spec.window_ns
            self._check_windows(window, window, t)
            if not self._seat.inbox.put_frame(stamp, frame):
                raise InputBackpressure(f"the video queue is full; frame at {t=}")

    def push_text(self, text: str | Sequence[int] | np.ndarray) -> None:
        """Text, or token ids, for the next tick. What it cannot take waits for the one after."""
        with self._lock:
            self._check_open()
            ids = self.encode_text(text)
            if len(ids) > 0 and not self._seat.inbox.put_text(ids):
                raise InputBackpressure(f"the text queue is full; {len(ids)} tokens")

    def encode_text(self, text: str | Sequence[int] | np.ndarray) -> np.ndarray:
        """The ids, int32, that `push_text` would push; what it refuses for good is refused here."""
        ids = self._tokenizer.encode(text) if isinstance(text, str) else text
        ids = checks.checked_ids(ids, self._vocab.num_valid)
        limit = self._seat.spec.text_queue_tokens
        if len(ids) > limit:
            raise InputValueError(f"text: {len(ids)} tokens in one push, {limit=}: split it")
        return ids

    def delegate(self, text: str) -> int:
        """Ask the background model for `text`, as the model's own action would; returns the
        request's id. The answer goes to the model, as the session's policy says."""
        with self._lock:
            self._check_open()
            if not isinstance(text, str):
                raise InputTypeError(f"text: expected str, got {type(text).__name__}")
            limit = self._seat.spec.text_queue_tokens
            if not 0 < len(text) <= limit:
                raise InputValueError(f"text: {len(text)} characters, expected 1..{limit}")
            line = self._seat.inbox.line
            if line is None:
                raise NotRunning("delegate: no background model; Runtime(model, background=...)")
            number = line.ask(text)
            if number is None:
                raise InputBackpressure("delegate: too many texts wait for the next tick")
            return number

    def poll(self) -> list[SpeechOut | TextOut | ActionOut]:
        """All output since the last call, tick by tick: speech first, then text and actions.

        Returns at once, also after the runtime has stopped. A client that does not poll for too
        long loses new output (`stats.lost_outputs`); the media times show where.
        """
        with self._lock:
            self._check_not_over()
            outputs: list[SpeechOut | TextOut | ActionOut] = []
            while (output := self._seat.outbox.get()) is not None:
                if output.epoch == self.epoch:
                    outputs += self._decode(output)
                else:
                    self._fenced_outputs += 1
            return outputs

    def interrupt(self, played_t: float) -> int:
        """The client stopped playing, at media time `played_t`; returns the new epoch.

        Nothing that was said before comes out of `poll` any more. From the next tick on the model
        remembers what it said up to `played_t`, in whole output steps, and silence from there on;
        what it heard meanwhile it still remembers. No more than the newest eight ticks are taken
        back, and what they hold longer than the cache can follow stays (`stats.unforgotten`).
        """
        with self._lock:
            self._check_open()
            played_ns = checks.whole(checks.checked_time(played_t), 1_000_000_000)
            pending = self._seat.interruption
            if pending.epoch > self._seat.epoch:  # the model has not been told of that one yet
                played_ns = min(played_ns, pending.played_ns)
            self._seat.interruption = Interruption(pending.epoch + 1, played_ns)
            self._decoder = self._tokenizer.decoder()
            return pending.epoch + 1

    def pause(self) -> None:
        """Sit out ticks until `resume`: nothing is heard or said, and the session's keys leave the
        device when there is time. Media time goes on. More than once is no error."""
        with self._lock:
            self._check_open()
            self._seat.paused = True

    def resume(self) -> None:
        """Take part again, from the next tick on; its window is flagged missing to the model."""
        with self._lock:
            self._check_open()
            self._seat.paused = False

    def close(self) -> None:
        """End the session; its slot is free after the next tick. More than once is no error."""
        self._seat.closed = True

    def __del__(self) -> None:
        self.close()  # a session nobody can reach must not keep its slot

    def _decode(self, output: Output) -> list[SpeechOut | TextOut | ActionOut]:
        window_ns, num_steps = self._seat.spec.window_ns, len(output.token_K)
        start_ns = (output.window + 1) * window_ns
        decoded: list[SpeechOut | TextOut | ActionOut] = []
        if len(output.pcm) > 0:
            speech = SpeechOut(output.pcm, start_ns / 1e9, self._layout.sample_rate, output.epoch)
            decoded.append(speech)
        said = enumerate(output.token_K.tolist())
        for kind, run in groupby(said, key=lambda step_token: self._kind(step_token[1])):
            steps, ids = zip(*run, strict=True)
            times = [(start_ns + step * window_ns // num_steps) / 1e9 for step in steps]
            if kind == "text":
                decoded.append(TextOut(self._decoder.decode(ids), ids, times[0], output.epoch))
            elif kind == "action":
                names = [self._actions[token] for token in ids]
                decoded += [
                    ActionOut(name, t, output.epoch) for name, t in zip(names, times, strict=True)
                ]
        return decoded

    def _kind(self, token: int) -> str:
        if token in self._actions:
            return "action"
        return "quiet" if token in self._quiet else "text"

    def _check_not_over(self) -> None:
        if self._seat.closed:
            raise SessionClosed("the session was closed: open another one")
        if self._seat.fault is not None:
            raise SessionFault(str(self._seat.fault), t=self._seat.fault.t)

    def _check_open(self) -> None:
        self._check_not_over()
        self._host.check_alive()

    def _check_windows(self, first: int, last: int, t: float) -> None:
        spec, open_window = self._seat.spec, self._seat.open_window
        open_t = open_window * spec.window_ns / 1e9
        if first < open_window:
            raise LateInput(
                f"{t=} lies before {open_t}, where the oldest open window begins: cut it off",
                t=t,
                open_t=open_t,
            )
        end = open_window + spec.num_windows
        if last >= end:
            raise InputBackpressure(
                f"input at {t=} reaches beyond {end * spec.window_ns / 1e9}, the end of the "
                f"{spec.num_windows} windows that are open: push it later"
            )
