"""The words of the `cue` model: what it reads, what it says, and how each of them sounds."""

# Dimension key: V words, K output steps of a tick, B mel bands.

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tml_kernels.ops.dmel.reference import log_mel_ref

from ...model import ModelConfig

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve",
)  # fmt: skip
SCALE = ("do", "re", "mi", "fa", "so", "la", "ti")  # what it says while it speaks on request
SPECIALS = ("<silence>", "<missing>", "<delegate>", "<yield>")
UNKNOWN = "<unknown>"
NOW, YES, TICK = "now", "yes", "tick"
SPOKEN = (*NUMBERS, *SCALE, NOW, YES, TICK)
# Instructions, and what results of a background model are put between.
READ = (
    "wait", "count", "tone", "flash", "motion", "speak", "cue", "every", "stop", "ask",
    "[result]", "[/result]", "[notice]",
)  # fmt: skip
WORDS = (*SPECIALS, UNKNOWN, *SPOKEN, *READ)
ID = {word: index for index, word in enumerate(WORDS)}
CONFIG = ModelConfig.preset("cue")
SILENT_LEVEL = CONFIG.layout.dmel.level_min  # log10 mel of a step in which nothing is said
_TOKEN = re.compile(r"\[[^][]*\]|\w+")  # linear in the text, also in one of brackets alone


class WordTokenizer:
    """One id per word; digits are number words, and what is no word is UNKNOWN.

    >>> WordTokenizer().encode("Count tone 3?") == [ID["count"], ID["tone"], ID["three"]]
    True
    """

    def encode(self, text: str) -> list[int]:
        return [self._id(word) for word in _TOKEN.findall(text.lower())]

    def decoder(self) -> _WordDecoder:
        return _WordDecoder()

    def _id(self, word: str) -> int:
        if word.isascii() and word.isdigit() and len(word) <= 2 and int(word) < len(NUMBERS):
            return ID[NUMBERS[int(word)]]
        return ID.get(word, ID[UNKNOWN])


class _WordDecoder:
    """Each word with a space behind it; what is no id is UNKNOWN."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"{WORDS[i] if 0 <= i < len(WORDS) else UNKNOWN} " for i in ids)


@lru_cache(maxsize=1)
def voice_V_K_B() -> Tensor:
    """float32 log10 mel of every word, one tick long: a sung syllable of its own pitch and vowel.

    Words that are never spoken are silent. Not to be written to.
    """
    dmel, layout = CONFIG.layout.dmel, CONFIG.layout
    voice = torch.full((len(WORDS), layout.mel_frames, dmel.num_bands), SILENT_LEVEL)
    for index, word in enumerate(SPOKEN):
        pcm = np.concatenate([np.zeros(dmel.tail), _syllable(index)])
        mel_K_B = log_mel_ref(torch.from_numpy(pcm)[None], dmel)[0]
        voice[ID[word]] = mel_K_B.float().clamp(min=SILENT_LEVEL)
    return voice


# First and second formant, Hz: "ah", "ee", "oo", "eh", "oh".
_VOWELS = ((750, 1200), (300, 2300), (320, 800), (550, 1850), (450, 900))


def _syllable(index: int) -> np.ndarray:
    """float64 samples of one tick: harmonics under two formants, faded in and out."""
    rate, count = CONFIG.layout.sample_rate, CONFIG.layout.samples_per_tick
    t = np.arange(count) / rate
    pitch = 180.0 * 2 ** (index / 12)
    pcm = np.zeros(count)
    for harmonic in np.arange(pitch, 4000, pitch):
        gain = sum(1 / (1 + ((harmonic - f) / 120) ** 2) for f in _VOWELS[index % len(_VOWELS)])
        pcm += (gain + 0.02) * np.sin(2 * np.pi * harmonic * t)
    envelope = np.clip(np.minimum(t / 0.02, (t[-1] - t) / 0.06), 0, 1)
    return 0.3 * envelope * pcm / np.abs(pcm).max()


assert len(WORDS) == CONFIG.vocab.num_valid, len(WORDS)
