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
MAX_HOLES = 16  # in a window; a client that makes more of them hears zeros in the others


class Concealer:
    """Fills one session's windows, in their order. Bounded work; what it makes never grows.

    A hole between two pieces of a window goes from one to the other, within FADE_MS of each. One
    that reaches the window's end knows its left side only: what follows has not been heard yet.
    Worked example at 16 kHz: samples 5 and 7 around a hole of one are 5, 6, 7.
    """

    def __init__(self, window_samples: int, sample_rate: int) -> None:
        source, fade = (ms * sample_rate // 1000 for ms in (SOURCE_MS, FADE_MS))
        self._source = source = min(source, window_samples)
        self._line = np.zeros(
            source + window_samples, np.float32
        )  # the last window's end, a window
        self._count = np.arange(fade, dtype=np.float32)
        to_and_fro = np.concatenate([np.arange(source), np.arange(source)[::-1]])
        self._mirror = np.resize(to_and_fro, fade)  # distance from the edge

    def fill(self, pcm_N: np.ndarray, have_N: np.ndarray) -> None:
        """Conceal in `pcm_N` the samples that `have_N` lacks; they are zero."""
        source, line = self._source, self._line
        line[source:] = pcm_N
        edges = np.flatnonzero(have_N[1:] != have_N[:-1]) + (source + 1)
        if not have_N[0]:
            edges = np.insert(edges, 0, source)
        if len(edges) % 2:
            edges = np.append(edges, len(line))
        begins, ends = edges[0::2].tolist()[:MAX_HOLES], edges[1::2].tolist()
        for begin, end, following in zip(begins, ends, [*begins[1:], len(line)], strict=False):
            self._conceal(begin, end, following)
        pcm_N[:] = line[source:]
        self._keep_end()

    def pass_by(self, pcm_N: np.ndarray) -> None:
        """A window without holes."""
        self._line[self._source :] = pcm_N
        self._keep_end()

    def forget(self) -> None:
        """What comes next follows nothing."""
        self._line[:] = 0.0

    def _conceal(self, begin: int, end: int, following: int) -> None:
        """Fill line[begin:end]; what is heard after it reaches to `following`."""
        line, size, fade = self._line, end - begin, len(self._count)
        known = min(self._source, following - end)
        reach = min(size, fade)
        over = reach if known > 0 else fade
        gain = 1.0 - (self._count[:reach] + 0.5) / over
        line[begin : begin + reach] = line[begin - 1 - self._mirror[:reach]] * gain
        if known > 0:
            mirrored = line[end + np.minimum(self._mirror[:reach], known - 1)] * gain
            line[end - reach : end] += mirrored[::-1]

    def _keep_end(self) -> None:
        self._line[: self._source] = self._line[-self._source :]
