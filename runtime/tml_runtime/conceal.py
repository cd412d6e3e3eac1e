"""Holes in a session's audio, filled from what is heard on either side of them.

Each side is mirrored into the hole and fades away from it, so there is no step at either edge. On
real speech this halves the difference in dMel levels that zeros make (docs/measured_facts.md), and
needs no search for a pitch.
"""

# Dimension key: N samples in a window.

from __future__ import annotations

import numpy as np

SOURCE_MS = 20  # what is mirrored, to and fro
FADE_MS = 120  # from full to silent
MAX_HOLES = 16  # in a window; where a client makes more of them, the others are zeros


class Bridge:
    """Sound between two pieces, in arrays made once.

    It goes from one to the other, within FADE_MS of each, and is silent where it is farther from
    both. Worked example: a bridge of one sample between 5 and 7 is 6.
    """

    def __init__(self, sample_rate: int) -> None:
        self.source, fade = (ms * sample_rate // 1000 for ms in (SOURCE_MS, FADE_MS))
        to_and_fro = np.concatenate([np.arange(self.source), np.arange(self.source)[::-1]])
        self._mirror = np.resize(to_and_fro, fade)  # distance from the edge
        self._centre = np.arange(fade, dtype=np.float32) + np.float32(0.5)

    def fill(self, before: np.ndarray, after: np.ndarray, out: np.ndarray, faded: int = 0) -> None:
        """Set `out`, at least one sample, from up to `source` samples on either side.

        One side may be empty: then it fades away from the other one. faded: samples between
        `before` and `out`, which were filled when `after` was not known yet.
        """
        fade = len(self._centre)
        reach = min(len(out), fade)
        across = reach if len(after) and len(before) else fade
        out[:] = 0.0
        if len(before) and faded < fade:
            left = slice(faded, min(faded + len(out), fade))
            gain = 1.0 - self._centre[left] / (fade if faded else across)
            mirror = np.minimum(self._mirror[left], len(before) - 1)
            out[: len(gain)] = before[-1 - mirror] * gain
        if len(after):
            gain = 1.0 - self._centre[:reach] / across
            mirror = np.minimum(self._mirror[:reach], len(after) - 1)
            out[len(out) - reach :] += (after[mirror] * gain)[::-1]


class Concealer:
    """Fills one session's windows, in their order. Bounded work; what it makes never grows.

    A hole that reaches its window's end knows its left side only: what follows has not been heard.
    In the next window it goes on from that side, as far as it has faded by then.
    """

    def __init__(self, window_samples: int, sample_rate: int) -> None:
        self._bridge = Bridge(sample_rate)
        self._source = min(self._bridge.source, window_samples)
        # The last window's end, and a window.
        self._line = np.zeros(self._source + window_samples, np.float32)
        # Of a hole that is open at the last window's end: how long it is, and what came before it.
        self._open = 0
        self._before = np.zeros(self._source, np.float32)

    def fill(self, pcm_N: np.ndarray, have_N: np.ndarray) -> None:
        """Conceal in `pcm_N` the samples that `have_N` lacks."""
        source, line = self._source, self._line
        line[source:] = pcm_N
        edges = np.flatnonzero(have_N[1:] != have_N[:-1]) + (source + 1)
        if not have_N[0]:
            edges = np.insert(edges, 0, source)
        goes_on = 0 if have_N[0] else self._open
        open_at = len(line) if have_N[-1] else int(edges[-1])
        is_filled = len(edges) <= 2 * MAX_HOLES  # the hole that is open at the end
        edges = [*edges.tolist(), len(line), len(line)]  # what is heard last reaches to the end
        for i in range(0, min(len(edges) - 2, 2 * MAX_HOLES), 2):
            begin, end, stop = edges[i : i + 3]
            after = line[end : min(stop, end + source)]
            if i == 0 and goes_on:
                self._bridge.fill(self._before, after, line[begin:end], goes_on)
            else:
                self._bridge.fill(line[begin - source : begin], after, line[begin:end])
        pcm_N[:] = line[source:]
        self._open = len(line) - open_at
        if open_at == source:
            self._open += goes_on
        if open_at > source or not goes_on:
            self._before[:] = line[open_at - source : open_at] if is_filled else 0.0
        line[:source] = line[-source:]

    def pass_by(self, pcm_N: np.ndarray) -> None:
        """A window without holes."""
        self._line[: self._source] = pcm_N[-self._source :]
        self._open = 0

    def forget(self) -> None:
        """What comes next follows nothing."""
        self._line[:] = 0.0
        self._open = 0
