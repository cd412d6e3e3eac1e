"""`bench interaction` with a scripted model, whose answers are known, on the virtual clock."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cue_media import made_footage, made_speech
from interaction_actor import Actor, LevelVocoder, Script, changed, late, perfect, silent
from real_speech import real_speech

from bench import interaction, interaction_voice
from bench.__main__ import main
from bench.interaction import measure
from bench.interaction_report import name, plots, show
from bench.interaction_run import DIRECT, Condition, held_out_episodes, play, profile
from bench.interaction_score import METRICS, figures
from bench.interaction_take import PERIOD_S, REST
from tml_runtime import errors
from tml_runtime.demo.cue import recordings
from tml_runtime.demo.cue.evaluate import live_through
from tml_runtime.demo.cue.report import weights_digest
from tml_runtime.demo.cue.stage import Episode
from tml_runtime.demo.cue.tasks import TASKS
from tml_runtime.demo.cue.trainer import Trainer
from tml_runtime.demo.cue.words import CONFIG, ID, WORDS
from tml_runtime.model import InteractionModel

MEDIA = made_speech(1), made_footage(1)
OPTIONS: dict[str, Any] = {"vocoder": LevelVocoder}
DEFAULT = Condition()


def episodes(*tasks: str, each: int = 2, ticks: int = 60) -> list[Episode]:
    return held_out_episodes(each, ticks, *MEDIA, tasks)


def scored(
    made: Sequence[Episode],
    script: Callable[[Episode], Script] = perfect,
    condition: Condition = DEFAULT,
) -> dict[str, Any]:
    actor: Any = Actor(script(episode) for episode in made)
    played = play(actor, made, condition, MEDIA, **OPTIONS)
    assert played.faults == [] and len(played.takes) == len(made)
    return figures(played.takes, on_grid=condition.line == DIRECT)


# Answers that are known


@pytest.fixture(scope="module")
def right() -> dict[str, Any]:
    return scored(held_out_episodes(1, 60, real_speech(), MEDIA[1], list(TASKS)))


def test_who_says_what_is_due_has_every_point(right: dict[str, Any]) -> None:
    ones = (
        "takeover_rate", "yield_rate", "held_rate", "count_off_by_one", "time_set_accuracy",
        "cue_set_accuracy", "exact_tick", "alert_hit", "alert_precision", "pauc", "speech_iou",
    )  # fmt: skip
    assert {name: right[name] for name in ones} == dict.fromkeys(ones, pytest.approx(1.0))
    zeros = ("false_takeover_rate", "false_alarms_per_minute", "count_nmae")
    assert {name: right[name] for name in zeros} == dict.fromkeys(zeros, 0.0)
    assert right["backchannel_rate_hz"] == pytest.approx(right["backchannel_due_hz"])
    assert right["takeover_latency_s"] == pytest.approx(PERIOD_S)  # the request's own tick
    assert min(right["of"].values()) > 0


def test_a_perfect_answer_reacts_within_the_floor(right: dict[str, Any]) -> None:
    for q in ("p50", "p95", "p99"):
        assert right[f"reaction_{q}_s"] == pytest.approx(right[f"floor_{q}_s"])
    assert 0.0 < right["floor_p50_s"] <= PERIOD_S


def test_who_says_nothing_has_what_silence_has() -> None:
    got = scored(episodes(*TASKS, each=1), silent)
    zeros = (
        "takeover_rate", "held_rate", "time_set_accuracy", "cue_set_accuracy", "alert_hit",
        "speech_iou", "backchannel_rate_hz", "false_alarms_per_minute", "false_takeover_rate",
    )  # fmt: skip
    assert {name: got[name] for name in zeros} == dict.fromkeys(zeros, 0.0)
    assert got["yield_rate"] == 1.0 and got["backchannel_divergence"] == 1.0
    assert got["pauc"] == pytest.approx(0.25)
    nones = ("stop_latency_s", "alert_precision", "reaction_p50_s", "takeover_latency_s")
    assert {name: got[name] for name in nones} == dict.fromkeys(nones)
    true = [e.word for made in episodes(*TASKS, each=1) for e in made.events if e.kind == "count"]
    assert got["count_nmae"] == pytest.approx(np.mean([n / (n + 0.1) for n in true]))


def test_a_tick_late_is_in_time_and_not_exact() -> None:
    right_, late_ = (scored(episodes("cue"), script) for script in (perfect, late(1)))
    assert (late_["cue_set_accuracy"], late_["exact_tick"]) == (1.0, 0.0)
    assert late_["reaction_p50_s"] == pytest.approx(right_["reaction_p50_s"] + PERIOD_S)
    assert late_["floor_p50_s"] == pytest.approx(right_["floor_p50_s"])
    assert 0.0 < late_["backchannel_divergence"] < 1.0


def test_three_ticks_late_is_too_late() -> None:
    got = scored(episodes("cue", "count_flash"), late(3))
    assert got["cue_set_accuracy"] < 0.5 and got["alert_hit"] < 0.5
    assert 0.25 < got["pauc"] < 1.0  # told late is better than not at all


def test_the_wrong_word_at_the_right_time_earns_nothing() -> None:
    got = scored(episodes("wait_flash"), changed("now", "do"))
    assert got["time_set_accuracy"] == got["pauc"] == 0.0
    assert got["alert_hit"] == got["alert_precision"] == 1.0  # it told, and it told nonsense


def test_who_does_not_stop_does_not_yield_and_overlaps_longer() -> None:
    made = held_out_episodes(2, 60, real_speech(), MEDIA[1], ["speak"])
    goes_on = lambda episode: [[ID["do"]]] * len(episode)  # noqa: E731
    right_, got = scored(made), scored(made, goes_on)
    assert got["of"]["interruptions"] > 0
    assert (got["yield_rate"], got["held_rate"]) == (0.0, 1.0)
    assert got["stop_latency_s"] > right_["stop_latency_s"] > PERIOD_S
    assert got["response_latency_s"] is None and right_["response_latency_s"] is not None


def test_who_stops_at_every_noise_holds_none() -> None:
    made = episodes("speak")

    def timid(episode: Episode) -> list[list[int]]:
        said = perfect(episode)
        for event in episode.events:
            if event.kind == "backchannel":
                said[event.tick : event.tick + 4] = [[], [ID["<yield>"]], [], []]
        return said

    assert scored(made, timid)["held_rate"] == 0.0


def test_who_talks_all_the_time_takes_the_turn_and_gives_alarms() -> None:
    got = scored(episodes("cue"), lambda episode: [[ID["yes"]]] * len(episode))
    assert got["false_takeover_rate"] == 1.0 and got["backchannel_rate_hz"] == 0.0
    assert got["false_alarms_per_minute"] > 100


def test_counts_that_are_one_off() -> None:
    made = episodes("count_tone", each=3)

    def short_of_one(episode: Episode) -> list[list[int]]:
        said = perfect(episode)
        said[max(tick for tick, words in enumerate(said) if words)] = []
        return said

    got = scored(made, short_of_one)
    true = [e.word for episode in made for e in episode.events if e.kind == "count"]
    assert got["count_off_by_one"] == 1.0
    assert got["count_nmae"] == pytest.approx(np.mean([1 / (n + 0.1) for n in true]))


def test_without_takes_nothing_is_known() -> None:
    got = figures([], on_grid=True)
    assert {got[metric.name] for metric in METRICS} == {None}
    assert set(got["of"].values()) == {0}


# Lines, sessions, age


def test_without_a_line_a_session_says_what_the_model_does_tick_by_tick() -> None:
    model = InteractionModel.random(CONFIG, seed=1)
    made = episodes("count_tone", each=1, ticks=24)
    (said_T_K,) = live_through(model, made)
    (take,) = play(model, made, Condition(), MEDIA, **OPTIONS).takes
    quiet = (CONFIG.vocab.silence, CONFIG.vocab.missing)
    step_s = PERIOD_S / CONFIG.layout.num_steps
    wanted = [
        (PERIOD_S + step * step_s, WORDS[token])
        for step, token in enumerate(said_T_K.flatten().tolist())
        if token not in quiet
    ]
    heard = [word for word in take.words if word.start < (24 + 1) * PERIOD_S - 1e-6]
    assert [word.text for word in heard] == [text for _, text in wanted]
    assert [word.start for word in heard] == pytest.approx([t for t, _ in wanted])


@pytest.mark.parametrize("line", ["clean", "loss5", "outage", "jitter50", "rate300", "4g"])
def test_over_any_line_every_episode_is_heard_and_scored(line: str) -> None:
    made = episodes("cue", "speak", each=1, ticks=40)
    actor: Any = Actor(perfect(episode) for episode in made)
    played = play(actor, made, Condition(line), MEDIA, **OPTIONS)
    assert [take.episode for take in played.takes] == made and played.faults == []
    assert played.windows >= 2 * 40
    assert all(take.words for take in played.takes)
    got = figures(played.takes, on_grid=False)
    assert got["exact_tick"] is None and got["cue_set_accuracy"] is not None


def test_a_good_line_costs_what_its_buffer_holds() -> None:
    assert heard_at(DIRECT) == pytest.approx(2.0)
    assert 2.02 < heard_at("clean") < 2.2  # the line's 10 ms, and the buffer's 80 at the start


def heard_at(line: str) -> float:
    """When a model hears what is loud from the second second of an episode on, for two ticks."""
    (made,) = episodes("speak", each=1, ticks=24)
    pcm_T_W = np.zeros_like(made.pcm_T_W)
    pcm_T_W[10:12] = 0.5
    actor: Any = Ears()
    (take,) = play(actor, [replace(made, pcm_T_W=pcm_T_W)], Condition(line), MEDIA, **OPTIONS).takes
    assert take.words == []
    first = next(tick for tick, level in enumerate(actor.levels) if level > 1.0)
    return (first + 1 - actor.levels[first] / max(actor.levels)) * PERIOD_S


class Ears(Actor):
    """Says nothing, and notes how much it hears in each tick."""

    def __init__(self) -> None:
        super().__init__([[]])
        self.levels: list[float] = []

    def tick(self, state: Any, tick: Any) -> Any:
        self.levels.append(float(tick.pcm_S_W.abs().sum()))
        return super().tick(state, tick)


def test_sessions_side_by_side_say_what_each_says_alone() -> None:
    made = episodes("cue", "count_tone", "speak", each=2, ticks=30)
    alone = scored(made)
    together = scored(made, condition=Condition(sessions=4))
    assert together == alone


def test_a_session_of_age_is_measured_where_its_episodes_are() -> None:
    made = episodes("cue", each=2, ticks=24)
    condition = Condition(minutes=1)
    ageing = -(-60 // (65 * PERIOD_S))
    script = [[]] * int(ageing * 65) + perfect(made[0]) + [[]] * (REST + 7 * 65) + perfect(made[1])
    actor: Any = Actor([script])
    played = play(actor, made, condition, MEDIA, **OPTIONS)
    assert [take.episode for take in played.takes] == made
    got = figures(played.takes, on_grid=True)
    assert got["exact_tick"] == 1.0 and got["false_alarms_per_minute"] == 0.0


def test_two_runs_are_the_same() -> None:
    made = episodes("cue", each=1, ticks=30)
    first, again = (scored(made, condition=Condition("loss5", 2)) for _ in range(2))
    assert first == again


def test_an_unknown_line_is_refused() -> None:
    assert profile(DIRECT) is None
    with pytest.raises(errors.InputValueError, match="'adsl'"):
        profile("adsl")


# The command


def test_a_random_model_is_measured_without_a_crash() -> None:
    model = InteractionModel.random(CONFIG, seed=1)
    rows = measure(model, MEDIA, ["cue"], [Condition("loss5")], 1, 24)
    assert [row["error"] for row in rows] == [None] * 2
    json.dumps(rows, allow_nan=False)


def test_a_condition_that_fails_is_a_row_that_says_why() -> None:
    actor: Any = Actor([])  # no script for anybody
    rows = measure(actor, MEDIA, ["cue"], [Condition()], 1, 24, **OPTIONS)
    assert [row["error"].split(":")[0] for row in rows] == ["LoopFailed"] * 2


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a model that was trained on other recordings."""
    speech, footage = made_speech(0), made_footage(0)
    Trainer(0, speech, footage).save_weights(tmp_path)
    report = {"trained_on": {**speech.hashes, **footage.hashes}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    monkeypatch.setattr(recordings, "held_out_media", lambda: MEDIA)
    return tmp_path


def test_the_command_measures_a_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["interaction", "--checkpoint", str(folder), "--episodes", "1", "--ticks", "24"]
    asked += ["--tasks", "cue", "--no-baseline", "--json", str(folder / "out.json")]
    assert main(asked) == 0
    result = json.loads((folder / "out.json").read_text())
    assert result["kind"] == "interaction" and [name(row) for row in result["rows"]] == ["direct"]
    assert result["measured_with"] == {**MEDIA[0].hashes, **MEDIA[1].hashes}
    assert result["weights"] == weights_digest(folder)
    assert result["voice_detector"].startswith("silero-vad 6.")
    assert show(result) in capsys.readouterr().out


def test_the_table_and_the_plots(tmp_path: Path) -> None:
    made = episodes("cue", "count_flash", each=1, ticks=24)
    actor: Any = Actor([*map(perfect, made)] * 3)
    conditions = [Condition(), Condition("clean", 2)]
    rows = measure(actor, MEDIA, ["cue", "count_flash"], conditions, 1, 24, **OPTIONS)
    assert [name(row) for row in rows] == ["direct", "clean x2", "turn by turn"]
    rows.append({**rows[0], "line": "outage", "error": "LoopFailed: why"})
    about = {"weights": "random", "device": "cpu", "episodes": 1, "ticks": 24, "period_ms": 200}
    result = {**about, "tasks": ["cue", "count_flash"], "rows": rows}
    shown = show(result)
    assert all(metric.name in shown for metric in METRICS)
    assert "synthetic twins" in shown and "outage: not measured: LoopFailed: why" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("cue_set_accuracy")]
    assert line.split()[:4] == ["cue_set_accuracy", "more", "100.0", "%"]
    many = show({**result, "rows": [*rows[:2] * 4, rows[2]]})
    heads = [line for line in many.splitlines() if line.startswith("metric ")]
    assert [line.count("direct") for line in heads] == [3, 1]  # six conditions in a table
    assert all(line.endswith("turn by turn") for line in heads)
    drawn = {path.stem for path in plots(tmp_path, result)}
    assert drawn == {path.stem for path in tmp_path.glob("*.png")}
    assert {"cue_set_accuracy", "count_nmae", "reaction_p50_s"} <= drawn
    assert "held_rate" not in drawn  # nobody was to be heard out


def test_a_model_that_knows_the_recordings_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recordings, "held_out_media", lambda: (made_speech(0), MEDIA[1]))
    with pytest.raises(SystemExit, match="made-0, which the model was trained on"):
        main(["interaction", "--checkpoint", str(folder)])


def test_a_checkpoint_without_a_report_is_refused(folder: Path) -> None:
    (folder / "report.json").unlink()
    with pytest.raises(SystemExit, match="nobody knows what the model was trained on"):
        main(["interaction", "--checkpoint", str(folder)])


def test_without_the_detector_it_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    interaction_voice._package.cache_clear()
    interaction_voice._network.cache_clear()
    with pytest.raises(SystemExit, match=r'pip install "tml-kernels\[bench\]"'):
        main(["interaction", "--checkpoint", str(folder)])


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (["--tasks", "cue,sing"], "'sing' is not one of wait_tone"),
        (["--line", "adsl"], "'adsl' is not one of"),
        (["--sessions", "0"], "'0' is not a number in 1..4096"),
        (["--minutes", "1,x"], "'x' is not a number"),
        (["--ticks", "23"], "24 at least"),
    ],
)
def test_wrong_arguments_are_named(wrong: list[str], what: str) -> None:
    with pytest.raises(SystemExit, match=what):
        main(["interaction", *wrong])


def test_lists_are_products() -> None:
    parser = argparse.ArgumentParser()
    interaction.add_arguments(parser)
    args = parser.parse_args(["--line", "direct,loss2", "--sessions", "1,4", "--minutes", "0,1"])
    assert len(interaction._conditions(args)) == 8
