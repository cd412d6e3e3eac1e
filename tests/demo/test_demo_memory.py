"""How long things are kept: the options, the budget, a run that rolls, and the picture of it."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tml_runtime import cli
from tml_runtime.demo import live
from tml_runtime.demo.memory import LANES, LOCAL, PROMPT, simulate_memory
from tml_runtime.demo.memory_plot import draw_memory
from tml_runtime.demo.prepare import MODELS, TIMED, Options, make_budget
from tml_runtime.demo.report import kv_report
from tml_runtime.demo.run import run_demo
from tml_runtime.demo.timeline import CLASSES
from tml_runtime.metrics import CLASS_NAMES
from tml_runtime.model import KvBudget, ModelConfig

ROOT = Path(__file__).parents[2]
ROLLS = {"preset": "tiny", "keep": 3.0, "keep_video": 1.0, "seconds": 18.0}


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
    options = Options(**{"preset": "tiny", **changed})
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


def test_what_is_kept_lies_within_what_the_report_says() -> None:
    """Of every preset and of odd seconds, after every tick of a session that rolls."""
    for preset in MODELS:
        for seconds in np.arange(40.0, 43.2, 0.2):
            options = Options(preset=preset, keep=4.5, keep_video=1.3, seconds=float(seconds))
            memory, config = simulate_memory(options), ModelConfig.preset(preset)
            told: dict[str, Any] = dict.fromkeys(("kv_pages", "kv_pages_most", "kv_pages_dropped"))
            kept_s = kv_report(options, config, told)["kept_s"]
            at_s = np.linspace(0, memory.seconds, len(memory.start_N))
            for name in TIMED:
                low, high = kept_s[name]
                oldest = memory.held[name][0].position_T[0]
                kept = memory.seconds - float(np.interp(oldest, memory.start_N, at_s))
                assert options.keep_s(name) <= low
                assert low - 0.2 <= kept <= high + 0.2  # a page may begin within a tick
                assert memory.dropped[name]


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
    asked["preset"] = "tiny"
    run_demo(Options(**asked, out=tmp_path), shown)
    assert "holds 1 audio, 1 video, 1 reply pages, 0 dropped" in shown.getvalue()
    assert live.memory_line([0] * 5, [0] * 5) == "holds no pages, 0 dropped"


@pytest.mark.parametrize("preset", ["tiny", "slice"])
def test_every_page_is_held_or_dropped(preset: str) -> None:
    memory = simulate_memory(Options(preset=preset, seconds=60.0, keep=2.0))
    everything = np.arange(memory.length)
    pages = {lane: [*memory.dropped[lane], *memory.held[lane]] for lane in LANES}
    by_class = [page.position_T for lane in CLASS_NAMES for page in pages[lane]]
    assert (np.sort(np.concatenate(by_class)) == everything).all()
    local = np.concatenate([page.position_T for page in pages[LOCAL]])
    assert (local == everything).all()
    for lane in LANES:
        for before, after in zip(pages[lane], pages[lane][1:], strict=False):
            assert before.position_T[-1] < after.position_T[0]
        assert all(len(page.position_T) <= 64 for page in pages[lane])
        assert sum(page.is_open for page in memory.held[lane]) <= 1
        assert not any(page.is_open for page in memory.dropped[lane][:-1])
    assert [len(page.position_T) for page in memory.held["anchor"]] == [PROMPT]
    assert not memory.dropped["anchor"]
    for name in TIMED:
        assert len(memory.held[name]) == memory.budget[name]
    newest = np.concatenate([page.position_T for page in memory.held[LOCAL]])
    assert newest[0] <= memory.length - memory.window - memory.rewind


def test_ten_minutes_take_no_more_than_eight() -> None:
    eight, ten = (
        simulate_memory(Options(preset="tiny", seconds=60.0 * n, keep=3.0)) for n in (8, 10)
    )
    assert [len(eight.held[lane]) for lane in LANES] == [len(ten.held[lane]) for lane in LANES]
    assert ten.length > eight.length
    assert all(len(ten.dropped[name]) > len(eight.dropped[name]) for name in TIMED)


def test_the_picture_is_drawn_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "out", tmp_path / "new" / "session.png"
    asked = ["demo", "--preset", "tiny", "--seconds", "20", "--keep", "2", "--out", str(out)]
    assert cli.main([*asked, "--draw-memory", str(picture)]) == 0
    assert capsys.readouterr().out == f"wrote {picture}\n"
    assert not out.exists()  # nothing was played
    again = tmp_path / "again.png"
    draw_memory(again, Options(preset="tiny", seconds=20.0, keep=2.0))
    assert picture.read_bytes() == again.read_bytes()
    shown = np.asarray(Image.open(picture).convert("RGB"), dtype=int)
    assert shown.shape[1] == 1200
    for name in TIMED:
        rgb = [int(CLASSES[name][i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(shown - rgb).max(axis=2) <= 2).sum() > 200, name


@pytest.mark.parametrize("name", ["session.svg", "session.foo", "session"])
def test_whatever_it_is_called_the_picture_is_a_png(name: str, tmp_path: Path) -> None:
    draw_memory(tmp_path / name, Options(seconds=0.2))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert Image.open(tmp_path / name).format == "PNG"


@pytest.mark.parametrize("seconds", [0.2, 30.1], ids=str)
def test_a_short_session_is_drawn_too(seconds: float, tmp_path: Path) -> None:
    draw_memory(tmp_path / "session.png", Options(seconds=seconds))
    assert Image.open(tmp_path / "session.png").size[0] == 1200


def test_the_picture_in_docs_is_of_ten_minutes() -> None:
    memory = simulate_memory(Options(preset="tiny", seconds=600.0))
    text = (ROOT / "docs" / "design.md").read_text()
    held = sum(len(page.position_T) for lane in CLASS_NAMES for page in memory.held[lane])
    assert f"{memory.length:,} tokens" in text
    assert f"{held:,}" in text
    assert math.isclose(memory.seconds, 600.0)
