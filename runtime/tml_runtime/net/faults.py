"""A bad network in this process, on any clock: seeded, and the same every time.

`Link.send` says when a packet arrives; it never waits. One link is one direction of one line.
Packets keep their order but for those that are held back on purpose.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields

from ..errors import InputTypeError, InputValueError

_MS = 1_000_000


@dataclass(frozen=True)
class Profile:
    """One kind of line. Probabilities are per packet, times in milliseconds or seconds.

    Loss is Gilbert's and Elliott's (netem calls it `gemodel`): a good and a bad state, each with a
    probability of losing a packet. With `loss_bad` 1 and `loss_good` 0 the mean burst is
    1 / `bad_to_good` packets and the loss rate `good_to_bad` / (`good_to_bad` + `bad_to_good`).
    """

    delay_ms: float = 0.0  # everybody's
    jitter_ms: float = 0.0  # mean of an exponential distribution, drawn for each packet
    good_to_bad: float = 0.0
    bad_to_good: float = 1.0
    loss_good: float = 0.0
    loss_bad: float = 1.0
    stall_every_s: float = 0.0  # mean time between the starts of two stalls; 0: none
    stall_ms: float = 0.0  # mean of an exponential distribution; packets wait for its end
    rate_kbps: float = 0.0  # 0: no limit
    queue_ms: float = 500.0  # of packets that wait for the rate; more are lost
    reorder: float = 0.0  # held back, so that later ones overtake
    reorder_ms: float = 0.0  # by how much
    duplicate: float = 0.0
    outage_every_s: float = 0.0  # the end of every such period, from the first packet on; 0: none
    outage_s: float = 0.0  # everything sent in it is lost

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) not in (int, float):
                raise InputTypeError(f"{field.name}={value!r}: expected a number")
            if not 0.0 <= value < math.inf:
                raise InputValueError(f"{field.name}={value} is not a finite number >= 0")
            if field.name in _PROBABILITIES and value > 1.0:
                raise InputValueError(f"{field.name}={value} is not in 0..1")

    @staticmethod
    def named(name: str) -> Profile:
        """clean, wifi, 4g, loss2, loss5 or outage. Raises InputValueError for another."""
        if name not in PROFILES:
            raise InputValueError(f"profile {name!r} is not one of {', '.join(PROFILES)}")
        return PROFILES[name]


_PROBABILITIES = {"good_to_bad", "bad_to_good", "loss_good", "loss_bad", "reorder", "duplicate"}


def _bursts(loss: float, mean_packets: float) -> dict[str, float]:
    """Transitions that lose that part of all packets, in bursts of that mean length."""
    bad_to_good = 1.0 / mean_packets
    return {"good_to_bad": bad_to_good * loss / (1.0 - loss), "bad_to_good": bad_to_good}


# Chosen, not recorded on a line. wifi: the exponential jitter and the rare stalls of a shared
# channel, set so that a buffer of 20, 40, 60 and 100 ms leaves 16, 1.5, 1.0 and 0.6 % of 200 ms
# ticks incomplete, near the 14.9, 2.1, 1.1 and 0.6 % simulated for such a line elsewhere. 4g:
# scheduling grants of some milliseconds, and handovers of 50 to 100 ms. Losses in full queues come
# in bursts of about three at 50 packets a second.
PROFILES = {
    "clean": Profile(delay_ms=10, jitter_ms=0.5),
    "wifi": Profile(
        **_bursts(0.0005, 2.0),
        delay_ms=5,
        jitter_ms=4.8,
        stall_every_s=12,
        stall_ms=60,
        reorder=0.001,
        reorder_ms=25,
        duplicate=0.0005,
    ),
    "4g": Profile(
        **_bursts(0.005, 3.0),
        delay_ms=40,
        jitter_ms=8,
        stall_every_s=15,
        stall_ms=75,
        rate_kbps=5000,
    ),
    "loss2": Profile(**_bursts(0.02, 3.0), delay_ms=20, jitter_ms=2),
    "loss5": Profile(**_bursts(0.05, 3.0), delay_ms=20, jitter_ms=2),
    "outage": Profile(delay_ms=20, jitter_ms=2, outage_every_s=10, outage_s=1),
}


class Link:
    """One direction of a line. The same profile, seed and calls give the same arrivals.

    Call `send` in the order of time; a time before the last one counts as the last one.
    """

    def __init__(self, profile: Profile, seed: int) -> None:
        self._profile = profile
        self._random = random.Random(seed)
        self._first_ns: int | None = None
        self._now_ns = 0
        self._bad = False
        self._stall = (0, 0)  # begin, end
        self._free_ns = 0  # when the rate has let everything through
        self._last_ns = 0  # arrival of the last packet that was not held back

    def send(self, now_ns: int, num_bytes: int) -> list[int]:
        """Arrival times in ns of a packet sent now: none if it is lost, two if duplicated."""
        if self._first_ns is None:
            self._first_ns = self._now_ns = self._free_ns = self._last_ns = now_ns
            self._stall = self._next_stall(now_ns)
        now_ns = self._now_ns = max(self._now_ns, now_ns)
        lost = self._is_lost() | self._in_outage(now_ns - self._first_ns)  # both: draws go on
        if lost or (sent_ns := self._leave(now_ns, num_bytes)) is None:
            return []
        return self._arrive(sent_ns)

    def _is_lost(self) -> bool:
        profile, draw = self._profile, self._random.random
        self._bad = draw() >= profile.bad_to_good if self._bad else draw() < profile.good_to_bad
        return draw() < (profile.loss_bad if self._bad else profile.loss_good)

    def _in_outage(self, since_ns: int) -> bool:
        every_s, length_s = self._profile.outage_every_s, self._profile.outage_s
        return every_s > 0.0 and (since_ns / 1e9) % every_s >= every_s - length_s

    def _leave(self, now_ns: int, num_bytes: int) -> int | None:
        """When the packet has passed the queue; None when that is full."""
        profile = self._profile
        if profile.rate_kbps == 0.0:
            return now_ns
        if self._free_ns - now_ns > profile.queue_ms * _MS:
            return None
        self._free_ns = max(self._free_ns, now_ns) + round(num_bytes * 8e6 / profile.rate_kbps)
        return self._free_ns

    def _arrive(self, sent_ns: int) -> list[int]:
        profile, rng = self._profile, self._random
        while sent_ns >= self._stall[1]:
            self._stall = self._next_stall(self._stall[1])
        if sent_ns >= self._stall[0]:
            sent_ns = self._stall[1]
        delay_ms = profile.delay_ms
        if profile.jitter_ms > 0.0:
            delay_ms += rng.expovariate(1.0 / profile.jitter_ms)
        arrival_ns = max(self._last_ns, sent_ns + round(delay_ms * _MS))
        if rng.random() < profile.reorder:
            arrival_ns += round(profile.reorder_ms * _MS)
        else:
            self._last_ns = arrival_ns
        return [arrival_ns] * (2 if rng.random() < profile.duplicate else 1)

    def _next_stall(self, after_ns: int) -> tuple[int, int]:
        every_s, mean_ms = self._profile.stall_every_s, self._profile.stall_ms
        if every_s == 0.0 or mean_ms == 0.0:
            return (1 << 63, 1 << 63)
        begin_ns = after_ns + round(self._random.expovariate(1.0 / every_s) * 1e9)
        return begin_ns, begin_ns + 1 + round(self._random.expovariate(1.0 / mean_ms) * _MS)
