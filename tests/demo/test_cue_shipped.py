"""The checkpoint that ships: the one that was measured, run by the real runtime and by the demo."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cue_media import made_footage, made_speech

from tml_kernels.ops.dmel.reference import quantise_ref
from tml_kernels.testing import assert_matches
from tml_runtime import Runtime
from tml_runtime.demo import media as media_files
from tml_runtime.demo.cue import shipped
from tml_runtime.demo.cue.batch import make_batch
from tml_runtime.demo.cue.evaluate import live_through, tick_input
from tml_runtime.demo.cue.recordings import HELD_OUT, MADE, SCENE, TRAINED_ON
from tml_runtime.demo.cue.report import read_report, target_rows, weights_digest
from tml_runtime.demo.cue.shipped import FOLDER, load_shipped, make_scene
from tml_runtime.demo.cue.tasks import make_episode
from tml_runtime.demo.cue.words import CONFIG, WordTokenizer
from tml_runtime.demo.prepare import Options
from tml_runtime.demo.run import run_demo
from tml_runtime.model import InteractionModel
from tml_runtime.session import ActionOut, SpeechOut, TextOut

MEDIA = made_speech(), made_footage()


@pytest.fixture(scope="module")
def model() -> InteractionModel:
    return load_shipped()


def test_the_report_is_that_of_these_weights(model: InteractionModel) -> None:
    report = read_report(FOLDER)
    assert model.report.random == model.report.ignored == ()
    assert report["weights_sha256"] == weights_digest(FOLDER)
    assert (FOLDER / "model.safetensors").stat().st_size <= 12e6
    assert set(SCENE) <= set(report["trained_on"]) <= {*TRAINED_ON, *MADE}
    assert set(report["measured_with"]) == set(HELD_OUT)
    assert not set(report["trained_on"].values()) & set(report["measured_with"].values())
    text = (FOLDER / "report.md").read_text()
    for what, _, target, reached in target_rows(report["figures"]):
        line = next(line for line in text.splitlines() if line.startswith(f"| {what} "))
        assert f"= {target:g} " in line and line.endswith("| yes |" if reached else "| NO |")


@torch.inference_mode()
def test_streaming_equals_the_full_forward(model: InteractionModel) -> None:
    """An episode longer than every window and extent, in ticks of the size that ticks have."""
    episode = make_episode("speak", 120, 4, *MEDIA)
    x_T_D = make_batch([episode], np.random.default_rng(0)).embed(model.weights)[0]
    assert len(x_T_D) > CONFIG.global_heads.extent
    state = model.new_state(1)
    slot_S, said = torch.tensor([0], dtype=torch.int32), []
    for block in x_T_D.split([6, 1, 1, 1] * (len(x_T_D) // 9) + [len(x_T_D) % 9]):
        start_S1 = torch.tensor([0, len(block)], dtype=torch.int32)
        said.append(model.append(state, block, start_S1, slot_S))
    valid = CONFIG.vocab.num_valid
    logits, wanted = model.logits(torch.cat(said))[:, :valid], model.forward(x_T_D)[:, :valid]
    assert_matches(logits, wanted, limit=1e-4)
    assert (logits.argmax(1) == wanted.argmax(1)).all()


def test_it_runs_in_the_runtime_as_in_ticks_and_is_heard(model: InteractionModel) -> None:
    """Words, in the order of its ticks, with a syllable for each, and silence between."""
    episode = make_episode("every", 24, 2, *MEDIA, lose=0.0)
    (said_T_K,) = live_through(model, [episode])
    with Runtime(model, realtime=False, tokenizer=WordTokenizer()) as runtime:
        session = runtime.open_session(temperature=0.0, seed=0)
        for tick in range(len(episode)):
            t = session.open_t
            session.push_audio(episode.pcm_T_W[tick], t)
            if episode.seen_T[tick]:
                for n, frame in enumerate(episode.frames_T_2_Y_Y_3[tick]):
                    session.push_video(frame, t + 0.1 * n)
            if episode.text[tick]:
                session.push_text(episode.text[tick])
            runtime.run_ticks(1)
        outputs = session.poll()
    words = [int(token) for token in said_T_K.flatten() if token >= 4]
    assert [i for out in outputs if isinstance(out, TextOut) for i in out.ids] == words
    assert words
    power = {
        round(out.t / 0.2) - 1: float(np.square(out.pcm).mean())
        for out in outputs
        if isinstance(out, SpeechOut)
    }
    spoken = {tick for tick, row in enumerate(said_T_K) if (row >= 4).any()}
    # the vocoder is a hop late, so the end of a syllable lies in the next tick
    silent = [tick for tick in power if tick not in spoken and tick - 1 not in spoken]
    softest = min(power[tick] for tick in spoken)
    assert np.percentile([power[tick] for tick in silent], 80) < 1e-6 * softest
    # Now and then the speech head makes a sound of its own: 14 dB below the softest word here.
    assert softest > 10 * max(power[tick] for tick in silent)
    assert not [out for out in outputs if isinstance(out, ActionOut)]


@torch.inference_mode()
def test_who_yields_is_silent_by_ear_too(model: InteractionModel) -> None:
    """Not in words alone: from two ticks after an interruption's first on, nothing sounds."""
    made = [make_episode("speak", 40, n, *MEDIA, lose=0.0) for n in range(4)]
    state = model.new_state(len(made))
    for slot in range(len(made)):
        state.set_sampling(slot, temperature=0.0)
    mel_T = [model.tick(state, tick_input(made, tick)).mel_S_K_B.clone() for tick in range(40)]
    levels = quantise_ref(torch.stack(mel_T, dim=1), CONFIG.layout.dmel).float().mean((2, 3))
    quiet, singing = [], []
    for n, episode in enumerate(made):
        for event in episode.events:
            if event.kind == "interruption":
                quiet.append(levels[n, event.tick + 2 : event.tick + 4].mean())
                singing.append(levels[n, event.tick - 1])
    assert len(quiet) > 3
    assert max(quiet) < 0.05 * min(singing)


def test_the_demo_with_it_says_the_same_every_time(
    talk: Path, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {".wav": talk, ".mp4": film}
    monkeypatch.setattr(shipped, "scene_media", lambda say=None: MEDIA)
    monkeypatch.setattr(media_files, "media_path", lambda name, say=None: paths[Path(name).suffix])
    shown = io.StringIO()
    for run in ("first", "again"):
        options = Options(preset="cue", seconds=5.0, realtime=False, out=tmp_path / run, seed=1)
        report = run_demo(options, shown)
        assert (report["note"], report["faults"], report["missing"]) == ("", 0, 0)
        assert report["clients"][0]["text"].strip()
    assert "untrained" not in shown.getvalue()
    assert re.search(r"said \d+ of \d+ words in the very tick", shown.getvalue())
    for name in ("report.json", "speech.wav", "timeline.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_scene_has_an_instruction_for_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "scene_media", lambda say=None: MEDIA)
    made = make_scene(60.0, 3)
    scene = made.media
    assert len(scene.pcm) / 16_000 == pytest.approx(63.0)
    assert scene.clip is not None and scene.clip.seconds == pytest.approx(63.0)
    times = [t for t, _ in scene.texts]
    assert times == sorted(times)
    stops = {round(t, 3) for t, text in scene.texts if text.startswith("stop")}
    assert {9.1, 18.1, 27.1, 36.1, 45.1, 54.1} <= stops
    assert scene.texts[0][1] == "speak"
    again = make_scene(60.0, 3).media
    np.testing.assert_array_equal(scene.pcm, again.pcm)
    assert scene.texts == again.texts


@pytest.mark.parametrize(("seconds", "sections"), [(1.0, 1), (9.0, 1), (12.0, 2), (20.0, 3)])
def test_a_scene_is_as_long_as_the_run(
    seconds: float, sections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "scene_media", lambda say=None: MEDIA)
    assert len(make_scene(seconds, 3).media.pcm) == sections * 9 * 16_000


def test_a_scene_knows_what_was_said_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "scene_media", lambda say=None: MEDIA)
    scene = make_scene(20.0, 3)
    assert len(scene.due) > 20 and scene.due == tuple(sorted(scene.due))
    ticks = [tick for tick, _ in scene.due]
    texts = [  # in any output step of the tick
        TextOut("", (word,), (tick + 1) * 0.2 + n % 4 * 0.05)
        for n, (tick, word) in enumerate(scene.due)
    ]
    share = scene.in_time(texts, 1000)
    assert share.hits == share.total == len(scene.due)
    late = [TextOut("", out.ids, out.t + 0.2) for out in texts[-1:]]
    assert scene.in_time(late, 1000).hits == 0
    assert scene.in_time(texts, ticks[10]).total == sum(tick < ticks[10] for tick in ticks)
