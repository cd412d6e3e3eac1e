from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_file import write_tokenizer

from tml_runtime.errors import InputValueError
from tml_runtime.text import MAX_HELD, TOKENIZER_FILE, ByteTokenizer, HfTokenizer, Tokenizer


@pytest.fixture(scope="module")
def subwords(tmp_path_factory: pytest.TempPathFactory) -> HfTokenizer:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tokenizer(folder / TOKENIZER_FILE)
    return HfTokenizer(folder)


@given(text=st.text(), cuts=st.lists(st.integers(0, 200)))
def test_any_split_of_the_ids_gives_the_text_back(
    subwords: HfTokenizer, text: str, cuts: list[int]
) -> None:
    for tokenizer in (ByteTokenizer(), subwords):
        _comes_back(tokenizer, text, cuts)


def _comes_back(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    ids, decoder = tokenizer.encode(text), tokenizer.decoder()
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    pieces = [decoder.decode(ids[a:b]) for a, b in pairwise(edges)]
    assert "".join(pieces) == text


def test_what_is_no_byte_is_a_replacement_character() -> None:
    assert ByteTokenizer().decoder().decode([65, 300, 66, -1, 255]) == "A\ufffdB\ufffd\ufffd"


def test_a_lone_surrogate_can_be_pushed() -> None:
    assert ByteTokenizer().encode("a\ud800b") == [97, 63, 98]


def test_decoders_are_independent() -> None:
    tokenizer = ByteTokenizer()
    first, second = tokenizer.decoder(), tokenizer.decoder()
    assert first.decode([0xC3]) == ""
    assert second.decode([0x41]) == "A"
    assert first.decode([0xA9]) == "é"


def test_text_is_never_a_special_token(subwords: HfTokenizer) -> None:
    """A client that writes the name of one has written these characters."""
    text = "say <|end|> now"
    ids = subwords.encode(text)
    assert not {0, 1} & set(ids)
    assert subwords.decoder().decode(ids) == text
    assert subwords.encode("a\ud800b") == subwords.encode("a?b")


@pytest.mark.parametrize("kind", ["unigram", "words", "added"])
def test_nor_is_it_one_that_the_tokenizer_would_find(kind: str, tmp_path: Path) -> None:
    """Its own model may know the name, and tokens may be added that are not special."""
    end = "</s>"
    if kind == "unigram":
        pieces = [("<unk>", 0.0), (end, -1.0), *((c, -3.0) for c in "say now</>")]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0))
    elif kind == "words":
        words = {"<unk>": 0, end: 1, "say": 2, "now": 3}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    else:
        write_tokenizer(tmp_path / TOKENIZER_FILE)
        tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / TOKENIZER_FILE))
    if kind == "added":
        tokenizer.add_tokens([tokenizers.AddedToken(end, special=False)])
    else:
        tokenizer.add_special_tokens([end])
    tokenizer.save(str(tmp_path / TOKENIZER_FILE))
    found = tokenizer.token_to_id(end)
    assert found in tokenizer.encode(f"say {end} now", add_special_tokens=False).ids
    ids = HfTokenizer(tmp_path).encode(f"say {end} now")
    assert ids and found not in ids


def test_words_are_fewer_ids_than_bytes(subwords: HfTokenizer) -> None:
    assert len(subwords.encode("hello world")) < 5


def test_special_and_unknown_ids_say_nothing(subwords: HfTokenizer) -> None:
    hello = subwords.encode("hello")
    decoder = subwords.decoder()
    assert decoder.decode([0, *hello, 1, 10**6, -1]) == "hello"
    assert decoder.decode(hello) == "hello"


def test_bytes_that_are_no_character_hold_back_little(subwords: HfTokenizer) -> None:
    continuation = subwords.encode("🙂")[-1]
    decoder = subwords.decoder()
    held = decoder.decode([continuation] * MAX_HELD)
    assert held.strip("\ufffd") == ""
    assert decoder.decode(subwords.encode("hello")) == "hello"


@pytest.mark.parametrize("text", [None, "{}", "no json"])
def test_what_is_no_tokenizer_is_refused_by_name(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / TOKENIZER_FILE
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputValueError, match=f"{TOKENIZER_FILE} cannot be read as a tokenizer"):
        HfTokenizer(path)


def test_a_tokenizer_of_another_model_is_refused(subwords: HfTokenizer) -> None:
    size = 1 + max(subwords.encode("hello world")) + 1000
    subwords.check(size)
    with pytest.raises(InputValueError, match="end at 99: it is another model's"):
        subwords.check(100)
