"""What a session heard and said in its newest ticks, so that what nobody heard can be taken back.

Speech of tick n is heard in [(n + 1) * period, (n + 2) * period), output step k of K from k / K of
a period in. A client that stops playing at time t has heard the steps that end by t. With a period
of 200 ms and K = 4, t = 0.5 s: tick 0 (0.2 to 0.4 s) was heard, of tick 1 (0.4 to 0.6 s) the first
two steps, of tick 2 nothing.
"""

# Dimension key: R ticks remembered, N samples of a window, K output steps, M mel frames of a tick,
# B mel bands.

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .mailbox import MailboxSpec, Pair, Window
from .model import PastTick

PAST_TICKS = 8  # the cache remembers the ends of sixteen, of all sessions together


class Unheard(NamedTuple):
    """The ticks to replay, from the first on that said what was not heard."""

    rows: list[int]
    position: int  # of the session when the first of them began
    ticks: list[PastTick]  # as they were heard: silence from where the speech was cut off


class Recall:
    """A ring of the last `spec.past_ticks` ticks. For the tick thread; nothing grows."""

    def __init__(self, spec: MailboxSpec) -> None:
        num_ticks = spec.past_ticks
        self._period_ns = spec.window_ns
        self._silence, self._quiet = spec.silence, spec.quiet
        self._pcm_R_N = np.zeros((num_ticks, spec.window_samples), np.float32)
        self._token_R_K = np.zeros((num_ticks, spec.max_output_tokens), np.int32)
        self._mel_R_M_B = np.zeros((num_ticks, *spec.mel_shape), np.float32)
        self._window_R = np.zeros(num_ticks, np.int64)
        self._begin_R = np.zeros(num_ticks, np.int64)
        self._missing_R = np.zeros(num_ticks, np.bool_)
        self._frames: list[list[Pair] | None] = [None] * num_ticks
        self._text: list[list[int]] = [[] for _ in range(num_ticks)]
        self._count = 0  # ticks that were said; the next one is being heard

    def hear(self, window: int, pcm_N: np.ndarray, missing: bool, taken: Window) -> None:
        row = self._count % len(self._window_R)
        self._window_R[row], self._missing_R[row] = window, missing
        self._pcm_R_N[row] = pcm_N
        self._frames[row], self._text[row] = taken.pairs, taken.text

    def say(self, begin: int, token_K: np.ndarray, mel_M_B: np.ndarray) -> None:
        """The answer to what was heard last. begin: the session's position before that tick."""
        row = self._count % len(self._window_R)
        self._begin_R[row] = begin
        self._token_R_K[row], self._mel_R_M_B[row] = token_K, mel_M_B
        self._count += 1

    def unheard(self, played_ns: int) -> Unheard | None:
        """What to replay when nothing after `played_ns` was heard; None when all was, or the rest
        is silence already. No further back than the ring goes."""
        num_rows, num_steps = self._token_R_K.shape
        newest = range(max(0, self._count - num_rows), self._count)
        rows, ticks = [], []
        for row in (n % num_rows for n in newest):
            begin_ns = (int(self._window_R[row]) + 1) * self._period_ns
            steps = max(0, played_ns - begin_ns) * num_steps // self._period_ns
            tick = self._cut(row, min(steps, num_steps))
            if rows or not self._says(row, tick):
                rows.append(row)
                ticks.append(tick)
        return Unheard(rows, int(self._begin_R[rows[0]]), ticks) if rows else None

    def replayed(self, unheard: Unheard) -> None:
        """It is as if the session had said no more than that. Where the ticks begin now does not
        matter: only the first of them may still say something, and it begins where it did."""
        for row, tick in zip(unheard.rows, unheard.ticks, strict=True):
            self._token_R_K[row], self._mel_R_M_B[row] = tick.token_K, tick.mel_M_B

    def _says(self, row: int, tick: PastTick) -> bool:
        token_K, mel_M_B = self._token_R_K[row], self._mel_R_M_B[row]
        return np.array_equal(token_K, tick.token_K) and np.array_equal(mel_M_B, tick.mel_M_B)

    def _cut(self, row: int, steps: int) -> PastTick:
        token_K, mel_M_B = self._token_R_K[row].copy(), self._mel_R_M_B[row].copy()
        token_K[steps:] = self._silence
        mel_M_B[steps * len(mel_M_B) // len(token_K) :] = self._quiet
        return PastTick(
            self._pcm_R_N[row],
            bool(self._missing_R[row]),
            self._frames[row],
            self._text[row],
            token_K,
            mel_M_B,
        )
