"""What a line does to the sound of an episode: packets are lost, and the session conceals them."""

# Dimension key: T ticks, W samples of a tick, J packets of all ticks.

from __future__ import annotations

import numpy as np

from ...mailbox import AudioWindows

PACKET_MS = 20
BURST = 3.0  # packets that are lost one after the other, on average


def lost_packets(count: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """bool [J]: about that share of them, in bursts. Gilbert's model, as `net.faults` has it; share
    is less than 1."""
    begins = rng.random(count) < share / (1 - share) / BURST
    ends = rng.random(count) < 1 / BURST
    lost_J, bad = np.zeros(count, bool), False
    for packet, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
        bad = not end if bad else begin
        lost_J[packet] = bad
    return lost_J


def lose_packets(pcm_T_W: np.ndarray, lost_J: np.ndarray, sample_rate: int) -> np.ndarray:
    """bool [T]: ticks that lack samples. `pcm_T_W` becomes what a session hears in their place."""
    num_ticks, size = pcm_T_W.shape
    windows, missing_T = AudioWindows(1, size, sample_rate), np.zeros(num_ticks, bool)
    start = 0
    for tick, lost in enumerate(lost_J.reshape(num_ticks, -1).tolist()):
        for is_lost, packet in zip(lost, np.split(pcm_T_W[tick], len(lost)), strict=True):
            if not is_lost:
                windows.write(start, packet)
            start += len(packet)
        missing_T[tick] = windows.take(tick, pcm_T_W[tick]) > 0
    return missing_T
