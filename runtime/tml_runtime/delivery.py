"""What a tick said, to its sessions: speech is made of it, and all of it checked and queued."""

# Dimension key: S session rows, K output steps, M mel frames of a tick, B mel bands.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .metrics import Metrics
from .model import ModelState, TickOutput
from .slots import Seat
from .voices import Voices


class Delivery:
    """For the tick thread."""

    def __init__(self, state: ModelState, voices: Voices, metrics: Metrics) -> None:
        self._state = state
        self._voices = voices
        self._metrics = metrics

    def publish(self, tick: int, seats: Sequence[Seat], out: TickOutput) -> None:
        """Row s is that of the s-th seat. A fault ends its session; everybody else's output goes
        out, if there is room for it."""
        token_S_K, mel_S_K_B = out.token_S_K.cpu().numpy(), out.mel_S_K_B.cpu()
        mel = mel_S_K_B.numpy()
        fault_S = (out.fault_S.cpu().numpy() | ~np.isfinite(mel).all((1, 2))).tolist()
        pcm_S = self._voices.speak([seat.slot for seat in seats], mel_S_K_B)
        num_lost = num_faults = 0
        for row, (seat, pcm) in enumerate(zip(seats, pcm_S, strict=True)):
            try:
                if row in out.refused:
                    raise out.refused[row]
                if fault_S[row]:
                    raise FloatingPointError("the model's numbers were not finite")
                if isinstance(pcm, Exception):
                    raise pcm
                if not np.isfinite(pcm).all():
                    raise FloatingPointError("the vocoder's samples were not finite")
                seat.remember(token_S_K[row], mel[row], self._state.length(seat.slot))
                seat.stats.shed_frames += out.shed.get(row, 0)
                num_lost += not seat.publish(tick, token_S_K[row], pcm)
            except Exception as error:  # a plugged-in vocoder may raise anything
                seat.fail(tick, error)
                num_faults += 1
        self._metrics.add("lost_outputs", num_lost)
        self._metrics.add("faults", num_faults)
