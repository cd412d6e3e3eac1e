"""What sessions need beside their ticks: to begin, to read a prompt, to be taken back, to rest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from tml_kernels.kv_cache import NoSnapshot, WindowPassed

from .metrics import Metrics
from .slots import Seat
from .voices import Voices

READ_TOKENS = 64  # of a prompt, at once: a page
PATIENCE = 150  # ticks in which a prompt finds no time
FORGET = 16  # a tick without time for a kind of work takes one part of so many from its cost


class Upkeep:
    """For the tick thread. `begin` and `take_back` come before a tick and may raise, which is the
    session's own fault; `rest` comes after its output.

    Prompts are read and keys put away only in time that nobody waits for: each is taken to cost
    twice what the costliest of its kind has cost lately, and must fit. A prompt of which nothing
    was read in PATIENCE ticks ends its session.
    """

    def __init__(
        self,
        model: Any,
        state: Any,
        voices: Voices,
        now_ns: Callable[[], int],
        metrics: Metrics,
    ) -> None:
        self._model = model
        self._state = state
        self._voices = voices
        self._now_ns = now_ns
        self._metrics = metrics
        self._cost_ns = {"read": 0, "put_away": 0}

    def warm_up(self, silence: int) -> None:
        """Learn on slot 0 what a piece of a prompt costs; the caller resets it."""
        for _ in range(2):
            self._cost_ns["read"] = 0  # the first call compiles, which no other does
            self._timed("read", self._model.read, self._state, 0, [silence] * (READ_TOKENS // 2))

    def begin(self, seat: Seat) -> None:
        """Before anything of the session reaches the model."""
        self._voices.reset(seat.slot)
        if seat.priority != 0:
            self._state.reset(seat.slot, priority=seat.priority)
        self._state.set_sampling(seat.slot, **vars(seat.sampling))
        seat.admitted = True

    def take_back(self, seat: Seat) -> None:
        """What was not heard before an interruption was never said, as far as that can be undone.

        What happened meanwhile happens again, with silence in the place of that speech.
        """
        interruption = seat.interruption
        if interruption.epoch == seat.epoch:
            return
        seat.epoch, seat.played_ns = interruption
        seat.stats.interruptions += 1
        self._voices.reset(seat.slot)
        try:
            self._replay(seat)
        except (NoSnapshot, WindowPassed):  # nothing has changed
            seat.stats.unforgotten += 1

    def rest(self, seats: Sequence[Seat], tick: int, end_ns: int) -> int:
        """Everything that fits before `end_ns`: one piece of each prompt, keys of the paused.
        Returns how many sessions that has ended."""
        late, num_faults = set(), 0
        for seat in seats:
            if seat.over:
                continue
            try:
                if seat.num_read < len(seat.prompt):
                    kind, had_time = "read", self._read(seat, end_ns)
                elif seat.paused and seat.admitted and not seat.put_away:
                    kind, had_time = "put_away", self._put_away(seat, end_ns)
                else:
                    continue
                if not had_time:
                    late.add(kind)
            except Exception as error:
                seat.fail(tick, error)
                num_faults += 1
        self._metrics.add("faults", num_faults)
        for kind in late:  # else one slow piece would stop all prompts for ever
            self._cost_ns[kind] -= self._cost_ns[kind] // FORGET
        return num_faults

    def _replay(self, seat: Seat) -> None:
        unheard = seat.recall.unheard(seat.played_ns)
        if unheard is not None:
            seat.put_away = False  # it will not be, then
            ends = self._model.replay(self._state, seat.slot, unheard.position, unheard.ticks)
            seat.recall.replayed(unheard)
            seat.position = ends[-1]

    def _read(self, seat: Seat, end_ns: int) -> bool:
        """Whether there was time for a piece. Raises TimeoutError once there was none for long."""
        if not seat.admitted:
            self.begin(seat)
        piece = seat.prompt[seat.num_read : seat.num_read + READ_TOKENS]
        if self._fits("read", end_ns):
            self._timed("read", self._model.read, self._state, seat.slot, piece)
            seat.num_read += len(piece)
            seat.num_waited = 0
            seat.position = self._state.length(seat.slot)
            return True
        seat.num_waited += 1
        if seat.num_waited > PATIENCE:
            raise TimeoutError(
                f"{len(seat.prompt) - seat.num_read} tokens of the prompt found no time within "
                f"{PATIENCE} ticks"
            )
        return False

    def _put_away(self, seat: Seat, end_ns: int) -> bool:
        """Whether there was time for it."""
        if self._fits("put_away", end_ns):
            self._timed("put_away", self._state.put_away, seat.slot)
            seat.put_away = True
        return seat.put_away

    def _fits(self, kind: str, end_ns: int) -> bool:
        return self._now_ns() + 2 * self._cost_ns[kind] < end_ns

    def _timed(self, kind: str, call: Callable[..., object], *args: object) -> None:
        begin_ns = self._now_ns()
        call(*args)
        self._cost_ns[kind] = max(self._cost_ns[kind], self._now_ns() - begin_ns)


ALWAYS = sys.maxsize  # ns: on a virtual clock there is all the time in the world
