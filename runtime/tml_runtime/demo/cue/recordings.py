"""What the model is trained on, real recordings and made voices, and the recordings that it is
measured with."""

from __future__ import annotations

from collections.abc import Callable

from .. import media
from ..decode import load_audio, load_video
from .speech import Footage, Speech
from .stage import SIDE
from .voices import made_voices

FRAMES_PER_S = 10.0  # two a tick
SCENE = ("sample.wav", "carphone_pristine.mp4")  # of `make demo`
TRAINED_ON = (*SCENE, *(file.name for file in media.TRAINING))
MADE, MADE_S = ("made voices", "more made voices"), 240.0
HELD_OUT = (*(file.name for file in media.HELD_OUT), "bikes.mp4")

Say = Callable[[str], None]


def scene_media(say: Say | None = None) -> tuple[Speech, Footage]:
    """Raises MediaError where a recording is not in the cache and cannot be fetched."""
    return _load(SCENE, say)


def training_media(say: Say | None = None) -> tuple[Speech, Footage]:
    """Those and more, with voices that nobody has; the first fetch takes pip minutes. Raises
    MediaError."""
    speech, footage = _load(TRAINED_ON, say)
    made = {name: made_voices(MADE_S, seed) for seed, name in enumerate(MADE)}
    return Speech({**speech.recordings, **made}), footage


def held_out_media(say: Say | None = None) -> tuple[Speech, Footage]:
    """The same of what the model is never trained on; its first fetch takes pip minutes."""
    return _load(HELD_OUT, say)


def _load(names: tuple[str, ...], say: Say | None) -> tuple[Speech, Footage]:
    paths = {name: media.media_path(name, say=say) for name in names}
    sounds = {name: load_audio(path) for name, path in paths.items() if path.suffix == ".wav"}
    clips = {
        name: load_video(path, fps=FRAMES_PER_S, size=(SIDE, SIDE)).frames
        for name, path in paths.items()
        if path.suffix == ".mp4"
    }
    return Speech(sounds), Footage(clips, SIDE)
