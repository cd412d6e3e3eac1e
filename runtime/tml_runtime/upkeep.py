"""What sessions need beside their ticks: to begin, to read a prompt, to be taken back, to rest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from tml_kernels.kv_cache import NoSnapshot, WindowPassed

from .metrics import Metrics
from .slots import Interruption, Seat
from .vocoder import Vocoder

READ_TOKENS = 64  # of a prompt, at once: a page


class Upkeep:
    """For the tick thread. `begin` and `take_back` come before a tick, `rest` after its output.

    Prompts are read and keys put away only in time that nobody waits for: a piece that is taken to
    cost twice what the costliest has cost so far must fit. A prompt that found no time in
    `patience` ticks ends its session.
    """

    def __init__(
        self,
        model: Any,
        state: Any,
        vocoders: Sequence[Vocoder],
        now_ns: Callable[[], int],
        metrics: Metrics,
        patience: int = 150,
    ) -> None:
        self._model = model
        self._state = state
        self._vocoders = vocoders
        self._now_ns = now_ns
        self._metrics = metrics
        self._patience = patience
        self._read_ns = 0  # the longest a piece took

    def warm_up(self, silence: int) -> None:
        """Learn on slot 0 what a piece of a prompt costs; the caller resets it."""
        for _ in range(2):
            self._timed_read(0, [silence] * (READ_TOKENS // 2))

    def begin(self, seat: Seat) -> None:
        """Before anything of the session reaches the model."""
        self._vocoders[seat.slot].reset()
        if seat.priority != 0:
            self._state.reset(seat.slot, priority=seat.priority)
        self._state.set_sampling(seat.slot, **vars(seat.sampling))
        seat.admitted = True

    def take_back(self, seat: Seat, tick: int) -> None:
        """What was not heard before an interruption was never said, as far as that can be undone.

        What happened meanwhile happens again, with silence in the place of that speech.
        """
        interruption = seat.interruption
        if interruption.epoch == seat.epoch:
            return
        seat.epoch = interruption.epoch
        seat.stats.interruptions += 1
        self._vocoders[seat.slot].reset()
        try:
            self._replay(seat, interruption)
        except (NoSnapshot, WindowPassed):  # nothing has changed
            seat.stats.unforgotten += 1
        except Exception as error:
            self._fail(seat, tick, error)

    def rest(self, seats: Sequence[Seat], tick: int, end_ns: int) -> None:
        """Everything that fits before `end_ns`: one piece of each prompt, keys of the paused."""
        for seat in seats:
            if seat.over:
                continue
            try:
                if seat.num_read < len(seat.prompt):
                    self._read(seat, tick, end_ns)
                elif seat.paused and self._may_put_away(seat) and self._now_ns() < end_ns:
                    self._state.put_away(seat.slot)
                    seat.put_away = True
            except Exception as error:
                self._fail(seat, tick, error)

    @staticmethod
    def _may_put_away(seat: Seat) -> bool:
        return seat.admitted and not seat.put_away

    def _replay(self, seat: Seat, interruption: Interruption) -> None:
        unheard = seat.recall.unheard(interruption.played_ns)
        if unheard is not None:
            ends = self._model.replay(self._state, seat.slot, unheard.position, unheard.ticks)
            seat.recall.replayed(unheard, ends)
            seat.position = ends[-1]

    def _read(self, seat: Seat, tick: int, end_ns: int) -> None:
        if not seat.admitted:
            self.begin(seat)
        piece = seat.prompt[seat.num_read : seat.num_read + READ_TOKENS]
        if self._now_ns() + 2 * self._read_ns < end_ns:
            self._timed_read(seat.slot, piece)
            seat.num_read += len(piece)
            seat.position = self._state.length(seat.slot)
        elif seat.stats.absent_ticks > self._patience:
            raise TimeoutError(
                f"{len(seat.prompt) - seat.num_read} tokens of the prompt found no time within "
                f"{self._patience} ticks"
            )

    def _fail(self, seat: Seat, tick: int, error: Exception) -> None:
        seat.fail(tick, error)
        self._metrics.add("faults", 1)

    def _timed_read(self, slot: int, ids: list[int]) -> None:
        begin_ns = self._now_ns()
        self._model.read(self._state, slot, ids)
        self._read_ns = max(self._read_ns, self._now_ns() - begin_ns)


ALWAYS = sys.maxsize  # ns: on a virtual clock there is all the time in the world
