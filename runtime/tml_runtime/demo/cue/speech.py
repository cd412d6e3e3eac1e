"""Real speech and footage for episodes: excerpts of recordings, drawn from a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..decode import SAMPLE_RATE

FRAME = 1600  # samples of 100 ms, in which loudness is looked at
TRIES = 8
# of a grey field: a white frame has 225 and more. The patch embedding's norms take brightness away,
# so that all but this much of what is lighter than a middle grey looks alike, unless it is learnt
LIGHTEST = 195.0


@dataclass(frozen=True)
class Speech:
    """Recordings at 16 kHz by name. No two excerpts are alike: pitch, loudness and tone differ."""

    recordings: Mapping[str, np.ndarray]
    varied: bool = False  # far higher and lower, backwards, through other microphones, two at once
    loudness: Mapping[str, float] = field(default_factory=dict)  # root mean squares, when made once

    def __post_init__(self) -> None:
        if not self.loudness:
            loudness = {name: _loudness(pcm) for name, pcm in self.recordings.items()}
            object.__setattr__(self, "loudness", loudness)

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each recording's samples, by which a model tells what it was trained on."""
        return {name: digest(pcm) for name, pcm in self.recordings.items()}

    def excerpt(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """float32 [count], from anywhere in a recording, which begins anew at its end."""
        return self._excerpt(rng, count) * rng.uniform(0.03, 0.12)

    def dense(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """An excerpt whose softest 100 ms are the loudest of several tries."""
        tries = [self._excerpt(rng, count) for _ in range(TRIES)]
        best = max(tries, key=lambda pcm: _softest(pcm))
        fade = np.clip(np.minimum(np.arange(count), np.arange(count)[::-1]) / 160, 0, 1)
        return (best * fade * rng.uniform(0.06, 0.15)).astype(np.float32)

    def _excerpt(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Of unit power, as far as the recording's loudness is even."""
        drawn = self._voice(rng, count)
        if self.varied and rng.random() < 0.2:
            drawn += rng.uniform(0.2, 1.0) * self._voice(rng, count)
        return drawn

    def _voice(self, rng: np.random.Generator, count: int) -> np.ndarray:
        name = sorted(self.recordings)[rng.integers(len(self.recordings))]
        pcm = self.recordings[name]
        pace = rng.uniform(0.85, 1.18)
        if self.varied and rng.random() < 0.6:
            pace = (0.6 * 2.5 ** rng.random()) * rng.choice((1.0, 1.0, -1.0))
        at = rng.integers(len(pcm)) + pace * np.arange(count)
        low = int(np.floor(at.min()))
        raw = np.take(pcm, np.arange(low, int(at.max()) + 2), mode="wrap")
        drawn = np.interp(at - low, np.arange(len(raw)), raw)
        tilt = rng.uniform(-0.4, 0.6)  # of the spectrum, towards low or high
        drawn[1:] = drawn[1:] - tilt * drawn[:-1]
        if self.varied and rng.random() < 0.6:
            drawn = _equalised(drawn, rng)
        loud = self.loudness[name] * (1 - min(tilt, 0.5))
        return (drawn / max(loud, 1e-6)).astype(np.float32)


@dataclass(frozen=True)
class Footage:
    """Clips at two frames a tick, uint8 [n, side, side, 3], by name; there may be none."""

    clips: Mapping[str, np.ndarray]
    side: int
    varied: bool = False  # clips mirrored, recoloured, faster and slower, and other moving patterns

    @property
    def hashes(self) -> dict[str, str]:
        return {name: digest(frames) for name, frames in self.clips.items()}

    def excerpt(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """uint8 [count, side, side, 3] to be drawn on: a clip, or a still picture with noise;
        varied ones may be cut between two scenes."""
        frames = self._scene(rng, count)
        if self.varied and rng.random() < 0.5:
            other, at = self._scene(rng, count), int(rng.integers(1, 80))
            while at < count:
                end = at + int(rng.integers(2, 40))
                frames[at:end] = other[at:end]
                at = end + int(rng.integers(2, 80))
        if self.varied and rng.random() < 0.4:
            self._pass_through(frames, rng)
        return frames

    def _pass_through(self, frames: np.ndarray, rng: np.random.Generator) -> None:
        """Light and dark things that drive through the picture now and then, and hide up to three
        quarters of it."""
        at, side = int(rng.integers(1, 60)), self.side
        while at < len(frames):
            height, width = int(rng.integers(side // 4, 3 * side // 4 + 1)), rng.integers(10, 90)
            top = int(rng.integers(side - height + 1))
            shade = rng.uniform(40, 250) * rng.uniform(0.8 if rng.random() < 0.5 else 0.97, 1.0, 3)
            speed = rng.uniform(3, 30)
            for n, frame in enumerate(frames[at : at + int((side + width) / speed) + 1]):
                right = int(speed * n)
                left = max(0, right - int(width))
                part = slice(left, right) if speed % 2 < 1 else slice(side - right, side - left)
                frame[top : top + height, max(0, part.start) : max(0, part.stop)] = shade
            at += int(rng.integers(5, 100))

    def _scene(self, rng: np.random.Generator, count: int) -> np.ndarray:
        if self.varied and rng.random() < 0.7:
            scene = self._clip_changed if rng.random() < 0.5 else self._pan
            frames = scene(rng, count)
            return self._behind_surfaces(frames, rng) if rng.random() < 0.4 else frames
        if self.clips and rng.random() < 0.5:
            clip = self.clips[sorted(self.clips)[rng.integers(len(self.clips))]]
            frames = np.take(clip, rng.integers(len(clip)) + np.arange(count), axis=0, mode="wrap")
            return (frames * rng.uniform(0.4, 0.9)).astype(np.uint8)
        corners = rng.uniform(10, 150, (2, 2, 3))
        if self.varied and rng.random() < 0.5:
            corners = _grey(rng.uniform(10, LIGHTEST, (2, 2, 1)), rng)
        ramp = np.linspace(0, 1, self.side)
        rows = corners[0][None] * (1 - ramp[:, None, None]) + corners[1][None] * ramp[:, None, None]
        still = rows[:, :1] * (1 - ramp[None, :, None]) + rows[:, 1:] * ramp[None, :, None]
        noise = rng.normal(0, rng.uniform(0, 8), (count, self.side, self.side, 1))
        return np.clip(still[None] + noise, 0, 255).astype(np.uint8)

    def _clip_changed(self, rng: np.random.Generator, count: int) -> np.ndarray:
        clip = self.clips[sorted(self.clips)[rng.integers(len(self.clips))]]
        pace = rng.uniform(-2.5, 2.5)
        index = (rng.integers(len(clip)) + pace * np.arange(count)).astype(int)
        frames = np.take(clip, index, axis=0, mode="wrap")[..., rng.permutation(3)]
        frames = np.rot90(frames, int(rng.integers(4)), axes=(1, 2))
        frames = np.roll(frames, tuple(rng.integers(self.side, size=2)), axis=(1, 2))
        gain, lift = rng.uniform(0.2, 1.0, 3), rng.uniform(-40, 60)
        if rng.random() < 0.4:  # over-exposed
            gain, lift = rng.uniform(0.8, 1.6) * rng.uniform(0.85, 1.0, 3), rng.uniform(0, 60)
        if rng.random() < 0.5:  # a grey day
            grey = frames.mean(-1, keepdims=True)
            frames = grey + (frames - grey) * rng.uniform(0, 0.5)
            gain = gain.max() * rng.uniform(0.97, 1.0, 3)
        return np.clip(frames * gain + lift, 0, 250).astype(np.uint8)

    def _behind_surfaces(self, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Dimmed behind one to three smooth surfaces, such as a sky, a wall, a road or a car, of
        which some are as light as a flash. A strip of the picture always stays free of them."""
        count, side = len(frames), self.side
        frames = (frames * rng.uniform(0.3, 0.8)).astype(np.uint8)
        row, ramp = (x[:, None, None] for x in (np.arange(side), np.linspace(0, 1, side)))
        first_free = int(rng.integers(side - side // 8 + 1))
        is_free = (row >= first_free) & (row < first_free + side // 8)
        num_surfaces = int(rng.choice((1, 1, 2, 3)))
        for _ in range(num_surfaces):
            height = side * rng.uniform(0.6 if num_surfaces == 1 else 0.2, 1.0)
            sway = rng.uniform(0, side / 4) * np.sin(rng.uniform(0, 0.2) * np.arange(count))
            top = ((side - 0.7 * height) * rng.uniform(-0.3, 1.0) + sway)[:, None, None, None]
            is_hidden = (row >= top) & (row < top + height) & ~is_free
            darkest = 165 if rng.random() < 0.6 else 60
            near, far = _grey(rng.uniform(darkest, 245, (2, 1, 1)), rng)
            noise = rng.normal(0, rng.uniform(0, 8), (count, side, side, 1))
            surface = np.clip(near * (1 - ramp) + far * ramp + noise, 0, 250).astype(np.uint8)
            frames = np.where(is_hidden, surface, frames)
        return np.rot90(frames, int(rng.integers(4)), axes=(1, 2))

    def _pan(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """A camera that moves over fields, coloured or grey, with edges or without."""
        cells = int(rng.integers(2, 12))
        field = rng.uniform(0, 230, (cells, cells, 3)) * rng.uniform(0.3, 1.0)
        if rng.random() < 0.4:  # pale
            field = 255 - (255 - field) * rng.uniform(0.35, 1.0)
        if rng.random() < 0.5:
            field = np.minimum(_grey(field.mean(-1, keepdims=True), rng), LIGHTEST)
        size = -(-2 * self.side // cells)
        fields = np.kron(field, np.ones((size, size, 1)))
        if rng.random() < 0.5:
            fields = _smoothed(fields, size)
        way = (
            rng.integers(2 * self.side, size=2) + rng.uniform(-4, 4, 2) * np.arange(count)[:, None]
        )
        span = np.arange(self.side)
        frames = [
            fields.take(span + y, axis=0, mode="wrap").take(span + x, axis=1, mode="wrap")
            for y, x in way.astype(int)
        ]
        noise = rng.normal(0, rng.uniform(0, 8), (count, self.side, self.side, 1))
        return np.clip(np.stack(frames) + noise, 0, 250).astype(np.uint8)


def _grey(light: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[..., 3] of lightness [..., 1]: nearly no colour, and a tint in all of it."""
    tinted = light * rng.uniform(0.94, 1.0, 3)
    return tinted + rng.normal(0, 4, tinted.shape)


def _smoothed(fields: np.ndarray, size: int) -> np.ndarray:
    """[y, x, 3]: each pixel the mean of `size` squared around it; edges wrap."""
    for axis in (0, 1):
        fields = np.mean([np.roll(fields, n, axis) for n in range(size)], axis=0)
    return fields


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _equalised(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As loud as before, with gains of some 6 dB at frequencies an octave apart."""
    knots_hz = 62.5 * 2.0 ** np.arange(8)
    size = 1 << (len(pcm) - 1).bit_length()
    hz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    gain_db = np.interp(np.log2(hz + 1), np.log2(knots_hz), rng.normal(0, 6, len(knots_hz)))
    filtered = np.fft.irfft(np.fft.rfft(pcm, size) * 10 ** (gain_db / 20), size)[: len(pcm)]
    return filtered * np.sqrt(np.mean(pcm**2) / max(np.mean(filtered**2), 1e-12))


def _loudness(pcm: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(pcm, dtype=np.float64))))


def _softest(pcm: np.ndarray) -> float:
    whole = pcm[: len(pcm) // FRAME * FRAME]
    frames = whole.reshape(-1, FRAME) if len(whole) else pcm[None]
    return float(np.sqrt(np.square(frames).mean(axis=1).min()))
