"""Messages to bytes and back, and what hostile bytes do to the decoders: nothing."""

from __future__ import annotations

import io
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tml_runtime.checks import FrameGrid
from tml_runtime.serve.events import Welcome
from tml_runtime.serve.frames import MAX_PIXELS, decode_jpeg, fitted_size, raw_frame
from tml_runtime.serve.protocol import (
    HEADER,
    MAX_AUDIO_SAMPLES,
    MAX_STAMP,
    MAX_TEXT_CHARS,
    PATH,
    SUBPROTOCOL,
    UP_KINDS,
    CloseCode,
    ErrorCode,
    Hello,
    Interrupt,
    Kind,
    Media,
    ProtocolError,
    TextIn,
    decode_control,
    decode_media,
    encode_control,
    encode_media,
)

GRID = FrameGrid(patch=40, extra_columns=1, max_tokens=256)
U32 = st.integers(0, 2**32 - 1)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from([Kind.AUDIO, Kind.JPEG, Kind.SPEECH]),
    seq=U32,
    epoch=U32,
    stamp=st.integers(0, MAX_STAMP),
    payload=st.binary(min_size=1, max_size=300),
)
def test_media_come_back_as_they_were(kind, seq, epoch, stamp, payload) -> None:
    if kind is not Kind.JPEG:
        payload *= 2
    media = Media(kind, seq, stamp, memoryview(payload), epoch)
    assert decode_media(encode_media(media), kinds=tuple(Kind)) == media


def test_the_header_is_the_one_of_the_document() -> None:
    """docs/protocol.md: kind, 3 reserved, seq, stamp, epoch, width, height; little-endian."""
    media = Media(Kind.RGB, 5, 6, memoryview(bytes(6)), 7, 2, 1)
    data = encode_media(media)
    assert data[:4] == b"\x03\0\0\0" and len(data) == 24 + 6
    assert struct.unpack("<IqIHH", data[4:24]) == (5, 6, 7, 2, 1)
    assert decode_media(b"\x03abc" + data[4:]) == media  # reserved bytes may hold anything


def test_the_document_has_every_code_and_kind() -> None:
    text = (Path(__file__).parents[2] / "docs/protocol.md").read_text()
    assert all(f"`{code.value}`" in text for code in ErrorCode)
    assert all(f"{int(code)}" in text for code in CloseCode)
    assert all(f"| {kind.value} | " in text for kind in Kind)
    assert {f"`{SUBPROTOCOL}`", f"`GET {PATH}`"} <= set(re.findall(r"`[^`\n]+`", text))
    example = json.loads(re.findall(r"```json\n(.*?)```", text, re.S)[0])
    assert Welcome.parse(example).patch == 40


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=64) | st.builds(
    lambda kind, rest: bytes([kind]) + rest, st.sampled_from(UP_KINDS), st.binary(max_size=80)
))  # fmt: skip
def test_any_bytes_are_media_or_a_protocol_error(data: bytes) -> None:
    try:
        media = decode_media(data)
    except ProtocolError as error:
        assert error.field and len(str(error)) < 300
    else:
        assert bytes(media.payload) == data[HEADER.size :]
        assert media.kind is not Kind.RGB or len(media.payload) == media.width * media.height * 3


def header(kind: int, *, stamp: int = 0, width: int = 0, height: int = 0) -> bytes:
    return HEADER.pack(kind, 0, 0, 0, stamp, 0, width, height)


@pytest.mark.parametrize(
    ("data", "field", "code"),
    [
        (b"", "header", ErrorCode.BAD_MESSAGE),
        (header(1)[:-1], "header", ErrorCode.BAD_MESSAGE),
        (header(0) + b"ab", "kind", ErrorCode.UNKNOWN_KIND),
        (header(17) + b"ab", "kind", ErrorCode.UNKNOWN_KIND),  # speech comes down only
        (header(1, stamp=-1) + b"ab", "stamp", ErrorCode.BAD_MESSAGE),
        (header(1, stamp=MAX_STAMP + 1) + b"ab", "stamp", ErrorCode.BAD_MESSAGE),
        (header(1), "payload", ErrorCode.BAD_MESSAGE),
        (header(1) + b"abc", "payload", ErrorCode.BAD_MESSAGE),
        (header(1) + bytes(2 * MAX_AUDIO_SAMPLES + 2), "payload", ErrorCode.TOO_LARGE),
        (header(2), "payload", ErrorCode.BAD_MESSAGE),
        (header(3, width=0, height=65_535), "width, height", ErrorCode.BAD_MESSAGE),
        (header(3, width=65_535, height=65_535) + b"abc", "payload", ErrorCode.BAD_MESSAGE),
        (header(3, width=2, height=1) + bytes(7), "payload", ErrorCode.BAD_MESSAGE),
    ],
)
def test_bad_media_name_the_field(data: bytes, field: str, code: ErrorCode) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_media(data)
    assert (caught.value.field, caught.value.code) == (field, code)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda part: (
        st.lists(part, max_size=4) | st.dictionaries(st.text(max_size=8), part, max_size=4)
    ),
    max_leaves=8,
)
NAMES = st.sampled_from(["hello", "text", "interrupt", "position", "bye", "welcome", ""])
FIELDS = st.sampled_from(["version", "token", "resume", "options", "seq", "text", "played"])


@settings(deadline=None, max_examples=60)
@given(
    st.text(max_size=60)
    | JSON.map(json.dumps)
    | st.builds(
        lambda name, fields: json.dumps({"version": 1, **fields, "type": name}),
        NAMES,
        st.dictionaries(FIELDS, JSON, max_size=4),
    )
)
def test_any_text_is_a_message_or_a_protocol_error(text: str) -> None:
    try:
        decode_control(text)
    except ProtocolError as error:
        assert len(str(error)) < 400


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", ""),
        ("[" * 16_000, ""),  # deeper than any parser goes
        ('{"type":' * 3000, ""),
        ('{"type":"text","seq":' + "9" * 10_000 + "}", ""),  # more digits than int takes
        ('{"type":"text","seq":NaN,"text":""}', ""),
        ("[]", ""),
        ("{}", "type"),
        ('{"type":7}', "type"),
        ('{"type":"sing"}', "type"),
        ('{"type":"hello"}', "version"),
        ('{"type":"hello","version":2}', "version"),
        ('{"type":"hello","version":true}', "version"),
        ('{"type":"hello","version":1,"token":' + json.dumps("x" * 257) + "}", "token"),
        ('{"type":"hello","version":1,"options":[]}', "options"),
        ('{"type":"hello","version":1,"options":{"seed":-1}}', "options.seed"),
        ('{"type":"hello","version":1,"options":{"temperature":1e999}}', "options.temperature"),
        ('{"type":"hello","version":1,"options":{"top_k":1.5}}', "options.top_k"),
        ('{"type":"text","seq":4294967296,"text":"a"}', "seq"),
        ('{"type":"text","seq":' + "9" * 400 + ',"text":"a"}', "seq"),
        ('{"type":"text","seq":0,"text":' + json.dumps("a" * (MAX_TEXT_CHARS + 1)) + "}", "text"),
        ('{"type":"text","seq":0}', "text"),
        ('{"type":"interrupt","played":-1}', "played"),
        ('{"type":"position"}', "played"),
    ],
    ids=lambda value: value[:50],
)
def test_bad_messages_name_the_field(text: str, field: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_control(text)
    assert caught.value.field == field
    assert len(str(caught.value)) < 300


def test_unknown_fields_are_ignored_and_null_is_absent() -> None:
    hello = decode_control(
        encode_control(
            "hello", version=1, options={"seed": 3, "mood": "good", "top_k": None}, x=[1]
        )
    )
    assert hello == Hello(1, None, None, {"seed": 3})
    assert decode_control('{"type":"interrupt","played":null}') == Interrupt(None)
    assert decode_control('{"type":"text","seq":1,"text":"\\ud800"}') == TextIn(1, "\ud800")


def jpeg(width: int, height: int, **options) -> bytes:
    out = io.BytesIO()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(out, options.pop("format", "JPEG"), **options)
    return out.getvalue()


@settings(deadline=None, max_examples=100)
@given(
    width=st.integers(1, 65_535),
    height=st.integers(1, 65_535),
    patch=st.sampled_from([1, 14, 40]),
    columns=st.integers(0, 1),
    tokens=st.integers(2, 300),
)
def test_a_fitted_picture_fits(width, height, patch, columns, tokens) -> None:
    grid = FrameGrid(patch=patch, extra_columns=columns, max_tokens=tokens)
    fitted = fitted_size(width, height, grid)
    assert 1 <= fitted[0] <= width and 1 <= fitted[1] <= height
    padded = [-(-size // patch) * patch for size in fitted]
    assert grid.tokens(padded[1], padded[0]) <= tokens


@pytest.mark.parametrize("size", [(640, 480), (1, 1), (41, 39), (1280, 720), (900, 3)])
def test_a_jpeg_becomes_whole_patches(size: tuple[int, int]) -> None:
    frame = decode_jpeg(jpeg(*size, quality=90), GRID)
    assert frame.dtype == np.uint8 and frame.shape[0] % 40 == frame.shape[1] % 40 == 0
    assert GRID.tokens(*frame.shape[:2]) <= GRID.max_tokens and frame.any()


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colours_become_rgb(mode: str) -> None:
    out = io.BytesIO()
    Image.new(mode, (40, 40)).save(out, "JPEG")
    assert decode_jpeg(out.getvalue(), GRID).shape == (40, 40, 3)


def bomb(width: int, height: int) -> bytes:
    """A small file whose header claims a very large picture."""
    data = bytearray(jpeg(8, 8))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no JPEG"),
        (b"\xff\xd8\xff", "no JPEG"),
        (jpeg(80, 80)[:400], "no JPEG"),
        (jpeg(80, 80, format="PNG"), "no JPEG"),
        (bomb(65_500, 65_500), "no JPEG|pixels"),
        (bomb(MAX_PIXELS // 1024 + 1, 1024), "pixels"),
        (jpeg(80, 80) + b"\xff\xda" * 40, "scans"),
    ],
)
def test_bad_jpegs_are_refused_before_they_cost_anything(data: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message) as caught:
        decode_jpeg(data, GRID)
    assert caught.value.code is ErrorCode.BAD_FRAME


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_damaged_jpeg_is_a_picture_or_a_protocol_error(data: st.DataObject) -> None:
    damaged = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        frame = decode_jpeg(bytes(damaged), GRID)
    except ProtocolError:
        return
    assert GRID.tokens(*frame.shape[:2]) <= GRID.max_tokens


GOOD = jpeg(48, 40)


def test_a_raw_frame_must_be_whole_patches() -> None:
    good = Media(Kind.RGB, 0, 0, memoryview(bytes(40 * 80 * 3)), 0, 80, 40)
    assert raw_frame(good, GRID).shape == (40, 80, 3)
    for width, height in ((81, 40), (80, 41), (4000, 4000)):
        bad = Media(Kind.RGB, 0, 0, memoryview(b""), 0, width, height)
        with pytest.raises(ProtocolError, match=r"multiples of 40|tokens"):
            raw_frame(bad, GRID)
