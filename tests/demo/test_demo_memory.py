"""How long things are kept: the options, the budget, a run that rolls, and the picture of it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tml_runtime.demo import live
from tml_runtime.demo.prepare import TIMED, Options, make_budget
from tml_runtime.demo.run import run_demo
from tml_runtime.demo.timeline import CLASSES
from tml_runtime.metrics import CLASS_NAMES
from tml_runtime.model import KvBudget, ModelConfig

ROLLS = {"keep": 3.0, "keep_video": 1.0, "seconds": 18.0}


@pytest.fixture(scope="module")
def rolled(talk: Path, film: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """(report, folder) of 90 ticks: 360 tokens of each kind, in six pages, of which two stay."""
    out = tmp_path_factory.mktemp("rolled")
    options = Options(audio=str(talk), video=str(film), realtime=False, out=out, **ROLLS)
    return run_demo(options, io.StringIO()), out


@pytest.mark.parametrize(
    ("changed", "tokens"),
    [
        ({}, (200, 200, 200)),
        ({"keep": 30.0, "keep_video": 5.0}, (600, 100, 600)),
        ({"keep": 0.01}, (1, 1, 1)),
        ({"preset": "slice", "keep": 4.0}, (80, 960, 80)),
    ],
    ids=str,
)
def test_seconds_become_tokens(changed: dict[str, Any], tokens: tuple[int, int, int]) -> None:
    options = Options(**changed)
    budget = make_budget(options, ModelConfig.preset(options.preset))
    assert (budget.audio, budget.video, budget.reply) == tokens
    assert (budget.anchor, budget.text) == (KvBudget().anchor, KvBudget().text)


def test_pages_come_and_go_within_the_budget(rolled: tuple[dict, Path]) -> None:
    kv = rolled[0]["kv"]
    assert kv["keep_s"] == {"audio": 3.0, "video": 1.0, "reply": 3.0}
    assert kv["kept_s"] == {name: [3.2, 6.4] for name in TIMED}
    assert kv["page_tokens"] == 64
    assert kv["budget_pages"] == {"anchor": 2, "text": 17, "audio": 2, "video": 2, "reply": 2}
    timed = dict.fromkeys(CLASS_NAMES, 0) | dict.fromkeys(TIMED, 2)
    assert kv["pages"] == kv["pages_most"] == timed
    assert kv["pages_dropped"] == dict.fromkeys(CLASS_NAMES, 0) | dict.fromkeys(TIMED, 4)


def test_the_trace_counts_pages(rolled: tuple[dict, Path]) -> None:
    events = json.loads((rolled[1] / "trace.json").read_text())["traceEvents"]
    held = [event["args"] for event in events if event["name"] == "pages held"]
    assert {event["ph"] for event in events if event["name"] == "pages held"} == {"C"}
    assert [args["audio"] for args in held] == [1, 2]  # it says so when something changes
    dropped = [event["args"] for event in events if event["name"] == "pages dropped"]
    totals = {name: sum(args[name] for args in dropped) for name in CLASS_NAMES}
    assert totals == rolled[0]["kv"]["pages_dropped"]


def test_the_timeline_shows_each_kind_of_page(rolled: tuple[dict, Path]) -> None:
    picture = np.asarray(Image.open(rolled[1] / "timeline.png").convert("RGB"), dtype=int)
    below = picture[-picture.shape[0] // 4 :]
    for name in TIMED:
        rgb = np.array([int(CLASSES[name][i : i + 2], 16) for i in (1, 3, 5)])
        shown = 255 - 0.75 * (255 - rgb)
        plateau = (np.abs(below - shown).max(axis=2) <= 3).sum(axis=1)
        assert (plateau > 0.7 * picture.shape[1]).sum() >= 10, name


def test_the_live_lines_say_what_is_held(
    talk: Path, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live.LineView, "EVERY_S", 0.0)
    shown = io.StringIO()
    asked = {"audio": str(talk), "video": str(film), "realtime": False, "seconds": 0.4}
    run_demo(Options(**asked, out=tmp_path), shown)
    assert "holds 1 audio, 1 video, 1 reply pages, 0 dropped" in shown.getvalue()
    assert live.memory_line([0] * 5, [0] * 5) == "holds no pages, 0 dropped"
