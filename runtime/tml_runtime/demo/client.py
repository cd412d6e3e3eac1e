"""One person of the demo: plays a recording to a session and keeps what the session answers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..errors import SessionFault
from ..session import ActionOut, Session, SpeechOut, TextOut
from .decode import SAMPLE_RATE
from .source import LiveSource


@dataclass
class Answers:
    """Everything a session said, in the order of its media times."""

    speech: list[SpeechOut] = field(default_factory=list)
    texts: list[TextOut] = field(default_factory=list)
    actions: list[ActionOut] = field(default_factory=list)
    fault: str | None = None  # why the runtime ended the session

    @property
    def text(self) -> str:
        return "".join(out.text for out in self.texts)

    def pcm(self, seconds: float) -> np.ndarray:
        """float32 speech from media time 0 to `seconds`; silence where nothing was said or lost."""
        pcm = np.zeros(round(seconds * SAMPLE_RATE), np.float32)
        for out in self.speech:
            start = round(out.t * SAMPLE_RATE)
            piece = out.pcm[: max(0, len(pcm) - start)]
            pcm[start : start + len(piece)] = piece
        return pcm


class Client:
    def __init__(self, session: Session, source: LiveSource) -> None:
        self.session = session
        self.source = source
        self.answers = Answers()

    def poll(self) -> None:
        """Take over what the session has said since the last call."""
        if self.answers.fault is not None:
            return
        try:
            outputs = self.session.poll()
        except SessionFault as error:
            self.answers.fault = str(error)
            return
        for out in outputs:
            if isinstance(out, SpeechOut):
                self.answers.speech.append(out)
            elif isinstance(out, TextOut):
                self.answers.texts.append(out)
            else:
                self.answers.actions.append(out)


def printable(text: str) -> str:
    """`text` for a terminal or a plot: what is not a plain Latin character becomes a middle dot.

    >>> printable("h\\u00e9\\x07\\ufffd!")
    'hé··!'
    """
    return "".join(c if " " <= c <= "~" or "\u00a1" <= c <= "\u024f" else "·" for c in text)
