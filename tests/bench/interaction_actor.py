"""A fake model that says what a script has for each session, and a vocoder that makes it heard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from fake_model import FakeModel, FakeState

from tml_runtime.demo.cue.stage import Episode
from tml_runtime.demo.cue.words import CONFIG, ID, SPECIALS
from tml_runtime.model import TickInput, TickOutput

SPOKEN = 1.0  # level of a word's frames
SILENCE = CONFIG.vocab.silence
Script = Sequence[Sequence[int]]  # the words of each tick


def perfect(episode: Episode) -> list[list[int]]:
    return [[int(word)] if word != SILENCE else [] for word in episode.said_T]


def late(ticks: int) -> Callable[[Episode], list[list[int]]]:
    return lambda episode: [[] for _ in range(ticks)] + perfect(episode)


def changed(word: str, into: str | None) -> Callable[[Episode], list[list[int]]]:
    """One word is another, or left out."""
    new = [] if into is None else [ID[into]]
    return lambda episode: [new if said == [ID[word]] else said for said in perfect(episode)]


def silent(episode: Episode) -> list[list[int]]:
    return []


class Actor(FakeModel):
    """Each session that enters gets the next script; after its end it is silent."""

    def __init__(self, scripts: Iterable[Script]) -> None:
        super().__init__(config=CONFIG, keep=False)
        self._scripts: Iterator[Script] = iter(scripts)
        self._by_slot: dict[int, Script] = {}

    def tick(self, state: FakeState, tick: TickInput) -> TickOutput:
        slots = tick.slot_S.tolist()
        ages = [state.lengths[slot] for slot in slots]
        out = super().tick(state, tick)
        out.mel_S_K_B.zero_()
        out.token_S_K.fill_(SILENCE)
        for row, (slot, age) in enumerate(zip(slots, ages, strict=True)):
            if age == 0:
                self._by_slot[slot] = next(self._scripts)
            script = self._by_slot[slot]
            words = script[age] if age < len(script) else []
            out.token_S_K[row, : len(words)] = torch.tensor(words, dtype=torch.int32)
            if any(word >= len(SPECIALS) for word in words):
                out.mel_S_K_B[row] = SPOKEN
        return out


class LevelVocoder:
    """Samples at a third of their frame's level."""

    def push(self, mel_K_B: torch.Tensor) -> np.ndarray:
        return np.repeat(mel_K_B[:, 0].numpy() / 3, CONFIG.layout.dmel.hop).astype(np.float32)

    def reset(self) -> None:
        pass
