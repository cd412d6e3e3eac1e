"""Before the first tick: the model runs once as it will, and on request until its cost is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ._tick import now_ns
from .admission import Probe, measure
from .model import PastTick, TickOutput
from .slots import Batch
from .upkeep import Upkeep
from .voices import Voices


class WarmUp:
    """Leaves every slot as new."""

    def __init__(
        self,
        model: Any,
        state: Any,
        batch: Batch,
        voices: Voices,
        upkeep: Upkeep,
        *,
        num_slots: int,
    ) -> None:
        self._model = model
        self._state = state
        self._batch = batch
        self._voices = voices
        self._upkeep = upkeep
        self._num_slots = num_slots

    @torch.inference_mode()
    def run(self) -> None:
        """A tick of all slots, the same once more, and a prompt: what compiles, compiles now."""
        out = self._silent_tick(self._num_slots)
        silent_W = np.zeros(self._model.config.layout.samples_per_tick, np.float32)
        token_K, mel_M_B = out.token_S_K[0].numpy(), out.mel_S_K_B[0].numpy()
        past = PastTick(silent_W, True, None, [], token_K, mel_M_B)
        self._model.replay(self._state, 0, 0, [past])
        self._upkeep.warm_up(self._model.config.vocab.silence)
        self._reset()

    @torch.inference_mode()
    def probe(self, num_ticks: int) -> tuple[int, tuple[Probe, ...]]:
        """(sessions that are in time, what was measured)."""

        def tick_ms(num_rows: int) -> float:
            begin_ns = now_ns()
            self._silent_tick(num_rows)
            return (now_ns() - begin_ns) / 1e6

        num_slots, period_ms = self._num_slots, self._model.config.layout.period_ms
        found = measure(tick_ms, num_slots=num_slots, num_ticks=num_ticks, period_ms=period_ms)
        self._reset()
        return found

    def _silent_tick(self, num_rows: int) -> TickOutput:
        out: TickOutput = self._model.tick(self._state, self._batch.silent(num_rows))
        slots = range(num_rows)
        self._voices.speak(slots, out.mel_S_K_B.cpu())  # a session's first tick resets its own
        return out

    def _reset(self) -> None:
        for slot in range(self._num_slots):
            self._state.reset(slot)
