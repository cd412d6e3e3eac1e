"""Queues and clocks of one connection, without one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tml_runtime.errors import InputValueError
from tml_runtime.serve.limits import Limits, TokenBucket
from tml_runtime.serve.outbox import Outbox
from tml_runtime.serve.playback import Playback
from tml_runtime.serve.protocol import Kind, decode_media
from tml_runtime.session import ActionOut, SpeechOut, TextOut

RATE = 16_000


def speech(t: float, seconds: float = 0.2) -> SpeechOut:
    return SpeechOut(np.full(round(seconds * RATE), 0.5, np.float32), t, RATE)


def outbox(**options) -> Outbox:
    return Outbox(**{"max_items": 100, "max_bytes": 10**6, "sample_rate": RATE, **options})


def media(data: bytes | str):
    assert isinstance(data, bytes)
    return decode_media(data, kinds=(Kind.SPEECH,))


def test_speech_goes_in_pieces_that_wait_for_their_time() -> None:
    box = outbox()
    assert box.put(speech(1.0), 4) == 0
    assert box.put(ActionOut("yield", 1.05), 4) == 0
    assert box.take(RATE - 801, lead=800, stale=RATE) is None
    assert box.next_start() == RATE
    assert (box.oldest_seq, box.next_seq) == (0, 3)
    first = box.take(RATE - 800, lead=800, stale=RATE)
    assert first is not None and len(media(first.data).payload) == 2 * RATE // 10
    assert (media(first.data).stamp, media(first.data).epoch) == (RATE, 4)
    assert box.sent_end == RATE + RATE // 10
    second, action = (box.take(2 * RATE, lead=0, stale=RATE) for _ in range(2))
    assert second is not None and action is not None
    assert [media(first.data).seq, media(second.data).seq] == [0, 1]
    assert json.loads(action.data) == {
        "type": "action", "seq": 2, "epoch": 4, "stamp": round(1.05 * RATE), "name": "yield",
    }  # fmt: skip
    assert box.take(2 * RATE, lead=0, stale=RATE) is None and len(box) == 0
    assert box.oldest_seq == box.next_seq == 3


def test_stale_speech_is_dropped_and_text_is_not() -> None:
    box = outbox()
    box.put(speech(0.0, 0.1), 0)
    box.put(TextOut("a", (97,), 0.1), 0)
    box.put(speech(5.0, 0.1), 0)
    items = [box.take(6 * RATE, lead=0, stale=RATE) for _ in range(2)]
    assert [item is not None and item.speech for item in items] == [False, True]
    assert box.stale == 1 and box.lost == 0


def test_a_full_outbox_loses_the_newest_and_counts() -> None:
    box = outbox(max_items=2)
    assert box.put(speech(0.0, 0.3), 0) == 1
    assert box.put(TextOut("a", (97,), 0.0), 0) == 1
    assert (box.lost, box.next_seq, len(box)) == (2, 4, 2)
    small = outbox(max_bytes=5000)
    assert small.put(speech(0.0, 0.2), 0) == 1  # two pieces of 3224 bytes
    assert small.take(RATE, lead=0, stale=10 * RATE) is not None
    assert small.put(speech(0.2, 0.1), 0) == 0  # there is room again


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4)), max_size=30), st.integers(1, 10))
def test_nothing_old_is_left_behind_a_fence_and_every_output_is_accounted_for(steps, room) -> None:
    box, epoch, taken, now = outbox(max_items=room), 0, 0, 0
    for interrupt, count in steps:
        for _ in range(count):
            box.put(TextOut("x", (120,), now / RATE), epoch)
            now += 100
        if interrupt:
            epoch += 1
            box.fence(epoch)
            assert len(box) == 0
        elif (item := box.take(now, lead=0, stale=RATE)) is not None:
            assert item.epoch == epoch
            taken += 1
    assert box.next_seq == taken + box.lost + box.fenced + len(box)
    assert len(box) <= room


def test_playback_plays_what_came_and_waits_where_nothing_did() -> None:
    playback = Playback(RATE)
    assert playback.position(3.0) == 0
    playback.received(3200, 1600, 5.0)
    assert playback.position(5.05) == 4000 and playback.position(5.12) == 4800
    playback.received(4800, 1600, 5.15)  # it had waited since 5.10
    assert playback.position(5.15) == 4800 and playback.position(5.2) == 5600
    playback.received(6400, 1600, 5.2)  # while the one before plays
    assert playback.position(5.3) == 7200
    assert playback.stop(5.3) == 7200 == playback.position(9.0)


def test_playback_starts_again_behind_a_hole() -> None:
    playback = Playback(RATE)
    playback.received(0, 1600, 0.0)
    playback.received(16_000, 1600, 0.5)
    assert playback.position(0.55) == 16_800


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 5)), min_size=1, max_size=40))
def test_a_bucket_gives_no_more_than_its_rate(steps: list[tuple[float, float]]) -> None:
    bucket, now, given_away = TokenBucket(rate=5.0, burst_s=1.0), 0.0, 0.0
    for wait, units in steps:
        now += wait
        given_away += units if bucket.take(units, now_s=now) else 0.0
        assert given_away <= 5.0 * (1.0 + now) + 1e-6


@pytest.mark.parametrize(
    "wrong", [{"grace_s": -1.0}, {"grace_s": float("nan")}, {"queue_items": 0}, {"lead_s": 1e999}]
)
def test_limits_are_checked(wrong: dict) -> None:
    with pytest.raises(InputValueError, match=next(iter(wrong))):
        Limits(**wrong)
