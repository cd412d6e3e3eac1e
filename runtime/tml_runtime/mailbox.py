"""The way in and out of a session: bounded lock-free rings, and media sorted into tick windows.

The client thread puts messages into the input rings and gets them from the output ring; the tick
thread does the reverse. Nothing else is shared, nothing blocks, and all of it is made when the
session opens and dies with it, so a slot's next session cannot see what the last one left.

Media times inside are whole: audio in samples since the session opened, video in nanoseconds.
Worked example at 16 kHz and 200 ms: a piece of 320 samples at t = 0.19 s is samples 3040..3359; the
first 160 fill window 0 to its end, the others begin window 1.
"""

# Dimension key: N samples in a window, K output steps, H_W_3 rows and columns of an RGB frame.

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from . import _tick
from ._tick import Ring
from .checks import FrameGrid
from .conceal import Concealer
from .handoff.line import Line

SHED_VIDEO, SHED_TEXT = 1, 2  # how much of a tick's input is left out under overload
MAX_QUEUED = 512  # messages per ring, so that one client's tiny pieces cannot stretch a tick

_AUDIO = struct.Struct("<q")  # first sample
_FRAME = struct.Struct("<qiii")  # stamp in ns, height, width, place in the pool
_OUTPUT = struct.Struct("<qqii")  # window, epoch, tokens, samples
_SLACK = 64  # bytes per message for the ring's own header and padding


@dataclass(frozen=True)
class MailboxSpec:
    """Sizes and bounds of a session's queues."""

    window_ns: int
    window_samples: int
    num_windows: int  # H: how far ahead of the oldest open window input may lie
    grid: FrameGrid
    max_frame_pairs: int  # per window, as far as the grid's tokens go; the newest are kept
    video_queue_frames: int  # that always find room, whatever open windows and past ticks hold
    max_text_tokens: int  # per tick; the rest waits for the next
    text_queue_tokens: int
    output_queue_ticks: int
    max_output_samples: int  # per tick
    max_output_tokens: int  # per tick
    mel_shape: tuple[int, int]  # of a tick's speech: frames, bands
    past_ticks: int  # how far back speech can be taken back that was never heard
    silence: int  # the token for nothing to say
    quiet: float  # the level of a mel band without sound

    @property
    def sample_rate(self) -> int:
        return self.window_samples * 1_000_000_000 // self.window_ns

    @property
    def pool_frames(self) -> int:
        """Frames that a session holds at most: in its queue, open windows and past ticks."""
        per_window = 2 * self.max_frame_pairs
        return self.video_queue_frames + per_window * (self.num_windows + self.past_ticks + 2)


Pair = tuple[np.ndarray, np.ndarray]  # uint8 [H, W, 3], of one size


class Window(NamedTuple):
    """What the model sees of one window, apart from the samples, and what it does not see."""

    missing_samples: int
    pairs: list[Pair] | None  # valid for the next `past_ticks` of `take`
    text: list[int]
    dropped_samples: int  # came as their window closed, or their tick was skipped
    shed_frames: int  # these too, and those beyond what a tick takes


class AudioWindows:
    """Samples by media time, in windows; see `_tick.AudioWindows`. Those that nobody wrote are
    concealed and counted."""

    def __init__(self, num_windows: int, window_samples: int, sample_rate: int) -> None:
        self._windows = _tick.AudioWindows(num_windows, window_samples)
        self._have_N = np.zeros(window_samples, np.bool_)
        self._concealer = Concealer(window_samples, sample_rate)
        self._oldest = 0  # window

    def forget_before(self, window: int) -> int:
        """Close the windows before `window` untaken; returns how many samples that drops."""
        if window <= self._oldest:
            return 0
        self._concealer.forget()
        self._oldest = window
        return self._windows.forget_before(window)

    def write(self, start: int, pcm: np.ndarray) -> int:
        """Put `pcm` at sample `start`; returns how many samples of it fall in a closed window."""
        return self._windows.write(start, pcm.data)

    def drain(self, ring: Ring) -> int:
        """Write the pieces in a ring, at most MAX_QUEUED; returns as `write`."""
        return self._windows.drain(ring, MAX_QUEUED)

    def take(self, window: int, out_N: np.ndarray) -> int:
        """Copy the oldest open window out and close it; returns how many samples are missing."""
        assert window == self._oldest
        missing = self._windows.take(out_N.data, self._have_N.data)
        if missing > 0:
            self._concealer.fill(out_N, self._have_N)
        else:
            self._concealer.pass_by(out_N)
        self._oldest += 1
        return missing


class Frame(NamedTuple):
    """One that lies in a pool."""

    place: int
    pixels_H_W_3: np.ndarray


class FramePool:
    """Room for a session's frames, made once: the client takes a place, the tick thread gives it
    back. A frame is copied into it and then, by the tick that shows it, into what is staged."""

    def __init__(self, num_frames: int, max_bytes: int) -> None:
        self._bytes = np.empty((num_frames, max_bytes), np.uint8)
        self._free = deque(range(num_frames))  # the place freed last is taken first: it is cached

    def put(self, frame_H_W_3: np.ndarray) -> int | None:
        """The place of a copy; None where there is no room."""
        try:
            place = self._free.pop()
        except IndexError:
            return None
        self.at(place, *frame_H_W_3.shape[:2])[:] = frame_H_W_3
        return place

    def at(self, place: int, height: int, width: int) -> np.ndarray:
        return self._bytes[place, : height * width * 3].reshape(height, width, 3)

    def free(self, place: int) -> None:
        self._free.append(place)


class FrameWindows:
    """Video frames by media time; each window keeps its newest, at most `2 * max_pairs`.

    Frames are paired in the order of their stamps, two by two; an odd one out, the newest, is
    paired with itself, so that no frame waits a tick for its partner. A window has one frame size,
    that of its newest frame, and as many pairs as its tokens allow. A frame with the stamp of
    another replaces it. What is not taken is shed. The pool gets a frame back when it is shed, or
    `past_ticks` takes after its own.
    """

    def __init__(
        self, num_windows: int, max_pairs: int, grid: FrameGrid, pool: FramePool, past_ticks: int
    ) -> None:
        self._frames: list[dict[int, Frame]] = [{} for _ in range(num_windows)]
        self._max_pairs = max_pairs
        self._grid = grid
        self._pool = pool
        self._taken: deque[list[Frame]] = deque()
        self._past_ticks = past_ticks
        self._oldest = 0  # window

    def forget_before(self, window: int) -> int:
        """Close the windows before `window` untaken; returns how many frames that sheds."""
        shed = 0
        for skipped in range(self._oldest, min(window, self._oldest + len(self._frames))):
            frames = self._frames[skipped % len(self._frames)]
            shed += self._shed(frames.values())
            frames.clear()
        self._oldest = max(self._oldest, window)
        return shed

    def write(self, window: int, stamp: int, frame: Frame) -> int:
        """Keep a frame for `window`; returns how many frames that sheds."""
        if window < self._oldest:
            return self._shed([frame])
        assert window < self._oldest + len(self._frames)
        frames = self._frames[window % len(self._frames)]
        replaced = frames.pop(stamp, None)
        frames[stamp] = frame
        if replaced is not None:
            return self._shed([replaced])
        return self._shed([frames.pop(min(frames))]) if len(frames) > 2 * self._max_pairs else 0

    def take(self, window: int) -> tuple[list[Pair] | None, int]:
        """The oldest open window's pairs, if any, and how many frames were shed."""
        assert window == self._oldest
        self._oldest += 1
        frames = self._frames[window % len(self._frames)]
        if not frames:
            return None, 0
        height, width, _ = shape = frames[max(frames)].pixels_H_W_3.shape
        room = min(self._max_pairs, self._grid.max_tokens // self._grid.tokens(height, width))
        fitting = [t for t in sorted(frames) if frames[t].pixels_H_W_3.shape == shape]
        chosen = [frames.pop(t) for t in fitting[-2 * room :]]
        shed = self._shed(frames.values())
        frames.clear()
        self._keep(chosen)
        seen = [frame.pixels_H_W_3 for frame in chosen]
        if len(seen) % 2:
            seen.append(seen[-1])
        return list(zip(seen[::2], seen[1::2], strict=True)), shed

    def _keep(self, taken: list[Frame]) -> None:
        self._taken.append(taken)
        if len(self._taken) > self._past_ticks + 1:
            self._shed(self._taken.popleft())

    def _shed(self, frames: Iterable[Frame]) -> int:
        """How many."""
        places = [frame.place for frame in frames]
        for place in places:
            self._pool.free(place)
        return len(places)


class Inbox:
    """Input of one session. `put_*` is the client's side, `take` the tick thread's.

    The client may be up to `num_windows` ahead of the oldest window it knows to be open; the tick
    thread may have closed that one already, so one window more is held.
    """

    def __init__(self, spec: MailboxSpec) -> None:
        self._spec = spec
        audio_bytes = spec.num_windows * spec.window_samples * 4
        self._audio = Ring(2 * audio_bytes + MAX_QUEUED * _SLACK)
        self._video = Ring(spec.pool_frames * (_FRAME.size + _SLACK))
        self._pool = FramePool(spec.pool_frames, spec.grid.max_bytes)
        self._text = Ring(spec.text_queue_tokens * 4 + MAX_QUEUED * _SLACK)
        self._samples = AudioWindows(spec.num_windows + 1, spec.window_samples, spec.sample_rate)
        self._frames = FrameWindows(
            spec.num_windows + 1, spec.max_frame_pairs, spec.grid, self._pool, spec.past_ticks
        )
        self._pending_text: deque[int] = deque()
        self.line: Line | None = None  # to a background model; set before the first `take`

    def put_audio(self, start: int, pcm: np.ndarray) -> bool:
        return _put(self._audio, _AUDIO.pack(start), np.ascontiguousarray(pcm).data)

    def put_frame(self, stamp: int, frame_H_W_3: np.ndarray) -> bool:
        place = self._pool.put(frame_H_W_3)
        if place is None:
            return False
        height, width, _ = frame_H_W_3.shape
        return self._video.push(_FRAME.pack(stamp, height, width, place))

    def put_text(self, ids: Sequence[int] | np.ndarray) -> bool:
        return _put(self._text, np.asarray(ids, np.int32).data)

    def take(self, window: int, pcm_N: np.ndarray, shed: int = 0) -> Window:
        """Everything of `window`, its samples in `pcm_N`; all windows up to it are closed.

        Bounded work: at most MAX_QUEUED messages per ring. Text has no media time: the oldest
        `max_text_tokens` ids are taken, and the rest stays in order. shed: 0 nothing, 1 the
        window's frames, 2 text waits too.
        """
        dropped = self._samples.forget_before(window) + self._samples.drain(self._audio)
        num_shed = self._frames.forget_before(window) + self._sort_frames()
        if shed >= SHED_VIDEO:
            num_shed += self._frames.forget_before(window + 1)
        missing = self._samples.take(window, pcm_N)
        pairs, shed_at_take = (None, 0) if shed >= SHED_VIDEO else self._frames.take(window)
        text = [] if shed >= SHED_TEXT else self._next_text(window)
        return Window(missing, pairs, text, dropped, num_shed + shed_at_take)

    def pass_by(self, window: int) -> tuple[int, int]:
        """Close all windows up to `window` unheard; (samples dropped, frames shed). Text waits."""
        dropped = self._samples.forget_before(window) + self._samples.drain(self._audio)
        shed = self._frames.forget_before(window) + self._sort_frames()
        dropped += self._samples.forget_before(window + 1)
        return dropped, shed + self._frames.forget_before(window + 1)

    def _sort_frames(self) -> int:
        shed = 0
        for _ in range(MAX_QUEUED):
            message = self._video.pop()
            if message is None:
                break
            stamp, height, width, place = _FRAME.unpack(message)
            frame = Frame(place, self._pool.at(place, height, width))
            shed += self._frames.write(stamp // self._spec.window_ns, stamp, frame)
        return shed

    def _next_text(self, window: int) -> list[int]:
        pending, limit = self._pending_text, self._spec.max_text_tokens
        while len(pending) < limit:  # so what does not fit stays in the bounded ring
            message = self._text.pop()
            if message is None:
                break
            pending.extend(np.frombuffer(message, np.int32).tolist())
        if self.line is None:
            return [pending.popleft() for _ in range(min(limit, len(pending)))]
        # of an odd limit, 1 too, each has the larger half every other time
        wanted = min(len(pending), (limit + window % 2) // 2)
        given = self.line.take(window, limit - wanted)
        own = [pending.popleft() for _ in range(min(limit - len(given), len(pending)))]
        self.line.read(window, text := own + given)
        return text


class Output(NamedTuple):
    """What one tick said to a session. epoch: how often it had been interrupted by then."""

    window: int
    epoch: int
    token_K: np.ndarray  # int32
    pcm: np.ndarray  # float32; read-only


class Outbox:
    """Output of one session: `put` is the tick thread's side, `get` the client's.

    Bounded: when the client does not poll, what is queued stays and new output is lost.
    """

    def __init__(self, spec: MailboxSpec) -> None:
        self._limits = spec.max_output_tokens, spec.max_output_samples
        self._ring = Ring(spec.output_queue_ticks * (_OUTPUT.size + 4 * sum(self._limits) + _SLACK))

    def put(self, window: int, epoch: int, token_K: np.ndarray, pcm: np.ndarray) -> bool:
        """Whether there was room. Copies both arrays. ValueError for more than a tick says."""
        tokens, samples = sizes = len(token_K), len(pcm)
        if tokens > self._limits[0] or samples > self._limits[1]:
            raise ValueError(f"output: {sizes} tokens and samples, a tick has {self._limits}")
        head = _OUTPUT.pack(window, epoch, tokens, samples)
        token_K = np.ascontiguousarray(token_K, np.int32)
        pcm = np.ascontiguousarray(pcm, np.float32)
        return self._ring.push(head, token_K.data, pcm.data)

    def get(self) -> Output | None:
        message = self._ring.pop()
        if message is None:
            return None
        window, epoch, num_tokens, num_samples = _OUTPUT.unpack_from(message)
        token_K = np.frombuffer(message, np.int32, num_tokens, _OUTPUT.size)
        pcm = np.frombuffer(message, np.float32, num_samples, _OUTPUT.size + 4 * num_tokens)
        return Output(window, epoch, token_K, pcm)


def _put(ring: Ring, *message: bytes | memoryview) -> bool:
    return len(ring) < MAX_QUEUED and ring.push(*message)
