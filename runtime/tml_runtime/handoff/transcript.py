"""What a session has read and said, in bounded form, as the text of turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from ..text import Tokenizer


@dataclass(frozen=True)
class Turn:
    """Text of one side, in one piece: role "system" (the prompt), "user" (what the model read) or
    "assistant" (what it said), from media time `t` on, in seconds."""

    role: str
    text: str
    t: float


class Entry(NamedTuple):
    """Ids of one role in one tick, at media time `t_ns`; of what was said, until when each id's
    output step was to be heard."""

    role: str
    t_ns: int
    ids: Sequence[int]
    ends_ns: Sequence[int] = ()


class Transcript:
    """The prompt and the newest `max_tokens` ids; whole ticks go, the oldest first.

    >>> transcript = Transcript([80], max_tokens=3)
    >>> transcript.read(0, [104, 105])
    >>> transcript.say(200_000_000, [33, 63], [250_000_000, 300_000_000])
    >>> [entry.role for entry in transcript.copy()]
    ['system', 'assistant']
    """

    def __init__(self, prompt: Sequence[int], max_tokens: int) -> None:
        self._prompt = Entry("system", 0, tuple(prompt))
        self._entries: deque[Entry] = deque()
        self._num_tokens = 0
        self._max_tokens = max_tokens

    def read(self, t_ns: int, ids: Sequence[int]) -> None:
        self._add(Entry("user", t_ns, ids))

    def say(self, t_ns: int, ids: Sequence[int], ends_ns: Sequence[int]) -> None:
        self._add(Entry("assistant", t_ns, ids, ends_ns))

    def unsay(self, played_ns: int) -> None:
        """What was not heard by then was never said, by whole output steps."""
        entries, self._entries, self._num_tokens = self._entries, deque(), 0
        for entry in entries:
            if entry.role == "assistant":
                num_heard = sum(end_ns <= played_ns for end_ns in entry.ends_ns)
                entry = entry._replace(ids=entry.ids[:num_heard], ends_ns=entry.ends_ns[:num_heard])
            self._add(entry)

    def copy(self) -> list[Entry]:
        return [self._prompt, *self._entries] if self._prompt.ids else list(self._entries)

    def _add(self, entry: Entry) -> None:
        if not entry.ids:
            return
        self._entries.append(entry)
        self._num_tokens += len(entry.ids)
        while self._num_tokens > self._max_tokens:
            self._num_tokens -= len(self._entries.popleft().ids)


def turns(entries: Iterable[Entry], tokenizer: Tokenizer) -> tuple[Turn, ...]:
    """Neighbours of one role become one turn; a character that ticks have cut comes whole."""
    decoders = {role: tokenizer.decoder() for role in ("system", "user", "assistant")}
    made = []
    for role, run in groupby(entries, key=lambda entry: entry.role):
        pieces = list(run)
        text = "".join(decoders[role].decode(piece.ids) for piece in pieces)
        if text:
            made.append(Turn(role, text, pieces[0].t_ns / 1e9))
    return tuple(made)
