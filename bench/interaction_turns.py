"""The baseline: the same model driven turn by turn behind Silero's voice-activity detector.

As in a usual harness, the model is asked when the detector says that the user has ended, hears the
turn as a whole and in no time, and speaks until it has nothing more to say or the user speaks up.
It hears and sees nothing in between. That a turn is heard in no time flatters it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tml_runtime import InteractionModel, Runtime, Session
from tml_runtime.demo.cue.stage import Episode
from tml_runtime.session import SpeechOut

from .interaction_run import make_runtime
from .interaction_take import PERIOD_S, RATE, REST, WINDOW, Take
from .interaction_voice import listen, probabilities

SILENCE_S = 0.55  # that ends a turn: the default of LiveKit's plugin for Silero
QUIET_TICKS = 3  # without a word: it has nothing more to say
MOST_TICKS = 50  # of a reply


@dataclass(frozen=True)
class Turn:
    """What the user says or writes: heard from `begin` to `end`, known to have begun and ended a
    while later. In seconds of the episode."""

    begin: float
    end: float
    begin_known: float
    end_known: float
    text: tuple[int, ...] = ()


def turns(episodes: Sequence[Episode]) -> list[list[Turn]]:
    """Of each episode, in the order in which they end. A text is a turn of its own, known at once.

    Raises MissingExtraError."""
    silence_N = np.zeros(REST * WINDOW, np.float32)  # in which the last one ends
    sounds = [np.concatenate([made.pcm_T_W.reshape(-1), silence_N]) for made in episodes]
    found = []
    for episode, probability_F in zip(episodes, probabilities(sounds), strict=True):
        spoken = [Turn(*heard) for heard in listen(probability_F, SILENCE_S)]
        written = [
            Turn(t, t, t, t, ids)
            for t, ids in ((tick * PERIOD_S, ids) for tick, ids in enumerate(episode.text))
            if ids
        ]
        found.append(sorted([*spoken, *written], key=lambda turn: turn.end_known))
    return found


def play_turns(
    model: InteractionModel,
    episodes: Sequence[Episode],
    *,
    seed: int = 0,
    on_take: Callable[[], None] = lambda: None,
    **options: Any,
) -> list[Take]:
    """options: of Runtime. on_take: called after each episode. Raises MissingExtraError."""
    takes = []
    heard = turns(episodes)
    with make_runtime(model, 1, seed, **options) as runtime:
        for number, (episode, waiting) in enumerate(zip(episodes, heard, strict=True)):
            session = runtime.open_session(temperature=0.0, seed=seed * 65_537 + number)
            harness = _Harness(runtime, session, Take(episode, 0.0))
            harness.run(waiting)
            takes.append(harness.take)
            session.close()
            on_take()
    return takes


class _Harness:
    def __init__(self, runtime: Runtime, session: Session, take: Take) -> None:
        self.take = take
        self._runtime, self._session = runtime, session
        self._num_run = 0  # ticks of the session, which has a time of its own
        self._num_heard = 0  # ticks of the episode that were put in, or passed by

    def run(self, waiting: list[Turn]) -> None:
        while waiting:
            now = waiting.pop(0)
            cuts = [
                turn.begin_known if turn.begin_known > now.end_known else turn.end_known
                for turn in waiting
            ]
            self._hear(now)
            self._reply(now.end_known, min([*cuts, self.take.duration_s]))

    def _hear(self, turn: Turn) -> None:
        """Put all of it in; the last window is left to run: its output begins the reply."""
        end = min(int(np.ceil(turn.end / PERIOD_S)), len(self.take.episode))
        ticks = list(range(max(int(turn.begin / PERIOD_S), self._num_heard), end))
        if turn.text or not ticks:
            self._put(None, turn.text)
            return
        for tick in ticks:
            self._put(tick)
            if tick < ticks[-1]:
                self._tick()
        self._num_heard = end

    def _reply(self, begin: float, end: float) -> None:
        quiet = 0
        for number in range(MOST_TICKS):
            now = begin + number * PERIOD_S
            if number > 0:
                self._put(None)
            before = len(self.take.words)
            self._tick(at=now, end=end)
            quiet = 0 if len(self.take.words) > before else quiet + 1
            if quiet == QUIET_TICKS or now + PERIOD_S >= end:
                return

    def _put(self, tick: int | None, text: Sequence[int] = ()) -> None:
        """One window: a tick of the episode, or silence."""
        t, episode = self._num_run * PERIOD_S, self.take.episode
        silent = np.zeros(WINDOW, np.float32)
        self._session.push_audio(silent if tick is None else episode.pcm_T_W[tick], t)
        if tick is not None and episode.seen_T[tick]:
            for k, frame in enumerate(episode.frames_T_2_Y_Y_3[tick]):
                self._session.push_video(frame, t + (k + 0.5) * PERIOD_S / 2)
        if text:
            self._session.push_text(text)

    def _tick(self, at: float | None = None, end: float = 0.0) -> None:
        """What is said is heard from `at` on and cut at `end`; None: by nobody."""
        self._runtime.run_ticks(1)
        self._num_run += 1
        for out in self._session.poll():
            t = None if at is None else at + out.t - self._num_run * PERIOD_S
            if t is None or t > end - 1e-9:
                continue
            if isinstance(out, SpeechOut):
                self.take.add_speech(t, out.pcm[: round((end - t) * RATE)])
            else:
                self.take.add(out, t)
