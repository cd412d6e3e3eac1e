"""Messages of the service, to bytes and back; docs/protocol.md is what a client is written from.

Nothing a peer sends is trusted: lengths are compared with what came, numbers with their ranges, and
whatever does not fit raises a ProtocolError that names the field. Decoding has no side effect.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, NoReturn

from ..errors import TmlRuntimeError

VERSION = 1
SUBPROTOCOL = "tml.v1"
PATH = "/v1/session"

HEADER = struct.Struct("<BBHIqIHH")  # kind, 0, 0, seq, stamp, epoch, width, height
MAX_CONTROL_BYTES = 16_384  # of a JSON message from a client
MAX_AUDIO_SAMPLES = 1600  # of one audio frame from a client
MAX_TEXT_CHARS = 1024  # of one `text`
MAX_PROMPT_CHARS = 4096
MAX_TOKEN_CHARS = 256
MAX_SEQ = 2**32 - 1
MAX_STAMP = 2**53 - 1  # what every JSON reader holds exactly


class Kind(IntEnum):
    """First byte of a binary message."""

    AUDIO = 1  # up: PCM16
    JPEG = 2  # up
    RGB = 3  # up: raw, 3 bytes a pixel
    SPEECH = 17  # down: PCM16


UP_KINDS = (Kind.AUDIO, Kind.JPEG, Kind.RGB)


class ErrorCode(str, Enum):
    """`code` of an `error` message."""

    BAD_MESSAGE = "bad_message"
    UNKNOWN_KIND = "unknown_kind"
    TOO_LARGE = "too_large"
    BAD_FRAME = "bad_frame"
    REFUSED_INPUT = "refused_input"
    VERSION = "version"
    UNAUTHORIZED = "unauthorized"
    UNKNOWN_SESSION = "unknown_session"
    HANDSHAKE_TIMEOUT = "handshake_timeout"
    TAKEN_OVER = "taken_over"
    RATE_LIMITED = "rate_limited"
    SLOW_CONSUMER = "slow_consumer"
    EXHAUSTED = "exhausted"
    DRAINING = "draining"
    SESSION_FAULT = "session_fault"
    LOOP_FAILED = "loop_failed"
    INTERNAL = "internal"


class CloseCode(IntEnum):
    """WebSocket close codes of the service, beside 1009, which the WebSocket layer sends."""

    BYE = 1000
    DRAINING = 1001
    BAD_MESSAGE = 4400
    UNAUTHORIZED = 4401
    UNKNOWN_SESSION = 4404
    HANDSHAKE_TIMEOUT = 4408
    TAKEN_OVER = 4409
    RATE_LIMITED = 4429
    SLOW_CONSUMER = 4430
    INTERNAL = 4500
    SESSION_FAULT = 4501
    EXHAUSTED = 4503
    LOOP_FAILED = 4510


class ProtocolError(TmlRuntimeError, ValueError):
    """A message that breaks the protocol; `field` is the part that does, "" for all of it."""

    def __init__(
        self, message: str, *, field: str, code: ErrorCode = ErrorCode.BAD_MESSAGE
    ) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field
        self.code = code


# Media


@dataclass(frozen=True)
class Media:
    """A binary message. Width and height are 0 but for RGB. The payload is not copied."""

    kind: Kind
    seq: int
    stamp: int  # samples: of the capture clock going up, of the media clock coming down
    payload: memoryview
    epoch: int = 0
    width: int = 0
    height: int = 0


def encode_media(media: Media) -> bytes:
    header = HEADER.pack(
        media.kind, 0, 0, media.seq, media.stamp, media.epoch, media.width, media.height
    )
    return header + media.payload


def decode_media(data: bytes, *, kinds: tuple[Kind, ...] = UP_KINDS) -> Media:
    """Raises ProtocolError. The two reserved fields may hold anything."""
    if len(data) < HEADER.size:
        raise ProtocolError(
            f"{len(data)} bytes, shorter than the header's {HEADER.size}", field="header"
        )
    number, _, _, seq, stamp, epoch, width, height = HEADER.unpack_from(data)
    if number not in tuple(kinds):
        known = ", ".join(f"{kind.value} ({kind.name})" for kind in kinds)
        raise ProtocolError(
            f"{number} is not one of {known}", field="kind", code=ErrorCode.UNKNOWN_KIND
        )
    if not 0 <= stamp <= MAX_STAMP:
        raise ProtocolError(f"{stamp} is not in 0..2**53-1", field="stamp")
    kind, payload = Kind(number), memoryview(data)[HEADER.size :]
    if kind in (Kind.AUDIO, Kind.SPEECH):
        _check_pcm(kind, len(payload))
        return Media(kind, seq, stamp, payload, epoch)
    if kind is Kind.JPEG:
        if len(payload) == 0:
            raise ProtocolError("an empty JPEG", field="payload")
        return Media(kind, seq, stamp, payload, epoch)
    if width == 0 or height == 0:
        raise ProtocolError(f"{width}x{height} has no pixels", field="width, height")
    if len(payload) != width * height * 3:
        raise ProtocolError(
            f"{len(payload)} bytes, but {width=} * {height=} * 3 are {width * height * 3}",
            field="payload",
        )
    return Media(kind, seq, stamp, payload, epoch, width, height)


def _check_pcm(kind: Kind, num_bytes: int) -> None:
    if num_bytes == 0 or num_bytes % 2:
        raise ProtocolError(
            f"{num_bytes} bytes are no whole number of 16-bit samples above 0", field="payload"
        )
    if kind is Kind.AUDIO and num_bytes > 2 * MAX_AUDIO_SAMPLES:
        raise ProtocolError(
            f"{num_bytes // 2} samples, more than {MAX_AUDIO_SAMPLES}: send 20 ms at a time",
            field="payload",
            code=ErrorCode.TOO_LARGE,
        )


# Control messages of a client


@dataclass(frozen=True)
class Hello:
    """The first message. `options` are arguments of `Runtime.open_session`."""

    version: int
    token: str | None
    resume: str | None
    options: dict[str, Any]
    ticks: bool = False  # whether it wants to be told of every tick


@dataclass(frozen=True)
class TextIn:
    seq: int
    text: str


@dataclass(frozen=True)
class Interrupt:
    played: int | None  # samples of the media clock; None: as reported last


@dataclass(frozen=True)
class Position:
    played: int


@dataclass(frozen=True)
class Bye:
    pass


ClientMessage = Hello | TextIn | Interrupt | Position | Bye


def decode_control(text: str) -> ClientMessage:
    """A client's JSON message; fields nobody knows are ignored. Raises ProtocolError."""
    fields = Fields.parse(text)
    name = fields.text("type", max_chars=64)
    decode = _DECODERS.get(name)
    if decode is None:
        raise ProtocolError(
            f"{name!r} is not one of {', '.join(_DECODERS)}",
            field="type",
            code=ErrorCode.UNKNOWN_KIND,
        )
    return decode(fields)


def _hello(fields: Fields) -> Hello:
    version = fields.integer("version", 0, MAX_SEQ)
    if version != VERSION:
        raise ProtocolError(
            f"{version} is not {VERSION}, the one spoken here",
            field="version",
            code=ErrorCode.VERSION,
        )
    return Hello(
        version,
        token=fields.optional_text("token", max_chars=MAX_TOKEN_CHARS),
        resume=fields.optional_text("resume", max_chars=MAX_TOKEN_CHARS),
        options=_options(fields.part("options")),
        ticks=fields.flag("ticks"),
    )


def _options(fields: Fields) -> dict[str, Any]:
    """Only those that were given: what is missing has the runtime's default."""
    options: dict[str, Any] = {}
    for name, low, high in (("top_k", 0, 2**31 - 1), ("seed", 0, MAX_STAMP)):
        if fields.has(name):
            options[name] = fields.integer(name, low, high)
    for name, high in (("temperature", 100.0), ("top_p", 1.0), ("min_p", 1.0)):
        if fields.has(name):
            options[name] = fields.number(name, 0.0, high)
    if fields.has("prompt"):
        options["prompt"] = fields.text("prompt", max_chars=MAX_PROMPT_CHARS)
    return options


def _interrupt(fields: Fields) -> Interrupt:
    has = fields.has("played")
    return Interrupt(fields.integer("played", 0, MAX_STAMP) if has else None)


_DECODERS = {
    "hello": _hello,
    "text": lambda fields: TextIn(
        fields.integer("seq", 0, MAX_SEQ), fields.text("text", max_chars=MAX_TEXT_CHARS)
    ),
    "interrupt": _interrupt,
    "position": lambda fields: Position(fields.integer("played", 0, MAX_STAMP)),
    "bye": lambda fields: Bye(),
}


class Fields:
    """Typed reading of one JSON object. A field that is null counts as absent."""

    def __init__(self, values: dict[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    @classmethod
    def parse(cls, text: str) -> Fields:
        """Raises ProtocolError for what is no JSON object."""
        try:
            values = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"not JSON: {error!s:.100}", field="") from None
        if not isinstance(values, dict):
            raise ProtocolError(f"a JSON {type(values).__name__}, not an object", field="")
        return cls(values)

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def text(self, name: str, *, max_chars: int) -> str:
        value = self._get(name, str, "a string")
        if len(value) > max_chars:
            raise self._error(
                name, f"{len(value)} characters, more than {max_chars}", ErrorCode.TOO_LARGE
            )
        return value

    def optional_text(self, name: str, *, max_chars: int) -> str | None:
        return self.text(name, max_chars=max_chars) if self.has(name) else None

    def integer(self, name: str, low: int, high: int) -> int:
        value = self._get(name, int, "an integer")
        if not low <= value <= high:
            raise self._error(name, f"{_short(value)} is not in {low}..{high}")
        return value

    def number(self, name: str, low: float, high: float) -> float:
        value = self._get(name, (int, float), "a number")
        if not low <= value <= high:  # also what is not a number
            raise self._error(name, f"{_short(value)} is not in {low:g}..{high:g}")
        return float(value)

    def flag(self, name: str) -> bool:
        """False where there is none."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._error(name, f"{_short(value)}: true or false is expected")
        return value is True

    def part(self, name: str) -> Fields:
        """The object at `name`; an empty one where there is none."""
        if not self.has(name):
            return Fields({}, f"{self._prefix}{name}.")
        return Fields(self._get(name, dict, "an object"), f"{self._prefix}{name}.")

    def _get(self, name: str, kind: type | tuple[type, ...], article: str) -> Any:
        value = self._values.get(name)
        if value is None:
            raise self._error(name, f"missing: {article} is expected")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self._error(name, f"{_short(value)}: {article} is expected")
        return value

    def _error(
        self, name: str, message: str, code: ErrorCode = ErrorCode.BAD_MESSAGE
    ) -> ProtocolError:
        return ProtocolError(message, field=self._prefix + name, code=code)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _short(value: Any) -> str:
    """For an error message, whatever the size of the value."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (dict, list)):
        return f"a JSON {type(value).__name__}"
    return repr(value) if len(repr(value)) <= 40 else repr(value)[:40] + "..."


# Control messages of the server


def encode_control(kind: str, **values: Any) -> str:
    """A JSON message of type `kind`; values that are None are left out."""
    shown = {name: value for name, value in values.items() if value is not None}
    return json.dumps({"type": kind, **shown}, separators=(",", ":"), allow_nan=False)
