"""Text to token ids and back. `ByteTokenizer` serves vocabularies whose first 256 ids are bytes."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class TextDecoder(Protocol):
    """Turns one session's ids into text as they come; holds what is not yet a whole character."""

    def decode(self, ids: Sequence[int]) -> str: ...


class Tokenizer(Protocol):
    def encode(self, text: str) -> Sequence[int]: ...

    def decoder(self) -> TextDecoder: ...


class ByteTokenizer:
    """UTF-8, one id per byte. Lone surrogates become "?".

    >>> tokenizer, decoder = ByteTokenizer(), ByteTokenizer().decoder()
    >>> tokenizer.encode("hé")
    [104, 195, 169]
    >>> decoder.decode([104, 195]), decoder.decode([169])
    ('h', 'é')
    """

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decoder(self) -> TextDecoder:
        return _ByteDecoder()


class _ByteDecoder:
    """Bytes that are no UTF-8 become U+FFFD; ids above 255, which are no bytes, do too."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(self, ids: Sequence[int]) -> str:
        # 0xFF never occurs in UTF-8, so it decodes to U+FFFD as an unknown id should
        return self._utf8.decode(bytes(i if 0 <= i < 256 else 0xFF for i in ids))
