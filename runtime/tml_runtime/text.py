"""Text to token ids and back: one id per byte, or as a checkpoint's tokenizer.json says."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ._optional import require
from .errors import InputValueError

TOKENIZER_FILE = "tokenizer.json"
MAX_HELD = 16  # ids that give no text, before what they began is given up


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


class HfTokenizer:
    """A tokenizer.json of Hugging Face's `tokenizers`, as checkpoints bring one.

    What is read is text and nothing else: "<|end|>" becomes the ids of its characters, never the
    added token of that name, since clients must not be able to write one; where a tokenizer has no
    other ids for it, it is left out. Special tokens say nothing. Any thread may encode.
    """

    def __init__(self, path: str | Path) -> None:
        """path: the file, or a folder with a TOKENIZER_FILE. Raises InputValueError for what is not
        one, MissingExtraError without the package."""
        self._tokenizers = require("tokenizers", f"read {TOKENIZER_FILE}", extra="tokenizer")
        path = Path(path)
        path = self._path = path / TOKENIZER_FILE if path.is_dir() else path
        try:
            self._tokenizer: Any = self._tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises no other type
            raise InputValueError(f"{path} cannot be read as a tokenizer: {error}") from None
        self._tokenizer.encode_special_tokens = True
        self._added = frozenset(self._tokenizer.get_added_tokens_decoder())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def check(self, num_valid: int) -> None:
        """Raises InputValueError unless every id is a token of a model that has so many."""
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= num_valid:
            raise InputValueError(
                f"{self._path} has ids up to {largest}, the model's tokens end at {num_valid - 1}: "
                "it is another model's"
            )

    def encode(self, text: str) -> list[int]:
        plain = text.encode("utf-8", errors="replace").decode("utf-8")
        ids = self._tokenizer.encode(plain, add_special_tokens=False).ids
        return [token for token in ids if token not in self._added]

    def decoder(self) -> TextDecoder:
        return _HfDecoder(self._tokenizer, self._tokenizers.decoders.DecodeStream)


class _HfDecoder:
    """Ids that are no token, and bytes that never become a character, are left out."""

    def __init__(self, tokenizer: Any, stream: Any) -> None:
        self._tokenizer, self._make = tokenizer, stream
        self._restart()

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._step(int(token)) for token in ids)

    def _step(self, token: int) -> str:
        text = None
        if token >= 0:
            try:
                text = self._stream.step(self._tokenizer, token)
            except Exception:  # of a prefix that decodes to another text later on
                self._restart()
        self._held = 0 if text else self._held + 1
        if self._held >= MAX_HELD:  # it decodes all that it holds anew for every id
            self._restart()
        return text or ""

    def _restart(self) -> None:
        self._stream, self._held = self._make(skip_special_tokens=True), 0
