"""An episode while it is made: sound, pictures and text come in, words go out, tick by tick."""

# Dimension key: T ticks, W samples of a tick, Y frame side.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .line import PACKET_MS, lose_packets, lost_packets
from .speech import Footage, Speech
from .words import CONFIG, ID, NUMBERS

RATE = CONFIG.layout.sample_rate
WINDOW = CONFIG.layout.samples_per_tick
SIDE = CONFIG.patch.patch  # one patch a frame pair: one token
MAX_DELAY = 8  # ticks
CUE_HZ, ASK_HZ = 1000.0, 2200.0
OTHER_HZ = ((420.0, 800.0), (1300.0, 1750.0), (2800.0, 3400.0))
SQUARE = 10  # side of what moves, in pixels
# Of a loose episode, whose cues keep to no tick's begin, as a line brings them:
EARLY_S = 0.06  # how much of a tone may lie in the tick before
LATE_S = 0.15  # how far into its tick an interruption may begin
ACROSS = 0.12  # of its flashes: a tick's second frame and the next one's first
LOSSY = 0.6  # of loose episodes: packets are lost
LOST_PACKETS = (0.01, 0.08)


@dataclass(frozen=True)
class Event:
    """Something that a score looks at. kind: due, count, interruption or backchannel; word: what
    is to be said, or how many there were."""

    kind: str
    tick: int
    word: int = 0


@dataclass(frozen=True)
class Episode:
    """What a session is given tick by tick, and what it is to say at the first step of each."""

    task: str
    pcm_T_W: np.ndarray  # float32
    frames_T_2_Y_Y_3: np.ndarray  # uint8
    seen_T: np.ndarray  # bool: there are frames
    missing_T: np.ndarray  # bool
    text: tuple[tuple[int, ...], ...]
    said_T: np.ndarray  # int64, `silence` where nothing is to be said
    events: tuple[Event, ...]
    speech_T: np.ndarray  # bool: somebody talks

    def __len__(self) -> int:
        return len(self.said_T)


@dataclass
class Stage:
    """Tracks of one episode. Everything is placed by ticks; what lies beyond the end is cut."""

    num_ticks: int
    rng: np.random.Generator
    speech: Speech
    footage: Footage
    pace: float = 1.0  # of events; for this and the next three see `make_episode`
    talks: float = 0.5
    delays: int = MAX_DELAY
    loose: bool = False
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = (self.num_ticks, 2, SIDE, SIDE, 3)
        self.pcm = np.zeros(self.num_ticks * WINDOW, np.float32)
        self.frames = self.footage.excerpt(self.rng, 2 * self.num_ticks).reshape(shape)
        self.text: list[list[int]] = [[] for _ in range(self.num_ticks)]
        self.said = np.zeros(self.num_ticks, np.int64)
        self.busy = np.zeros(self.num_ticks, bool)  # ticks in which something happens
        self.cued = np.zeros(self.num_ticks, bool)  # of these, by what is heard, seen or read
        self.talking = np.zeros(self.num_ticks, bool)

    def read(self, tick: int, *words: str | int) -> None:
        """A number is read as its word."""
        names = [NUMBERS[word] if isinstance(word, int) else word for word in words]
        self.text[tick] += [ID[name] for name in names]
        self._happens(tick, tick + 1)

    def say(self, tick: int, word: str, kind: str = "due") -> None:
        if 0 <= tick < self.num_ticks:
            self.said[tick] = ID[word]
            self.busy[tick] = True
            self.events.append(Event(kind, tick, ID[word]))

    def tone(self, tick: int, hz: float | None = None) -> None:
        """120 to 200 ms that begin in the tick, at least 80 ms of them in it; in a loose episode up
        to EARLY_S before it, and at least 60 ms. None: neither CUE_HZ nor ASK_HZ."""
        if hz is None:
            hz = self.rng.uniform(*OTHER_HZ[self.rng.integers(len(OTHER_HZ))])
        seconds = self.rng.uniform(0.12, 0.2)
        t = np.arange(round(seconds * RATE)) / RATE
        wave = np.sin(2 * np.pi * hz * self.rng.uniform(0.99, 1.01) * t + self.rng.uniform(0, 6))
        wave *= np.clip(np.minimum(t, seconds - t) / 0.01, 0, 1) * self.rng.uniform(0.12, 0.4)
        early = round(EARLY_S * RATE) if self.loose else 0
        offset = self.rng.integers(round(0.12 * RATE) + early) - early
        self._mix(max(0, tick * WINDOW + offset), wave)
        self._happens(tick - int(self.loose), tick + 2)

    def flash(self, tick: int, *, other: bool = False) -> None:
        """One or both frames are white; other: half of a frame is coloured. In a loose episode both
        may lie in two ticks, of which the first is the flash's."""
        first, count = ((0, 1), (1, 1), (0, 2))[self.rng.integers(3)]
        if self.loose and self.rng.random() < ACROSS:
            first, count = 1, 2
        begin, end = 2 * tick + first, min(2 * tick + first + count, 2 * self.num_ticks)
        for frame in range(begin, end):
            picture = self.frames[frame // 2, frame % 2]
            if other:
                colour = np.eye(3, dtype=np.uint8)[self.rng.integers(3)] * 200
                half = slice(0, SIDE // 2) if self.rng.random() < 0.5 else slice(SIDE // 2, SIDE)
                picture[:, half] = colour
            else:
                picture[:] = self.rng.integers(225, 256)
        self._happens(tick, (end + 1) // 2)

    def move(self, begin: int, heights: Sequence[float]) -> None:
        """A bright square at a height of 0 (bottom) to 1 for every frame from a tick's first on."""
        column = int(self.rng.integers(4, SIDE - SQUARE - 4))
        shade = self.rng.integers(170, 221)
        for n, height in enumerate(heights):
            tick, frame = begin + n // 2, n % 2
            if tick < self.num_ticks:
                row = 2 + round((SIDE - SQUARE - 4) * (1 - height))
                picture = self.frames[tick, frame]
                picture[:] = picture // 3  # dim behind it
                picture[row : row + SQUARE, column : column + SQUARE] = shade
        self._happens(begin, begin + -(-len(heights) // 2))

    def talk(self, begin: int, end: int) -> None:
        """Somebody talks in these ticks, of whom the recording has its own pauses."""
        count = (min(end, self.num_ticks) - begin) * WINDOW
        if count > 0:
            self._mix(begin * WINDOW, self.speech.excerpt(self.rng, count))
            self.talking[begin:end] = True

    def speak_up(self, tick: int, seconds: float, offset: float = 0.0) -> None:
        """Speech without a pause, from `offset` seconds into the tick on."""
        wave = self.speech.dense(self.rng, round(seconds * RATE))
        self._mix(tick * WINDOW + round(offset * RATE), wave)
        last = tick + int((offset + seconds) * RATE / WINDOW) + 1
        self._happens(tick, last)
        self.talking[tick:last] = True

    def finish(self, task: str, *, lose: float, sees: bool) -> Episode:
        """Noise goes under everything; a share of ticks in which nothing happens is lost. In a
        loose episode something may be due in them, and packets are lost of any tick."""
        noise = self.rng.standard_normal(len(self.pcm)) * 10 ** self.rng.uniform(-4.5, -2.3)
        pcm = (self.pcm + noise).astype(np.float32).reshape(self.num_ticks, WINDOW)
        kept = self.cued if self.loose else self.busy
        missing = (self.rng.random(self.num_ticks) < lose) & ~kept
        if self.loose:
            lost_J = np.repeat(missing, WINDOW * 1000 // RATE // PACKET_MS)
            if self.rng.random() < LOSSY:
                lose = max(lose, self.rng.uniform(*LOST_PACKETS))
                lost_J |= lost_packets(len(lost_J), lose, self.rng)
            missing = lose_packets(pcm, lost_J, RATE)
        else:
            pcm[missing] = 0.0
        unseen = (self.rng.random(self.num_ticks) < lose) & ~kept
        return Episode(
            task=task,
            pcm_T_W=np.clip(pcm, -1.0, 1.0),
            frames_T_2_Y_Y_3=self.frames,
            seen_T=np.full(self.num_ticks, sees) & ~unseen,
            missing_T=missing,
            text=tuple(tuple(ids) for ids in self.text),
            said_T=self.said,
            events=tuple(self.events),
            speech_T=self.talking,
        )

    def _happens(self, begin: int, end: int) -> None:
        self.busy[begin:end] = True
        self.cued[begin:end] = True

    def _mix(self, start: int, wave: np.ndarray) -> None:
        part = self.pcm[start : start + len(wave)]
        part += wave[: len(part)].astype(np.float32)
