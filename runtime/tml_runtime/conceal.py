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

    def fill(self, before: np.ndarray, after: np.ndarray, out: np.ndarray) -> None:
        """Set `out`, at least one sample, from up to `source` samples on either side.

        One side may be empty: then it fades away from the other one.
        """
        fade = len(self._centre)
        reach = min(len(out), fade)
        mirror = self._mirror[:reach]
        gain = 1.0 - self._centre[:reach] / (reach if len(after) and len(before) else fade)
        out[:] = 0.0
        if len(before):
            out[:reach] = before[-1 - np.minimum(mirror, len(before) - 1)] * gain
        if len(after):
            out[len(out) - reach :] += (after[np.minimum(mirror, len(after) - 1)] * gain)[::-1]


class Concealer:
    """Fills one session's windows, in their order. Bounded work; what it makes never grows.

    A hole that reaches its window's end knows its left side only: what follows has not been heard.
    """

    def __init__(self, window_samples: int, sample_rate: int) -> None:
        self._bridge = Bridge(sample_rate)
        self._source = min(self._bridge.source, window_samples)
        # The last window's end, and a window.
        self._line = np.zeros(self._source + window_samples, np.float32)

    def fill(self, pcm_N: np.ndarray, have_N: np.ndarray) -> None:
        """Conceal in `pcm_N` the samples that `have_N` lacks."""
        source, line = self._source, self._line
        line[source:] = pcm_N
        edges = np.flatnonzero(have_N[1:] != have_N[:-1]) + (source + 1)
        if not have_N[0]:
            edges = np.insert(edges, 0, source)
        edges = [*edges.tolist(), len(line), len(line)]  # what is heard last reaches to the end
        for i in range(0, min(len(edges) - 2, 2 * MAX_HOLES), 2):
            begin, end, stop = edges[i : i + 3]
            after = line[end : min(stop, end + source)]
            self._bridge.fill(line[begin - source : begin], after, line[begin:end])
        pcm_N[:] = line[source:]
        line[:source] = line[-source:]

    def pass_by(self, pcm_N: np.ndarray) -> None:
        """A window without holes."""
        self._line[: self._source] = pcm_N[-self._source :]

    def forget(self) -> None:
        """What comes next follows nothing."""
        self._line[:] = 0.0
