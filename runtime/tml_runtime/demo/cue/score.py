"""How well a session did what its episode asks: pure functions of what it said, tick by tick."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .stage import Episode
from .words import CONFIG, ID, NUMBERS, SCALE, WORDS, YES

TICKS_A_MINUTE = 60_000 / CONFIG.layout.period_ms
YIELD_WITHIN = 2  # ticks
_SCALE = {ID[word] for word in SCALE}
_NUMBER = {ID[word]: n for n, word in enumerate(NUMBERS)}


@dataclass
class Share:
    """`hits` of `total`; None without any."""

    hits: int = 0
    total: int = 0

    def add(self, hit: bool) -> None:
        self.hits += int(hit)
        self.total += 1

    @property
    def rate(self) -> float | None:
        return self.hits / self.total if self.total else None


@dataclass
class Score:
    """Of any number of episodes.

    exact: words due that came in exactly their tick. soon: in it or the next one. yielded: of
    interruptions, with no word from two ticks after their first on. held: of backchannels, with
    speech in each of the three ticks from theirs on. counted, near: counts that ended right, and
    right within one. extra: words in a tick in which another one or none is due. false_yes: of
    these, "yes" while somebody talks, not in the tick after a cue either. minutes, talking: of
    media time, and of it with somebody talking.
    """

    exact: Share = field(default_factory=Share)
    soon: Share = field(default_factory=Share)
    yielded: Share = field(default_factory=Share)
    held: Share = field(default_factory=Share)
    counted: Share = field(default_factory=Share)
    near: Share = field(default_factory=Share)
    extra: int = 0
    false_yes: int = 0
    minutes: float = 0.0
    talking: float = 0.0

    def add(self, episode: Episode, said_T_K: np.ndarray) -> None:
        """said: the tokens of each tick's steps."""
        words = [_words(row) for row in said_T_K]
        for event in episode.events:
            if event.kind == "due":
                now, next_ = event.word in words[event.tick], _at(words, event.tick + 1)
                self.exact.add(now)
                self.soon.add(now or event.word in next_)
            elif event.kind == "interruption":
                self.yielded.add(not _goes_on(episode, words, event.tick + YIELD_WITHIN))
            elif event.kind == "backchannel":
                three = words[event.tick : event.tick + 3]
                self.held.add(all(_SCALE & set(said) for said in three))
            elif event.kind == "count":
                numbers = [_NUMBER[w] for said in words for w in said if w in _NUMBER]
                last = numbers[-1] if numbers else 0
                self.counted.add(last == event.word)
                self.near.add(abs(last - event.word) <= 1)
        for tick, said in enumerate(words):
            wrong = [word for word in said if word != episode.said_T[tick]]
            self.extra += len(wrong)
            late = tick > 0 and episode.said_T[tick - 1] == ID[YES]
            if episode.speech_T[tick] and not late:
                self.false_yes += wrong.count(ID[YES])
        self.minutes += len(episode) / TICKS_A_MINUTE
        self.talking += float(episode.speech_T.sum()) / TICKS_A_MINUTE

    def rows(self) -> dict[str, float | int | None]:
        """Shares in percent with the numbers behind them; what never came up is left out."""
        rows: dict[str, float | int | None] = {}
        for name in ("exact", "soon", "yielded", "held", "counted", "near"):
            share: Share = getattr(self, name)
            if share.rate is not None:
                rows[f"{name}_percent"] = round(100 * share.rate, 2)
                rows[f"{name}_of"] = share.total
        rows["extra_words_a_minute"] = round(self.extra / self.minutes, 3) if self.minutes else None
        if self.talking:
            rows["false_yes_a_minute_of_speech"] = round(self.false_yes / self.talking, 3)
            rows["minutes_of_speech"] = round(self.talking, 2)
        rows["minutes"] = round(self.minutes, 2)
        return rows


def score(pairs: Iterable[tuple[Episode, np.ndarray]]) -> Score:
    total = Score()
    for episode, said_T_K in pairs:
        total.add(episode, said_T_K)
    return total


def transcript(said_T_K: np.ndarray) -> str:
    """For a person: "12 now, 20 <yield>"; ticks and words."""
    spoken = [(tick, word) for tick, row in enumerate(said_T_K) for word in _words(row)]
    return ", ".join(f"{tick} {WORDS[word]}" for tick, word in spoken)


def _words(row: Sequence[int] | np.ndarray) -> list[int]:
    return [int(token) for token in row if token != CONFIG.vocab.silence]


def _at(words: list[list[int]], tick: int) -> list[int]:
    return words[tick] if tick < len(words) else []


def _goes_on(episode: Episode, words: list[list[int]], tick: int) -> bool:
    """Whether the scale is heard from `tick` on, before it is asked for again."""
    while tick < len(words) and not episode.text[tick]:
        if _SCALE & set(words[tick]):
            return True
        tick += 1
    return False
