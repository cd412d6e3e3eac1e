"""What a demo run needs before it begins: checked options, a model that fits, decoded media."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import budget
from ..budget import TIMED
from ..loop import Runtime
from ..model import InteractionModel, KvBudget, ModelConfig, TurnLayout
from ..random_model import DEVICES, PRESETS, ModelChoiceError, device_for, random_model, vocoder_for
from . import media as media_files
from .cue.recordings import FRAMES_PER_S, SCENE
from .cue.shipped import Scene, load_shipped, make_scene
from .cue.stage import SIDE
from .cue.words import WordTokenizer
from .decode import SAMPLE_RATE, has_audio, load_audio, load_video
from .media import Say
from .source import Media

CUE = "cue"  # the one whose weights are trained, and ship
MODELS = (*PRESETS, CUE)
NONE = "none"
MAX_SECONDS = 3600.0  # all speech is kept until it is written: 64 KB a second and session
MAX_SESSIONS = 256
SPEECH_START_S = 6.5  # the first words of the default recording come at 6.69 s
FRAMES_PER_TICK = 2  # of video: they make one token per patch
MAX_KEEP_S = 600.0


class DemoError(RuntimeError):
    """A run that cannot be made as asked; says why."""


@dataclass(frozen=True)
class Options:
    """What to run; checked when made. audio, video: a file, "none", or None for the default."""

    audio: str | None = None
    video: str | None = None
    preset: str = "cue"
    seconds: float = 60.0
    sessions: int = 1
    realtime: bool = True
    device: str = "auto"
    seed: int = 0
    keep: float = 10.0  # seconds of sound, pictures and replies that stay in the model's memory
    keep_video: float | None = None  # of pictures, where it differs
    out: Path = Path("out/demo")

    def __post_init__(self) -> None:
        if self.preset not in MODELS:
            raise DemoError(f"preset {self.preset!r} is not one of {', '.join(MODELS)}")
        if self.device not in DEVICES:
            raise DemoError(f"device {self.device!r} is not one of {', '.join(DEVICES)}")
        if not (math.isfinite(self.seconds) and 0 < self.seconds <= MAX_SECONDS):
            raise DemoError(f"seconds={self.seconds:g} is not in 0..{MAX_SECONDS:g} (above 0)")
        if not 1 <= self.sessions <= MAX_SESSIONS:
            raise DemoError(f"sessions={self.sessions} is not in 1..{MAX_SESSIONS}")
        if not 0 <= self.seed < 2**63:
            raise DemoError(f"seed={self.seed} is not in 0..2**63-1")
        for name, seconds in (("keep", self.keep), ("keep_video", self.keep_video)):
            if seconds is not None and not (math.isfinite(seconds) and 0 < seconds <= MAX_KEEP_S):
                raise DemoError(f"{name}={seconds:g} is not in 0..{MAX_KEEP_S:g} (above 0)")
        try:
            is_file = self.out.exists() and not self.out.is_dir()
        except OSError as error:  # too long a name, or a parent that may not be read
            raise DemoError(f"out: {error}") from error
        if is_file:
            raise DemoError(f"out: {self.out} is a file, not a folder")

    def keep_s(self, name: str) -> float:
        """Of one of TIMED."""
        return self.keep if name != "video" or self.keep_video is None else self.keep_video


@dataclass(frozen=True)
class Loaded:
    media: Media
    start_s: float  # where session 0 begins
    about: dict[str, Any]  # for the report
    temperature: float = 1.0  # at which sessions draw
    scene: Scene | None = None  # where the media are one


def make_model(options: Options) -> InteractionModel:
    """The trained `cue`, or a model with random weights, on the chosen device; refuses one that
    does not fit."""
    try:
        if options.preset == CUE:
            return load_shipped(device_for(options.device))
        return random_model(options.preset, device=options.device, seed=options.seed)
    except ModelChoiceError as error:
        raise DemoError(str(error)) from error


def tokens_per_tick(options: Options, config: ModelConfig) -> dict[str, int]:
    """What a session of the demo appends in every tick, by class."""
    return budget.tokens_per_tick(config, _frame_size(options.preset))


def make_budget(options: Options, config: ModelConfig) -> KvBudget:
    """Room for the seconds to keep; text and anchors have the default."""
    seconds = {name: options.keep_s(name) for name in TIMED}
    return budget.budget_for(config, seconds, _frame_size(options.preset))


def make_runtime(options: Options, model: InteractionModel) -> Runtime:
    """A runtime with a slot per session; untrained speech is brought to the level of speech."""
    return Runtime(
        model,
        tokenizer=WordTokenizer() if options.preset == CUE else None,
        num_slots=options.sessions,
        seed=options.seed,
        realtime=options.realtime,
        budget=make_budget(options, model.config),
        vocoder=vocoder_for(model),
    )


def load_media(options: Options, layout: TurnLayout, say: Say) -> Loaded:
    """Decode what the sessions hear and see. Raises MediaError for a file that cannot be used.

    Without --audio, a film given with --video brings its own sound, if it has any. The trained
    model gets a scene with cues and instructions, unless there is a file for one of the two.
    """
    if options.preset == CUE and options.audio is None and options.video is None:
        return _load_scene(options, say)
    video, video_about = None, None
    if options.video != NONE:
        path = media_files.video_path(say=say) if options.video is None else Path(options.video)
        fps = FRAMES_PER_TICK * 1000 / layout.period_ms
        video = load_video(path, fps=fps, size=_frame_size(options.preset), seconds=options.seconds)
        _, height, width, _ = video.frames.shape
        video_about = {**_about(path), "frames_per_s": fps, "height": height, "width": width}
    pcm, start_s, audio_about = np.zeros(SAMPLE_RATE, np.float32), 0.0, None
    if options.audio != NONE:
        path, start_s = _audio_path(options, say)
        pcm = load_audio(path, seconds=start_s + max(options.seconds, 1.0))
        audio_about = {**_about(path), "sample_rate": SAMPLE_RATE}
    return Loaded(Media(pcm, video), start_s, {"audio": audio_about, "video": video_about})


def _load_scene(options: Options, say: Say) -> Loaded:
    about = [_about(media_files.media_path(name, say=say)) for name in SCENE]
    scene = make_scene(options.seconds, options.seed, say)
    return Loaded(
        scene.media,
        0.0,
        {
            "audio": {**about[0], "sample_rate": SAMPLE_RATE},
            "video": {**about[1], "frames_per_s": FRAMES_PER_S, "height": SIDE, "width": SIDE},
        },
        temperature=0.0,
        scene=scene,
    )


def _audio_path(options: Options, say: Say) -> tuple[Path, float]:
    """The sound to play, and where in it to begin."""
    if options.audio is not None:
        return Path(options.audio), 0.0
    film = options.video
    if film is not None and film != NONE and has_audio(Path(film)):
        return Path(film), 0.0
    return media_files.speech_path(say=say), SPEECH_START_S


def _about(path: Path) -> dict[str, Any]:
    return {
        "source": media_files.describe(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def _frame_size(preset: str) -> tuple[int, int]:
    """(height, width): 4 tokens a frame pair for the tiny model, 1 for the trained one, 48 for the
    wide ones."""
    return {"tiny": (80, 80), CUE: (SIDE, SIDE)}.get(preset, (240, 320))
