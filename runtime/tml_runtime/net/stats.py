"""Counters of one client's input, named as in W3C's webrtc-stats, and with their meaning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class IntakeStats:
    """Counts since the intake was made; durations in seconds. Audio, unless a name says otherwise.

    As in webrtc-stats, delays are sums over samples: `jitter_buffer_delay` divided by
    `jitter_buffer_emitted_count` is the mean time from a sample's arrival to its media time.
    """

    packets_received: int = 0  # each sequence number once
    packets_lost: int = 0
    packets_duplicated: int = 0
    packets_discarded: int = 0  # came, but none of their samples can be heard: too late, too many
    jitter_buffer_delay: float = 0.0
    jitter_buffer_target_delay: float = 0.0
    jitter_buffer_emitted_count: int = 0  # samples given to the session in time
    total_samples_received: int = 0  # of windows that are over, concealed ones included
    concealed_samples: int = 0  # of these, not there when their window closed
    concealment_events: int = 0  # holes
    inserted_samples_for_deceleration: int = 0
    removed_samples_for_acceleration: int = 0
    frames_received: int = 0  # video
    frames_dropped: int = 0  # of these, too late, too early or too many

    # Not in webrtc-stats.
    late_samples: int = 0  # cut off because their window had closed
    backpressure: int = 0  # pieces, frames and texts that found a queue full
    texts_waiting: int = 0
    clock_steps: int = 0  # of the sender: its count was set, or its computer slept
    target_delay: float = 0.0  # now
    drift_ppm: float = 0.0  # how much slower the sender's sample clock is
