from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tml_runtime.text import ByteTokenizer


@given(text=st.text(), cuts=st.lists(st.integers(0, 200)))
def test_any_split_of_the_ids_gives_the_text_back(text: str, cuts: list[int]) -> None:
    tokenizer = ByteTokenizer()
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
