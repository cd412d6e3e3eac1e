"""`bench host`: what it reports, for a few ticks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.host import PARTS, HostModel, NoDevice, measure
from bench.sessions_run import Combination
from tml_runtime import ModelConfig
from tml_runtime.model import ModelState
from tml_runtime.model.buffers import Bucket
from tml_runtime.model.device_tick import Ran


def test_a_row_for_every_combination(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "host.json"
    sizes = ["--sessions", "1,2", "--video", "none,80x80", "--ticks", "5"]
    assert main(["host", *sizes, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    asked = [(row["video"], row["sessions"], row["ticks"]) for row in rows]
    assert asked == [("none", 1, 5), ("none", 2, 5), ("80x80", 1, 5), ("80x80", 2, 5)]
    for row in rows:
        parts = [row[f"{part}_us"] for part in PARTS]
        assert all(0 < part["p50"] <= part["p99"] for part in parts)
        assert max(part["p50"] for part in parts) <= row["all_us"]["p50"]
        assert row["all_us"]["p99"] <= sum(part["p99"] for part in parts)
    text = capsys.readouterr().out
    assert "a session" in text and len(text.splitlines()) == 4 + 4


class Watched(NoDevice):
    """Notes the shapes of ticks and their newest slot."""

    def __init__(self, state: ModelState) -> None:
        self._state = state
        self.seen: list[tuple[Bucket, int]] = []

    def run(self, bucket: Bucket) -> Ran:
        self.seen.append((bucket, int(self._state.buffers.staged(bucket).slot_S.max())))
        return super().run(bucket)


class WatchedModel(HostModel):
    def new_state(self, *args: Any, **options: Any) -> ModelState:
        state = super().new_state(*args, **options)
        state.buffers.runner = self.runner = Watched(state)
        return state


def test_ticks_are_staged_and_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = WatchedModel.random(ModelConfig.preset("tiny"))
    assert isinstance(model, WatchedModel)
    monkeypatch.setattr(model.device_tick, "run_all", pytest.fail)
    measure(model, Combination(2, (80, 80), "clean"), 3)
    assert model.runner.seen[-1] == (Bucket(rows=2, tokens=2 * (4 + 4 + 1), patches=8), 1)


def test_a_layout_that_is_none_is_named() -> None:
    with pytest.raises(SystemExit, match="ms201"):
        main(["host", "--layout", "ms201"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sessions 0", "'0' is not a number in 1..4096"),
        ("--video 80", "'80' is neither none nor a size"),
        ("--ticks 0", "'0' is not a number"),
    ],
)
def test_bad_arguments(words: str, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["host", *words.split()])
    assert message in capsys.readouterr().err
