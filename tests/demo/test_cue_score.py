"""What the figures of the `cue` model mean, and that they cannot be had for recordings it knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cue_media import made_footage, made_speech

from tml_runtime.demo import train as command
from tml_runtime.demo.cue import evaluate as evaluation
from tml_runtime.demo.cue import report as reports
from tml_runtime.demo.cue.evaluate import (
    NotHeldOut,
    check_held_out,
    evaluate,
    live_through,
)
from tml_runtime.demo.cue.report import read_report, target_rows, training_report, write_report
from tml_runtime.demo.cue.score import Score, score, transcript
from tml_runtime.demo.cue.stage import Episode, Event
from tml_runtime.demo.cue.tasks import TASKS, make_episode
from tml_runtime.demo.cue.trainer import Trainer
from tml_runtime.demo.cue.words import CONFIG, ID
from tml_runtime.model import InteractionModel

MEDIA = made_speech(1), made_footage(1)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """One task, of 24 ticks."""
    monkeypatch.setattr(evaluation, "SHORT", 24)
    monkeypatch.setattr(evaluation, "TASKS", {"speak": TASKS["speak"]})


def said(num_ticks: int, **words: str | list[str]) -> np.ndarray:
    """t7="now": that word in the first step of tick 7."""
    said_T_K = np.zeros((num_ticks, 4), np.int32)
    for tick, names in words.items():
        for k, name in enumerate([names] if isinstance(names, str) else names):
            said_T_K[int(tick[1:]), k] = ID[name]
    return said_T_K


def episode(num_ticks: int, *events: Event, read: dict[int, str] | None = None) -> Episode:
    said_T = np.zeros(num_ticks, np.int64)
    for event in events:
        if event.kind == "due":
            said_T[event.tick] = event.word
    text: list[tuple[int, ...]] = [()] * num_ticks
    for tick, word in (read or {}).items():
        text[tick] = (ID[word],)
    return Episode(
        task="made",
        pcm_T_W=np.zeros((num_ticks, 3200), np.float32),
        frames_T_2_Y_Y_3=np.zeros((num_ticks, 2, 40, 40, 3), np.uint8),
        seen_T=np.ones(num_ticks, bool),
        missing_T=np.zeros(num_ticks, bool),
        text=tuple(text),
        said_T=said_T,
        events=tuple(events),
        speech_T=np.ones(num_ticks, bool),
    )


def due(tick: int, word: str) -> Event:
    return Event("due", tick, ID[word])


@pytest.mark.parametrize("task", TASKS)
def test_who_says_what_is_due_has_every_point(task: str) -> None:
    made = make_episode(task, 80, 5, *MEDIA)
    told = np.zeros((80, 4), np.int32)
    told[:, 0] = made.said_T
    rows = score([(made, told)]).rows()
    shares = {name: value for name, value in rows.items() if name.endswith("_percent")}
    assert shares and set(shares.values()) == {100.0}
    assert rows["extra_words_a_minute"] == 0
    assert rows["minutes"] == round(80 / 300, 2)


def test_who_says_nothing_has_none_but_for_yielding() -> None:
    made = [make_episode(task, 80, 5, *MEDIA) for task in ("wait_tone", "speak", "count_tone")]
    total = score((one, np.zeros((80, 4), np.int32)) for one in made)
    assert (total.exact.hits, total.held.hits, total.near.hits) == (0, 0, 0)
    assert total.yielded.rate == 1.0 and total.extra == 0


def test_a_tick_late_is_soon_and_not_exact_and_counts_as_an_extra_word() -> None:
    total = score([(episode(10, due(4, "now")), said(10, t5="now"))])
    assert (total.exact.rate, total.soon.rate, total.extra) == (0.0, 1.0, 1)
    early = score([(episode(10, due(4, "now")), said(10, t3="now"))])
    assert (early.exact.rate, early.soon.rate, early.extra) == (0.0, 0.0, 1)
    twice = score([(episode(10, due(4, "now")), said(10, t4=["now", "yes"]))])
    assert (twice.exact.rate, twice.extra) == (1.0, 1)


def test_false_alarms_are_counted_over_the_time_that_somebody_talks() -> None:
    heard = said(300, t4="yes", t5="yes", t100="yes", t101="tick")
    total = score([(episode(300, due(4, "yes")), heard)])
    assert (total.false_yes, total.extra, total.talking) == (1, 3, 1.0)
    assert total.rows()["false_yes_a_minute_of_speech"] == 1.0


def test_yielding_is_silence_from_the_second_tick_on_until_it_is_asked_again() -> None:
    cut = episode(20, Event("interruption", 5), read={12: "speak"})
    good = said(20, t5="do", t6="re", t12="do", t13="re")
    assert score([(cut, good)]).yielded.rate == 1.0
    for tick in ("t7", "t11"):
        late = said(20, t5="do", **{tick: "mi"})
        assert score([(cut, late)]).yielded.rate == 0.0


def test_a_backchannel_is_held_by_three_ticks_of_speech() -> None:
    spoken = episode(20, Event("backchannel", 5))
    assert score([(spoken, said(20, t5="do", t6="re", t7="mi"))]).held.rate == 1.0
    assert score([(spoken, said(20, t5="do", t7="mi"))]).held.rate == 0.0
    assert score([(spoken, said(20, t5="do", t6="<yield>", t7="mi"))]).held.rate == 0.0


@pytest.mark.parametrize(("last", "counted", "near"), [(3, 1, 1), (4, 0, 1), (5, 0, 0), (0, 0, 0)])
def test_the_last_number_is_the_count(last: int, counted: int, near: int) -> None:
    names = ["zero", "one", "two", "three", "four", "five"]
    words = {f"t{n}": names[n] for n in range(1, last + 1)}
    total = score([(episode(20, Event("count", 19, 3)), said(20, **words))])
    assert (total.counted.hits, total.near.hits) == (counted, near)


def test_without_episodes_there_are_no_figures() -> None:
    assert Score().rows() == {"extra_words_a_minute": None, "minutes": 0.0}


def test_a_transcript() -> None:
    assert transcript(said(9, t2="now", t4=["do", "<yield>"])) == "2 now, 4 do, 4 <yield>"


def test_a_session_lives_the_same_alone_and_among_others() -> None:
    model = InteractionModel.random(CONFIG, seed=1)
    made = [make_episode(task, 24, 7, *MEDIA, lose=0.1) for task in ("count_flash", "ask")]
    together = live_through(model, made)
    (alone,) = live_through(model, made[1:])
    np.testing.assert_array_equal(alone, together[1])


def test_a_recording_that_was_trained_on_is_refused() -> None:
    trained = {**made_speech(2).hashes, **made_footage(2).hashes}
    check_held_out(trained, *MEDIA)
    with pytest.raises(NotHeldOut, match="made-2 is made-2, which the model was trained on"):
        check_held_out(trained, made_speech(2), MEDIA[1])
    with pytest.raises(NotHeldOut, match="clip-2 is other"):
        check_held_out({"other": trained["clip-2"]}, MEDIA[0], made_footage(2))


def test_the_command_measures_and_refuses_a_model_that_knows_the_recordings(
    brief: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(0, made_speech(0), made_footage(0))
    trainer.save_weights(tmp_path)
    write_report(tmp_path, training_report(trainer, {"cue": 1.0}))
    asked = ["--out", str(tmp_path), "--evaluate", "--episodes", "1", "--long-episodes", "0"]
    asked += ["--workers", "1"]

    monkeypatch.setattr(command, "held_out_media", lambda: (made_speech(0), made_footage(1)))
    assert command.main(asked) == 1
    assert "made-0, which the model was trained on" in capsys.readouterr().err
    assert "figures" not in read_report(tmp_path)

    monkeypatch.setattr(command, "held_out_media", lambda: MEDIA)
    assert command.main(asked) == 0
    report = read_report(tmp_path)
    assert report["measured_with"] == {**MEDIA[0].hashes, **MEDIA[1].hashes}
    assert [list(report["figures"][kind]) for kind in ("clean", "lossy", "long")] == [
        ["speak"],
        ["speak"],
        [],
    ]
    assert report["weights_sha256"] == reports.weights_digest(tmp_path)
    rows = target_rows(report["figures"])
    shown = capsys.readouterr().out
    assert rows and all((what in shown) for what, *_ in rows)
    text = (tmp_path / reports.TEXT).read_text()
    assert all(
        f"| {value:g} | {'yes' if reached else 'NO'} |" in text for _, value, _, reached in rows
    )
    again = evaluate(tmp_path, *MEDIA, episodes=1, workers=2)  # each with a process of its own
    assert again == report["figures"]
