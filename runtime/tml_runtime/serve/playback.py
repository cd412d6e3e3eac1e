"""What a client has played of the speech it got: the position that an interruption reports."""

from __future__ import annotations


class Playback:
    """Pieces are played as they come, one after the other; where there is none, the player waits.

    Worked example at 16 kHz: a piece of 1600 samples for stamp 3200 comes at 5.00 s and the next,
    for 4800, at 5.15 s. At 5.05 s sample 4000 is played; at 5.12 s the player waits at 4800; at
    5.20 s it is at 5600. Samples are those of the media clock, seconds those of any clock.
    """

    def __init__(self, sample_rate: int) -> None:
        self._rate = sample_rate
        self._stamp = self._end = 0
        self._since_s = 0.0

    def received(self, stamp: int, num_samples: int, now_s: float) -> None:
        """A piece that will be played after those before it."""
        if self.position(now_s) >= self._end:  # nothing is being played: it begins now
            self._stamp, self._since_s = stamp, now_s
        self._end = max(self._end, stamp + num_samples)

    def position(self, now_s: float) -> int:
        """The sample that is heard now; never beyond what was received."""
        played = round((now_s - self._since_s) * self._rate)
        return min(self._end, self._stamp + max(0, played))

    def stop(self, now_s: float) -> int:
        """The player drops what it has not played; returns where it stopped."""
        self._end = self._stamp = self.position(now_s)
        self._since_s = now_s
        return self._end
