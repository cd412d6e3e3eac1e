"""Training: it lowers the loss, goes on where it was stopped, and refuses what is not its own."""

from __future__ import annotations

import json
import multiprocessing
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cue_media import made_footage, made_speech
from torch import Tensor

from tml_kernels._tensor_file import TensorFile, write_tensor_file
from tml_kernels.testing import assert_bitwise
from tml_runtime.demo import train as command
from tml_runtime.demo.cue import loss as lost
from tml_runtime.demo.cue import share
from tml_runtime.demo.cue.batch import make_batch
from tml_runtime.demo.cue.lessons import LESSONS, draw_episodes, draw_tasks, lesson_at
from tml_runtime.demo.cue.loss import Loss, speech_loss
from tml_runtime.demo.cue.optimiser import Optimiser, halves, leaves, orthogonal, schedule
from tml_runtime.demo.cue.report import REPORT, TEXT, ReportError, read_report
from tml_runtime.demo.cue.share import WorkerEnded, Workers
from tml_runtime.demo.cue.tasks import TASKS, make_episode
from tml_runtime.demo.cue.trainer import STATE, STEPS, WEIGHTS, Trainer, TrainingError, new_weights
from tml_runtime.demo.cue.words import CONFIG, ID, SILENT_LEVEL
from tml_runtime.model import InteractionModel

MEDIA = made_speech(), made_footage()


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short episode a share, each of a task of its own; one lesson: others weigh words anew."""

    def draw(key: Sequence[int], lesson: object, losses: object, *media: object) -> list:
        return [make_episode(("speak", "every")[key[2]], 24, np.random.SeedSequence(key), *media)]  # type: ignore

    monkeypatch.setattr(share, "draw_episodes", draw)
    monkeypatch.setattr(share, "lesson_at", lambda done: LESSONS[0])
    monkeypatch.setattr(command, "training_media", lambda: MEDIA)


def test_twenty_steps_lower_the_loss_and_a_run_that_goes_on_ends_bitwise_the_same(
    tmp_path: Path,
) -> None:
    whole = Trainer(0, *MEDIA)
    whole.num_steps = 20
    losses = run_steps(whole, 11)
    whole.save(tmp_path)
    losses += run_steps(whole, 9)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:4])
    gone_on = Trainer(0, *MEDIA)
    assert gone_on.resume(tmp_path)
    assert (gone_on.step, gone_on.num_steps) == (11, 20)
    assert gone_on.losses["speak"] != 1.0 == gone_on.losses["ask"]
    run_steps(gone_on, 9)
    assert_same_run(gone_on, whole)
    assert losses[0] != losses[2]  # no episode comes twice


def test_halves_take_about_as_long_to_move() -> None:
    weights = dict(leaves(new_weights(0)))
    one, other = halves(weights)
    assert {**one, **other}.keys() == weights.keys() and not one.keys() & other.keys()
    sizes = [sum(weight.numel() for weight in half.values()) for half in (one, other)]
    assert 0.8 < sizes[0] / sizes[1] < 1.25


def test_two_processes_give_the_bits_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share, "draw_episodes", draw_episodes)  # what the other process has
    monkeypatch.setattr(share, "lesson_at", lesson_at)
    one, two = Trainer(0, *MEDIA), Trainer(0, *MEDIA)
    assert run_steps(one, 2, num_workers=1) == run_steps(two, 2, num_workers=2)
    assert_same_run(two, one)
    assert not multiprocessing.active_children()


def test_a_process_that_is_gone_ends_the_run_with_a_word_on_it() -> None:
    run = Trainer(0, *MEDIA)
    with run.workers(2) as workers, pytest.raises(WorkerEnded, match="goes on"):
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        run.run_step(workers)


def run_steps(run: Trainer, num_steps: int, num_workers: int = 1) -> list[float]:
    with run.workers(num_workers) as workers:
        return [sum(loss.total for loss in run.run_step(workers)) for _ in range(num_steps)]


def assert_same_run(run: Trainer, other: Trainer) -> None:
    for name, tensor in other.leaves.items():
        assert_bitwise(run.leaves[name].detach(), tensor.detach())
    assert run.losses == other.losses


def test_a_checkpoint_is_the_model_that_was_trained(tmp_path: Path) -> None:
    made = Trainer(5, *MEDIA)
    made.save_weights(tmp_path)
    model = InteractionModel.load(tmp_path, config=CONFIG)
    assert model.report.random == ()
    for (_, loaded), own in zip(leaves(model.weights), made.leaves.values(), strict=True):
        assert_bitwise(loaded, own.detach())
    assert (tmp_path / WEIGHTS).stat().st_size < 12e6


def test_the_state_of_another_run_is_refused_and_stays(tmp_path: Path) -> None:
    assert not Trainer(0, *MEDIA).resume(tmp_path)
    Trainer(0, *MEDIA).save(tmp_path)
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(TrainingError, match="of a run with seed=0, not 1"):
        Trainer(1, *MEDIA).resume(tmp_path)
    with pytest.raises(TrainingError, match="of a run with speech="):
        Trainer(0, made_speech(9), MEDIA[1]).resume(tmp_path)
    assert (tmp_path / STATE).read_bytes() == before
    for damaged in (b"", before[:1000], b"x" * 5000):
        (tmp_path / STATE).write_bytes(damaged)
        with pytest.raises(TrainingError):
            Trainer(0, *MEDIA).resume(tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda about: None,
        lambda about: "{",
        lambda about: "[" * 100_000,
        lambda about: "[]",
        lambda about: json.dumps({name: x for name, x in about.items() if name != "step"}),
        lambda about: json.dumps(about | {"num_steps": "many"}),
        lambda about: json.dumps(about | {"losses": {}}),
    ],
    ids=("none", "cut", "deep", "list", "no step", "no number", "no losses"),
)
def test_a_state_that_says_nothing_sensible_of_itself_is_refused(
    edit: Callable[[dict[str, Any]], str | None], tmp_path: Path
) -> None:
    Trainer(0, *MEDIA).save(tmp_path)
    file = TensorFile(tmp_path / STATE)
    about = edit(json.loads(file.metadata["about"]))
    tensors = [(name, file.tensor(name).clone()) for name in file.entries]
    write_tensor_file(tmp_path / STATE, tensors, None if about is None else {"about": about})
    run = Trainer(0, *MEDIA)
    with pytest.raises(TrainingError, match="delete it to begin anew"):
        run.resume(tmp_path)
    assert (run.step, run.num_steps) == (0, STEPS)


@pytest.mark.parametrize("part", ["", ".mean", ".square"])
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        # It would be taken for all of them.
        (lambda x: x[:1], r"torch\.float32 \[1\], not torch\.float32 \[\d+\]"),
        (lambda x: x[:-1], r"torch\.float32 \[\d+\], not torch\.float32 \[\d+\]"),
        (lambda x: x[None], r"torch\.float32 \[1, \d+\], not torch\.float32 \[\d+\]"),
        (lambda x: x.bfloat16(), r"torch\.bfloat16 \[\d+\], not torch\.float32 \[\d+\]"),
    ],
    ids=("one", "short", "deep", "bfloat16"),
)
def test_a_state_with_a_tensor_of_another_shape_is_refused_by_its_name(
    edit: Callable[[Tensor], Tensor], words: str, part: str, tmp_path: Path
) -> None:
    run = Trainer(0, *MEDIA)
    run.save(tmp_path)
    before = {name: tensor.clone() for name, tensor in run.leaves.items()}
    file, wrong = TensorFile(tmp_path / STATE), f"flow.output_bias_B{part}"
    assert wrong in file.entries
    tensors = {name: file.tensor(name) + 1 for name in file.entries}
    tensors[wrong] = edit(tensors[wrong])
    write_tensor_file(tmp_path / STATE, tensors.items(), file.metadata)
    with pytest.raises(TrainingError, match=rf"has {re.escape(wrong)} as {words}: delete it"):
        run.resume(tmp_path)
    assert all(torch.equal(run.leaves[name], tensor) for name, tensor in before.items())


def test_the_command_trains_goes_on_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path), "--workers", "1", "--seed", "3"]
    run_step, steps = Trainer.run_step, []

    def interrupted(run: Trainer, workers: Workers) -> list[Loss]:
        steps.append(run.step)
        if len(steps) == 3:
            run.save(tmp_path)
            raise KeyboardInterrupt
        return run_step(run, workers)

    monkeypatch.setattr(Trainer, "run_step", interrupted)
    assert command.main([*out, "--steps", "4"]) == 130
    assert command.main([*out, "--steps", "4"]) == 0
    assert steps == [0, 1, 2, 2, 3]
    shown = capsys.readouterr()
    assert "goes on after step 2 of 4" in shown.out
    report = read_report(tmp_path)
    assert (report["seed"], report["steps"]) == (3, 4)
    assert report["trained_on"] == {**MEDIA[0].hashes, **MEDIA[1].hashes}
    assert set(report["loss"]) <= set(TASKS)
    assert "made-0" in (tmp_path / TEXT).read_text()
    assert command.main([*out[:4], "--seed", "4", "--steps", "4"]) == 1
    assert "error: " in capsys.readouterr().err


def test_a_folder_that_is_trained_keeps_its_report_and_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path), "--workers", "1"]
    assert command.main([*out, "--steps", "2"]) == 0
    report = read_report(tmp_path)
    assert report["loss"]
    measured = {**report, "weights_sha256": "0", "measured_with": {}}
    (tmp_path / REPORT).write_text(json.dumps(measured))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    for steps in ([], ["--steps", "2"]):
        assert command.main([*out, *steps]) == 0
        assert capsys.readouterr().out == (
            f"{tmp_path} is trained already, for 2 steps; more --steps train it further\n"
        )
    assert command.main([*out, "--steps", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --steps 1 is less than the 2 steps")
    assert len(error.splitlines()) == 1
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert command.main([*out, "--steps", "3"]) == 0
    assert read_report(tmp_path)["steps"] == 3


def test_a_run_that_was_stopped_before_its_report_is_not_taken_to_be_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    out = ["--out", str(tmp_path), "--workers", "1", "--steps", "2"]
    monkeypatch.setattr(command, "SAVE_EVERY_S", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(command, "write_report", interrupted)
        assert command.main(out) == 130
    assert command.main(out) == 0
    assert read_report(tmp_path)["loss"]


@pytest.mark.parametrize(
    "wrong", [["--workers", "0"], ["--steps", "0"], ["--seed", "-1"], ["--episodes", "0"]]
)
def test_wrong_arguments(wrong: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        command.main(["--out", str(tmp_path), *wrong])
    assert error.value.code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"trained_on": []}'])
def test_a_model_without_a_report_is_not_measured(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / REPORT).write_text(text)
    with pytest.raises(ReportError, match="nobody knows what the model was trained on"):
        read_report(tmp_path)


def test_muon_makes_moves_with_even_singular_values() -> None:
    for shape in [(3, 64, 16), (16, 64), (24, 24)]:
        values = torch.linalg.svdvals(orthogonal(torch.randn(*shape)))
        assert values.min() > 0.2 and values.max() < 1.4


def test_weights_without_a_gradient_stay() -> None:
    weights = {"layers.0.x": torch.ones(4, 4), "y": torch.ones(4)}
    weights["y"].grad = torch.full((4,), 2.0)
    Optimiser.new(weights).step(0, 10)
    assert (weights["layers.0.x"] == 1).all()
    assert (weights["y"] < 1).all() and weights["y"].grad is None


def test_what_is_silent_is_learnt_where_a_word_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the tick of "<yield>", and of the one after it: what the speech head sings there is
    heard by the model itself."""
    monkeypatch.setattr(lost, "QUIET_ROWS", 0)
    weights = new_weights(1)
    episode = make_episode("speak", 50, 0, *MEDIA, lose=0.0)
    batch = make_batch([episode], np.random.default_rng(0))
    h_M_D = torch.randn(len(batch.target_M), CONFIG.width)
    first = 4 * int(np.flatnonzero(episode.said_T == ID["<yield>"])[0])
    assert (batch.mel_M_B[first : first + 8] == SILENT_LEVEL).all()

    def loss(mel_M_B: torch.Tensor) -> float:
        changed = replace(batch, mel_M_B=mel_M_B)
        return float(speech_loss(weights, changed, h_M_D, np.random.default_rng(0)))

    for row in range(first, first + 8):
        mel_M_B = batch.mel_M_B.clone()
        mel_M_B[row] += 1.0
        assert loss(mel_M_B) != loss(batch.mel_M_B)


def test_the_rate_goes_up_stays_and_falls_to_zero() -> None:
    rates = [schedule(step, 1000) for step in range(1001)]
    assert rates[0] < 0.05 and set(rates[100:599]) == {1.0}
    assert rates == sorted(rates[:100]) + rates[100:600] + sorted(rates[600:], reverse=True)
    assert rates[-1] == 0.0
    assert json.dumps(rates)


def test_lessons_go_on_from_one_to_the_next() -> None:
    begins = [lesson.begin for lesson in LESSONS]
    assert begins == sorted(set(begins)) and begins[0] == 0 and begins[-1] < 1
    rng = np.random.default_rng(0)
    for lesson in LESSONS:
        assert lesson_at(lesson.begin) is lesson
        assert set(lesson.draw_paces(5, rng)) <= set(lesson.paces)
        share, reach = lesson.draw_garble(rng)
        assert 0 <= share <= 1 and reach >= 1 and sum(lesson.lengths) == pytest.approx(1)
        assert all(
            0 <= s <= most for s, most in zip(lesson.draw_slips(rng), lesson.slips, strict=True)
        )
    assert lesson_at(begins[1] - 1e-9) is LESSONS[0] and lesson_at(1.0) is LESSONS[-1]


def test_what_is_not_learnt_yet_is_drawn_more_often() -> None:
    losses = dict.fromkeys(TASKS, 0.0) | {"wait_tone": 0.9}
    drawn = draw_tasks(losses, 3000, np.random.default_rng(0))
    assert set(drawn) == set(TASKS)
    assert 0.88 < drawn.count("wait_tone") / 3000 < 0.96  # 1 of 1.08


def test_a_lesson_may_say_how_often_there_is_counting() -> None:
    losses = dict.fromkeys(TASKS, 0.0) | {"wait_tone": 0.9, "count_flash": 0.3}
    drawn = draw_tasks(losses, 3000, np.random.default_rng(0), counting=0.6)
    assert set(drawn) == set(TASKS)
    counts = [task for task in drawn if task.startswith("count")]
    assert 0.56 < len(counts) / 3000 < 0.64
    assert 0.84 < counts.count("count_flash") / len(counts) < 0.94  # 16 of 18
