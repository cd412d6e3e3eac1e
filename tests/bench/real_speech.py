"""People who talk: the demo's recording, for what is to hear human voices."""

from __future__ import annotations

import pytest

from tml_runtime.demo.cue.speech import Speech
from tml_runtime.demo.decode import load_audio
from tml_runtime.demo.media import MediaError, speech_path


def real_speech() -> Speech:
    try:
        return Speech({"sample.wav": load_audio(speech_path())})
    except MediaError as error:
        pytest.skip(f"needs the demo's recording: {error}")
