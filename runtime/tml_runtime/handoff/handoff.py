"""Handoff: what a runtime has of hand-off, from the side of its clients and its tick thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import count

import torch

from tml_kernels.kv_cache import CacheError

from ..errors import InputTypeError
from ..model import ModelConfig, ModelState
from ..text import Tokenizer
from .answer import Answer
from .engine import Engine
from .line import Line, Seated
from .options import HandoffOptions, Policy
from .request import BackgroundModel, Snapshot

_NO_ANSWER = "the background model did not answer: "


class Handoff:
    """Lines of sessions to one background model; None: there are no lines, and nothing happens.
    first_spare: of `options.snapshots` slots of `state` that no session sits in; forks go there.

    Clients call `open`, `start`, `before_tick` and `stop`; the tick thread calls the
    rest, and none of that takes a lock or waits.
    """

    def __init__(
        self,
        model: BackgroundModel | None,
        options: HandoffOptions,
        config: ModelConfig,
        tokenizer: Tokenizer,
        state: ModelState,
        *,
        first_spare: int,
    ) -> None:
        vocab = config.vocab
        self.options = options
        self.window_ns = config.layout.period_ms * 1_000_000
        self.delegate = vocab.delegate
        self.controls = frozenset(vocab.specials.values())
        self.counts = {"refused": 0, "stale": 0, "skipped": 0}
        self._engine = None if model is None else Engine(model, options, tokenizer, vocab)
        self.markers = {policy: self._encode_pair(options.result) for policy in Policy}
        self.markers[Policy.SILENT] = self._encode_pair(options.silent_result)
        self.busy_notice = self._encode(f"{options.notice}{_NO_ANSWER}too much was asked of it")
        self.interrupted_notice = self._encode(f"{options.notice}{_NO_ANSWER}it was interrupted")
        self._state = state
        self._spare = deque(range(first_spare, first_spare + options.snapshots))
        self._lines: set[Line] = set()  # those that ever asked
        self._ids = count()

    def open(self, seat: Seated, policy: Policy | None, prompt: Sequence[int]) -> Line | None:
        """The line of a new session; `prompt` stays in its transcript. Raises InputTypeError."""
        policy = self.options.policy if policy is None else policy
        if not isinstance(policy, Policy):
            raise InputTypeError(f"handoff_policy={policy!r}: expected a Policy")
        return None if self._engine is None else Line(self, seat, policy, prompt)

    def start(self) -> None:
        """Start the hand-off's thread, if it does not run yet."""
        if self._engine is not None:
            self._engine.start()

    def stop(self) -> None:
        """Cancel everything and end the thread. More than once is no error."""
        if self._engine is not None:
            self._engine.stop()

    def before_tick(self) -> None:
        """On the virtual clock, where time may stand still while somebody thinks."""
        if self._engine is not None:
            self._engine.start()
            if self.options.wait:
                self._engine.settle()

    def report(self) -> dict[str, int] | None:
        """How many requests were started and how they ended; `stale` ones and `skipped` ones, which
        the model never read, may be among any of these. `refused` were never started: they were too
        many, or an interruption came before a tick took them."""
        return None if self._engine is None else {**self._engine.counts, **self.counts}

    # The tick thread

    def release(self) -> None:
        """Hang up on sessions that are over; take back slots of snapshots."""
        for line in [line for line in self._lines if line.is_over]:
            line.close()
            self._lines.remove(line)
        while self._engine is not None and self._engine.released:
            slot = self._engine.released.popleft()
            self._state.reset(slot)
            self._spare.append(slot)

    def next_id(self) -> int:
        return next(self._ids)

    def submit(self, answer: Answer, line: Line, slot: int) -> bool:
        """Whether there was room for it; if so the state is forked, where a slot is spare."""
        assert self._engine is not None
        if self._engine.is_full:
            return False
        self._lines.add(line)
        answer.snapshot = self._fork(slot)
        self._engine.push(answer)
        return True

    def give_up(self, answer: Answer) -> None:
        if self._engine is not None and not answer.is_notice:
            self._engine.drop(answer)

    def _fork(self, slot: int) -> Snapshot | None:
        if not self._spare:
            return None
        spare = self._spare.popleft()
        try:
            self._state.bring_back(slot)  # it may have been away until this tick
            self._state.fork(slot, spare)
        except CacheError:  # no pages left: this request goes without
            self._spare.append(spare)
            return None
        event = None
        if self._state.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._state.device))
        return Snapshot(self._state, self._state.session(spare), event)

    def _encode(self, text: str) -> list[int]:
        return [] if self._engine is None else self._engine.encode(text)

    def _encode_pair(self, texts: tuple[str, str]) -> tuple[list[int], list[int]]:
        return self._encode(texts[0]), self._encode(texts[1])
