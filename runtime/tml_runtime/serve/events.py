"""What a client of the service gets to hear, decoded from the messages that carry it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

from .protocol import Kind, Media, ProtocolError


@dataclass(frozen=True, eq=False)
class Speech:
    """int16 mono, to be heard from sample `stamp` of the media clock on."""

    pcm: np.ndarray
    stamp: int
    epoch: int
    seq: int


@dataclass(frozen=True)
class Text:
    text: str
    stamp: int
    epoch: int
    seq: int


@dataclass(frozen=True)
class Action:
    name: str
    stamp: int
    epoch: int
    seq: int


@dataclass(frozen=True)
class Epoch:
    """An interruption took effect: output of older epochs is dropped, and never comes."""

    epoch: int


@dataclass(frozen=True)
class Notice:
    """Something that does not end the session: a refused message, a connection lost or resumed."""

    code: str
    message: str


Event = Speech | Text | Action | Epoch | Notice


class ServiceError(RuntimeError):
    """The service refused or ended the session. `code` is the protocol's; `retry_after_s` says when
    to try again, if that makes sense.
    """

    def __init__(self, message: str, *, code: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Welcome:
    """What the service said when the session began, or went on."""

    session: str
    resume: str
    resumed: bool
    grace_s: float
    epoch: int
    media_now: int
    next_seq: int
    text_seq: int
    tick_ms: int
    sample_rate_in: int
    sample_rate_out: int
    patch: int

    @classmethod
    def parse(cls, message: dict[str, Any]) -> Welcome:
        names = (
            "session", "resume", "resumed", "grace_s", "epoch", "media_now", "next_seq", "text_seq",
            "tick_ms",
        )  # fmt: skip
        try:
            return cls(
                **{name: message[name] for name in names},
                sample_rate_in=message["audio_in"]["sample_rate"],
                sample_rate_out=message["audio_out"]["sample_rate"],
                patch=message["video"]["patch"],
            )
        except (KeyError, TypeError) as error:
            raise ProtocolError(f"of a welcome: {error!r}", field="welcome") from None


def speech_event(media: Media) -> Speech:
    assert media.kind is Kind.SPEECH
    return Speech(np.frombuffer(media.payload, "<i2"), media.stamp, media.epoch, media.seq)


def parse_message(text: str) -> dict[str, Any]:
    """A JSON message of the service. Raises ProtocolError."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        raise ProtocolError("not JSON", field="") from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise ProtocolError("no message with a type", field="type")
    return message


def output_event(message: dict[str, Any]) -> Text | Action | None:
    """None for a type that is no output."""
    try:
        where = message["stamp"], message["epoch"], message["seq"]
        if message["type"] == "text":
            return Text(message["text"], *where)
        return Action(message["name"], *where) if message["type"] == "action" else None
    except KeyError as error:
        raise ProtocolError(f"missing in {message['type']!r}", field=str(error)) from None


def as_int16(pcm: np.ndarray) -> np.ndarray:
    if pcm.ndim != 1 or pcm.dtype not in (np.int16, np.float32):
        raise ValueError(f"pcm: expected int16 or float32 [n], got {pcm.dtype} {pcm.shape}")
    if pcm.dtype == np.int16:
        return pcm
    return np.clip(np.rint(pcm * 32768.0), -32768, 32767).astype(np.int16)


def service_error(values: dict[str, Any]) -> ServiceError:
    code = str(values.get("code") or values.get("reason") or "bad_message")
    retry_s = values.get("retry_after_s")
    return ServiceError(
        str(values.get("message", "")),
        code=code,
        retry_after_s=retry_s if isinstance(retry_s, (int, float)) else None,
    )


_HTTP_CODES = {401: "unauthorized", 403: "forbidden", 426: "upgrade_required", 503: "exhausted"}


def refused(error: aiohttp.WSServerHandshakeError) -> ServiceError:
    retry_s = (error.headers or {}).get("Retry-After", "")
    return ServiceError(
        f"HTTP {error.status}: {error.message}",
        code=_HTTP_CODES.get(error.status, "http"),
        retry_after_s=float(retry_s) if retry_s.isdigit() else None,
    )
