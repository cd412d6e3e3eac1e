from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest

from tml_kernels import _head_tiles
from tml_kernels._configs import changed, chooser


def choose(width: int) -> str:
    if width > 8:
        raise ValueError(f"width {width}")
    return f"block of {width}"


def test_each_answer_is_printed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TML_PRINT_CONFIGS", "1")
    remembering = chooser(choose)
    assert [remembering(width) for width in (4, 4, 8)] == ["block of 4", "block of 4", "block of 8"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "choose(4) = block of 4",
        "choose(8) = block of 8",
    ]


def test_silent_unless_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TML_PRINT_CONFIGS", raising=False)
    assert chooser(choose)(2) == "block of 2"
    assert capsys.readouterr().err == ""


def test_a_refusal_is_not_remembered() -> None:
    remembering = chooser(choose)
    for _ in range(2):
        with pytest.raises(ValueError, match="width 9"):
            remembering(9)


@dataclass(frozen=True)
class Config:
    num_warps: int


def test_a_change_is_of_one_op_and_of_a_while() -> None:
    one = functools.partial(chooser, ops=("one", "both"))(Config)
    other = functools.partial(chooser, ops=("other", "both"))(Config)
    with changed("one", num_warps=8):
        assert (one(4), other(4)) == (Config(8), Config(4))
        with changed("both", num_warps=2):
            assert other(4) == Config(2)
    assert (one(4), other(4)) == (Config(4), Config(4))


@pytest.mark.parametrize("op", ["attention_prologue", "shift_keys"])
def test_ops_that_work_on_heads_share_a_chooser(op: str) -> None:
    problem = _head_tiles.Problem(128)
    with changed(op, num_warps=8):
        assert _head_tiles.choose_config(problem).num_warps == 8
    assert _head_tiles.choose_config(problem).num_warps == 4


def test_what_no_chooser_has_cannot_be_changed() -> None:
    with (
        pytest.raises(ValueError, match=r"op: expected one of .*shift_keys.*, got 'tml_kernels'"),
        changed("tml_kernels", num_warps=8),
    ):
        pass
