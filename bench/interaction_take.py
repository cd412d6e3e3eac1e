"""What a session said of one episode, on its client's clock."""

# Dimension key: N samples.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tml_runtime.demo.cue.stage import Episode
from tml_runtime.demo.cue.words import CONFIG, WORDS
from tml_runtime.session import ActionOut, SpeechOut, TextOut

from .interaction_hear import segments
from .interaction_metrics import Span, Word

REST = 5  # ticks of silence after an episode, in which its last answer may come
RATE, WINDOW = CONFIG.layout.sample_rate, CONFIG.layout.samples_per_tick
PERIOD_NS = CONFIG.layout.period_ms * 1_000_000
PERIOD_S = PERIOD_NS / 1e9
ACTIONS = {"delegate": "<delegate>", "yield": "<yield>"}


@dataclass(eq=False)
class Take:
    """What a session said of one episode. Times are in seconds from the episode's first sample on,
    as its client's clock has them."""

    episode: Episode
    begin_s: float  # on the session's media clock
    words: list[Word] = field(default_factory=list)
    pcm_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))

    def __post_init__(self) -> None:
        self.pcm_N = np.zeros((len(self.episode) + REST) * WINDOW, np.float32)

    @property
    def duration_s(self) -> float:
        return len(self.pcm_N) / RATE

    def segments(self) -> list[Span]:
        """Where it is heard to speak."""
        return segments(self.pcm_N, RATE)

    def add_speech(self, t: float, pcm: np.ndarray) -> None:
        first = round(t * RATE)
        skip = max(0, -first)
        part = self.pcm_N[first + skip : first + len(pcm)]
        part[:] = pcm[skip : skip + len(part)]

    def add_words(self, t: float, ids: Sequence[int]) -> None:
        """One a step; each is heard for a tick."""
        step_s = PERIOD_S / CONFIG.layout.num_steps
        for number, word in enumerate(ids):
            self.add_word(t + number * step_s, WORDS[word])

    def add_word(self, t: float, text: str) -> None:
        if -1e-9 <= t < self.duration_s:
            self.words.append(Word(t, t + PERIOD_S, text))

    def add(self, out: SpeechOut | TextOut | ActionOut, t: float) -> None:
        if isinstance(out, SpeechOut):
            self.add_speech(t, out.pcm)
        elif isinstance(out, TextOut):
            self.add_words(t, out.ids)
        else:
            self.add_word(t, ACTIONS[out.name])
