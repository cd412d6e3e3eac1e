"""One session's end of the hand-off: what it delegates, and what comes back to it and when."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .answer import Answer
from .options import Policy
from .request import DELEGATE
from .transcript import Transcript

if TYPE_CHECKING:
    from .handoff import Handoff

MAX_ASKED = 8  # texts of `Session.delegate` that wait for the next tick


class Interruption(Protocol):
    @property
    def epoch(self) -> int: ...


class Seated(Protocol):
    """What a line needs of its session. `interruption` is the client's newest; a tick begins by
    raising the epoch to it, and what was said from media time `played_ns` on was not heard."""

    slot: int

    @property
    def epoch(self) -> int: ...

    @property
    def played_ns(self) -> int: ...

    @property
    def interruption(self) -> Interruption: ...

    @property
    def over(self) -> bool: ...


class Line:
    """`ask` is the client's side, everything else the tick thread's, which waits for nobody.

    In a tick: `take`, `read`, then `said`. Answers come one after the other, the one that is ready
    first begins; the tokens of one are not mixed with those of another. Every request that is not
    dropped (by its policy, or with its session) ends in exactly one result or notice, or in both
    when it broke off.
    """

    def __init__(
        self, handoff: Handoff, seat: Seated, policy: Policy, prompt: Sequence[int]
    ) -> None:
        self._handoff = handoff
        self._options = handoff.options
        self._seat = seat
        self._policy = policy
        self._markers = handoff.markers[policy]
        self._epoch = seat.epoch  # of this tick
        self._asked: deque[tuple[int, int, str]] = deque()  # number, epoch, text
        self.transcript = Transcript(prompt, handoff.options.transcript_tokens)
        self._answers: list[Answer] = []
        self._current: Answer | None = None
        self._opened = self._told = False  # its marker is out; its end is
        self._out: deque[int] = deque()
        self._quiet_ticks = 0

    @property
    def is_over(self) -> bool:
        return self._seat.over

    def ask(self, text: str) -> int | None:
        """The request's id, or None: too many texts wait for the next tick."""
        if len(self._asked) >= MAX_ASKED:
            return None
        number = self._handoff.next_id()
        self._asked.append((number, self._seat.interruption.epoch, text))
        return number

    def take(self, window: int, room: int) -> list[int]:
        """At most `room` ids for the model to read in this tick."""
        self._fence()
        while self._asked and self._asked[0][1] <= self._epoch:
            number, epoch, text = self._asked.popleft()
            if epoch == self._epoch:
                self._submit(number, window, text)
            else:
                self._handoff.counts["refused"] += 1
                self._tell_interrupted(number, (window + 1) * self._handoff.window_ns)
        limit = min(room, self._options.tokens_per_tick)
        while len(self._out) < limit and self._move(window):
            pass
        return [self._out.popleft() for _ in range(min(limit, len(self._out)))]

    def read(self, window: int, ids: Sequence[int]) -> None:
        """Everything that the model reads in this tick."""
        self.transcript.read(window * self._handoff.window_ns, ids)

    def said(self, window: int, token_K: np.ndarray) -> None:
        self._fence()  # when text was shed, this tick has seen no `take`
        tokens, window_ns = token_K.tolist(), self._handoff.window_ns
        steps = [k for k, token in enumerate(tokens) if token not in self._handoff.controls]
        self._quiet_ticks = 0 if steps else self._quiet_ticks + 1
        begin_ns = (window + 1) * window_ns
        ends_ns = [begin_ns + (k + 1) * window_ns // len(tokens) for k in steps]
        self.transcript.say(begin_ns, [tokens[k] for k in steps], ends_ns)
        if self._handoff.delegate in tokens:
            self._submit(self._handoff.next_id(), window, DELEGATE)

    def close(self) -> None:
        """The session is over: nobody waits for its answers any more."""
        for answer in self._answers:
            self._handoff.give_up(answer)
        self._answers.clear()

    def _submit(self, number: int, window: int, trigger: str) -> None:
        answer = Answer(number, self._epoch, (window + 1) * self._handoff.window_ns)
        if sum(not a.is_notice for a in self._answers) < self._options.max_per_session:
            answer.entries = self.transcript.copy()
            answer.trigger = trigger
            if self._handoff.submit(answer, self, self._seat.slot):
                self._answers.append(answer)
                return
        self._handoff.counts["refused"] += 1
        if all(a.notice is not self._handoff.busy_notice for a in self._answers):
            self._tell(answer, self._handoff.busy_notice)  # one is enough for many

    def _tell(self, answer: Answer, notice: Sequence[int]) -> None:
        answer.is_notice = answer.ended = True
        answer.notice = notice
        self._answers.append(answer)

    def _fence(self) -> None:
        """Drop all that was asked for before the session was interrupted, and no notice: each
        request ends in something that is read."""
        if self._seat.epoch == self._epoch:
            return
        self._epoch = self._seat.epoch
        self.transcript.unsay(self._seat.played_ns)
        stale = [answer for answer in self._answers if not answer.is_notice]
        for answer in stale:
            self._handoff.give_up(answer)
            self._answers.remove(answer)
        self._out.clear()  # of a notice that was half read, the whole comes anew
        self._current, self._opened, self._told = None, False, False
        if stale:
            self._handoff.counts["stale"] += len(stale)
            self._tell_interrupted(stale[-1].id, stale[-1].t_ns)

    def _tell_interrupted(self, number: int, t_ns: int) -> None:
        notice = self._handoff.interrupted_notice
        if all(a.notice is not notice for a in self._answers):  # one is enough for many
            self._tell(Answer(number, self._epoch, t_ns), notice)

    def _move(self, window: int) -> bool:
        """Bring more of the current answer to `_out`; whether there was any."""
        answer = self._current
        if answer is None:
            self._current = self._next(window)
            return self._current is not None
        ended = answer.ended  # read first: ids that come after it was not are for the next round
        if answer.ids:
            if not self._opened:
                self._out.extend(self._markers[0])
                self._opened = True
            for _ in range(min(len(answer.ids), self._options.tokens_per_tick)):
                self._out.append(answer.ids.popleft())
            return True
        if not ended:
            return False
        if not self._told:
            if self._opened:
                self._out.extend(self._markers[1])
            self._out.extend(answer.notice)
            self._told = True
            return True
        if self._out:
            return False
        self._answers.remove(answer)
        self._current, self._opened, self._told = None, False, False
        return True

    def _next(self, window: int) -> Answer | None:
        """The answer that may begin in this tick."""
        for answer in list(self._answers):
            if not (answer.ids or answer.ended):
                continue
            if answer.ready_window is None:
                answer.ready_window = window
            if self._policy is Policy.SKIP_IF_BUSY and answer.ids and self._quiet_ticks == 0:
                self._handoff.give_up(answer)
                self._handoff.counts["skipped"] += 1
                self._answers.remove(answer)
            elif self._may_begin(answer, window - answer.ready_window):
                return answer
        return None

    def _may_begin(self, answer: Answer, waited: int) -> bool:
        if self._policy in (Policy.INTERRUPT, Policy.SILENT):
            return True
        if self._policy is Policy.SKIP_IF_BUSY and answer.ids:
            return True
        options = self._options
        return self._quiet_ticks >= options.idle_ticks or waited >= options.max_wait_ticks
