"""One model on several ranks: rank 0 has the sessions, and the others do what it does.

Before each tick rank 0 sends one message: what was done to sessions since the last one, and the
tick's input. Books of keys, draws and tokens follow from that alone, so they are equal everywhere
and nothing is sent back. A rank that ends, or is silent for `timeout_s`, ends the others with
RankLost: in a runtime the tick raises, and every client hears LoopFailed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tml_kernels._dims import Dims
from tml_kernels.kv_cache import PageClass

from ..errors import InputTypeError, InputValueError, RankLost, RanksDiffer
from ..model import InteractionModel, KvBudget, ModelState, TickInput, TickOutput
from ..model.backbone import check_ragged
from ..model.buffers import Bucket
from ..model.replay import PastTick
from ..model.tick_input import Groups
from .follow import compare, weight_facts
from .message import pack, pack_past, pack_tick

# What may be done to a session between ticks, by slot. A verb of either list that refuses does so
# on every rank.
STATE_VERBS = ("reset", "set_sampling", "fork", "put_away", "bring_back")
CACHE_VERBS = ("mark", "rewind", "suspend", "resume", "roll")
# What would change rank 0's books alone, or write its share of the keys as if it were all of them.
REFUSED = {
    "state": ("load", "reserve", "commit", "roll_back"),
    "cache": ("open", "fork", "close", "load", "save", "reserve", "append", "apply", "commit",
              "roll_back", "tick"),
}  # fmt: skip


class LeadState:
    """A `ModelState` of rank 0 that remembers what is done to its sessions, for the others.

    It has everything that the state has, but what one rank cannot do alone: loading and saving
    sessions, and transactions of one's own. These raise InputValueError. What is called on `cache`
    takes a session of this state.
    """

    def __init__(self, state: ModelState, calls: list[list[Any]], number: int) -> None:
        self.number = number
        self.whole = state
        self._calls = calls
        self.cache = _LeadCache(state, self._record)

    def __getattr__(self, name: str) -> Any:
        value = _unless_refused("state", self.whole, name)
        if name not in STATE_VERBS:
            return value

        def call(*args: Any, **options: Any) -> Any:
            self._record("state", name, list(args), options)
            return value(*args, **options)

        return call

    def _record(self, where: str, verb: str, args: list[Any], options: dict[str, Any]) -> None:
        """Before the call: one that cannot be told to the others is not made here either."""
        call = [self.number, where, verb, args, options]
        try:
            json.dumps(call)
        except (TypeError, ValueError) as error:
            raise InputTypeError(
                f"{where}.{verb}: cannot be sent to other ranks: {error}"
            ) from None
        self._calls.append(call)


class _LeadCache:
    def __init__(self, state: ModelState, record: Callable[..., None]) -> None:
        self._state = state
        self._record = record

    def __getattr__(self, name: str) -> Any:
        value = _unless_refused("cache", self._state.cache, name)
        if name not in CACHE_VERBS:
            return value

        def call(session: Any, *args: Any, **options: Any) -> Any:
            self._record("cache", name, [session.slot, *args], options)
            return value(session, *args, **options)

        return call


def _unless_refused(where: str, target: object, name: str) -> Any:
    if name in REFUSED[where]:
        raise InputValueError(f"{where}.{name}: a session on several ranks cannot do that")
    return getattr(target, name)


class LeadModel(InteractionModel):
    """Rank 0's model, as a `Runtime` takes it. A context manager that ends the followers.

    Its states are LeadStates. For one thread at a time, as any model. Without ticks it must
    `keep_alive` within the ranks' timeout; a running Runtime does.
    """

    def __init__(self, model: InteractionModel) -> None:
        """Waits for all ranks to have their weights. Raises InputValueError for a model that is
        not shared, or on another rank than 0; RanksDiffer, RankLost."""
        ranks = model.ranks
        if ranks is None or ranks.rank != 0:
            where = "no ranks" if ranks is None else f"rank {ranks.rank}"
            raise InputValueError(f"model: has {where}; rank 0 leads, the others call follow")
        self.__dict__.update(vars(model))  # the same weights and layers; only the verbs differ
        self._ranks = ranks
        self._calls: list[list[Any]] = []
        self._num_states = 0
        ranks.agree(weight_facts(model))

    def __enter__(self) -> LeadModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, RanksDiffer):  # they have all raised that
            self.close()

    def new_state(self, num_slots: int, **options: Any) -> ModelState:
        state = super().new_state(num_slots, **options)
        words = {name: _as_word(value) for name, value in options.items()}
        self._send("new_state", {"num_slots": num_slots, "options": words})
        self._num_states += 1
        return cast(ModelState, LeadState(state, self._calls, self._num_states - 1))

    def tick(self, state: ModelState, tick: TickInput) -> TickOutput:
        lead = _lead(state)
        tick.check(self.config, lead.whole)  # what is refused, no other rank hears of
        self._ranks.broadcast(pack_tick(tick, self._words("tick", {"state": lead.number})))
        out = super().tick(lead.whole, tick)
        if self._ranks.checked:
            compare(self._ranks, lead.whole, out)
        return out

    def append(
        self,
        state: ModelState,
        x_T_D: Tensor,
        start_S1: Tensor,
        slot_S: Tensor,
        page_class: PageClass = PageClass.TEXT,
        *,
        between_ticks: bool = False,
    ) -> Tensor:
        lead = _lead(state)
        check_ragged(self.config, lead.whole, x_T_D, start_S1, slot_S)
        arrays = [_bytes(x) for x in (x_T_D, start_S1, slot_S)]
        how = {"page_class": page_class.value, "between_ticks": between_ticks}
        self._send("append", {"state": lead.number, **how}, arrays)
        return super().append(
            lead.whole, x_T_D, start_S1, slot_S, page_class, between_ticks=between_ticks
        )

    def logits(self, h_T_D: Tensor) -> Tensor:
        Dims(D=self.config.width).check(h_T_D=h_T_D, dtype=self.dtype, device=self.device)
        self._send("logits", {}, [_bytes(h_T_D)])
        return super().logits(h_T_D)

    def replay(
        self, state: ModelState, slot: int, position: int, past: Sequence[PastTick]
    ) -> list[int]:
        lead = _lead(state)
        words, arrays = pack_past(past)
        where = {"state": lead.number, "slot": slot, "position": position}
        self._send("replay", {**where, "past": words}, arrays)
        return super().replay(lead.whole, slot, position, past)

    def announce_graphs(self, state: ModelState, buckets: Sequence[Bucket], mode: str) -> None:
        """Before a state's ticks are captured here: the others capture them at the same time."""
        shapes = [list(bucket) for bucket in buckets]
        self._send("graphs", {"state": _lead(state).number, "buckets": shapes, "mode": mode})

    def keep_alive(self) -> None:
        """Tell the others that there is nothing to do yet."""
        self._send("idle", {})

    def close(self) -> None:
        """End the followers: their `follow` returns. No error where they have ended already."""
        with contextlib.suppress(RankLost):
            self._send("stop", {})

    def _send(
        self, op: str, words: dict[str, Any], arrays: Sequence[np.ndarray | Groups] = ()
    ) -> None:
        self._ranks.broadcast(pack(self._words(op, words), arrays))

    def _words(self, op: str, words: dict[str, Any]) -> dict[str, Any]:
        calls = list(self._calls)
        self._calls.clear()
        return {"op": op, "calls": calls, **words}


def _lead(state: ModelState) -> LeadState:
    if not isinstance(state, LeadState):
        raise InputValueError("state: is not one that this model made")
    return state


def _as_word(value: Any) -> Any:
    if isinstance(value, KvBudget):
        return {"budget": asdict(value)}
    return {"dtype": str(value)} if isinstance(value, torch.dtype) else value


def _bytes(x: Tensor) -> np.ndarray:
    return x.cpu().contiguous().view(-1).view(torch.uint8).numpy()
