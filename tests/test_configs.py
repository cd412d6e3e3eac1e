from __future__ import annotations

import pytest

from tml_kernels._configs import chooser


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
