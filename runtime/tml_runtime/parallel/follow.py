"""The ranks after 0: they do what rank 0 does, in its order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tml_kernels.kv_cache import CacheError, PageClass

from ..errors import InputValueError
from ..graph import TickGraphs
from ..model import InteractionModel, KvBudget, ModelState, TickOutput
from ..model.buffers import Bucket
from .message import unpack, unpack_past, unpack_tick
from .ranks import Ranks, digest

Arrays = list[np.ndarray]
Words = dict[str, Any]
REFUSALS = (CacheError, ValueError, TypeError)  # which rank 0 gets too, and its caller deals with
PAGE_DTYPES = {
    str(dtype): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
}


def follow(model: InteractionModel) -> int:
    """Do what rank 0 does until it closes; returns the number of ticks.

    Every other rank calls it, once it has its share of the model. Raises RankLost when rank 0 ends
    without closing or is silent for the ranks' timeout, and whatever a tick raises: the process
    should end then.
    """
    ranks = model.ranks
    if ranks is None or ranks.rank == 0:
        where = "no ranks" if ranks is None else "rank 0"
        raise InputValueError(f"model: has {where}; the ranks after 0 follow it")
    ranks.agree(weight_facts(model))
    follower = _Follower(model, ranks)
    with torch.inference_mode():
        for words, arrays in _messages(ranks):
            follower.repeat(words["calls"])
            follower.do(words, arrays)
    return follower.num_ticks


def compare(ranks: Ranks, state: ModelState, out: TickOutput) -> None:
    """RanksDiffer unless a tick has left the same behind on all ranks."""
    lengths = [state.length(slot) for slot in range(state.num_slots)]
    ranks.check("what the tick said", (out.token_S_K, out.mel_S_K_B, out.fault_S))
    ranks.check("the books of keys", (torch.tensor([*lengths, *out.kv_pages, *out.kv_dropped]),))
    ranks.check("sampling and draws", (state.draws_N, state.seed_N, state.temperature_N))


def weight_facts(model: InteractionModel) -> dict[str, object]:
    """Of what every rank has of a model."""
    w = model.weights
    same = [w.norm_D, w.embed_norm_D, *(layer.attn_norm_D for layer in w.layers)]
    return {"weights, by their norms": digest(same)}


class _Follower:
    """A method for each thing that rank 0 does; `words` and `arrays` are its message's."""

    def __init__(self, model: InteractionModel, ranks: Ranks) -> None:
        self.num_ticks = 0
        self._model = model
        self._ranks = ranks
        self._states: list[ModelState] = []

    def repeat(self, calls: list[list[Any]]) -> None:
        """What was done to sessions since the last message."""
        for number, where, verb, args, options in calls:
            state = self._states[number]
            with contextlib.suppress(*REFUSALS):
                if where == "state":
                    getattr(state, verb)(*args, **options)
                else:
                    slot, *rest = args
                    getattr(state.cache, verb)(state.session(slot), *rest, **options)

    def do(self, words: Words, arrays: Arrays) -> None:
        op = words["op"]
        if op == "new_state":
            options = {name: _from_word(value) for name, value in words["options"].items()}
            self._states.append(self._model.new_state(words["num_slots"], **options))
        elif op == "tick":
            self._tick(words, arrays)
        elif op == "append":
            self._append(words, arrays)
        elif op == "replay":
            past = unpack_past(words["past"], arrays)
            with contextlib.suppress(*REFUSALS):
                state = self._states[words["state"]]
                self._model.replay(state, words["slot"], words["position"], past)
        elif op == "graphs":
            buckets = [Bucket(*shape) for shape in words["buckets"]]
            state = self._states[words["state"]]
            TickGraphs(self._model, state, buckets=buckets, mode=words["mode"])
        elif op == "logits":
            self._model.logits(self._rows(arrays[0]))

    def _tick(self, words: Words, arrays: Arrays) -> None:
        state = self._states[words["state"]]
        out = self._model.tick(state, unpack_tick(words, arrays))
        self.num_ticks += 1
        if self._ranks.checked:
            compare(self._ranks, state, out)

    def _append(self, words: Words, arrays: Arrays) -> None:
        device = self._model.device
        start_S1, slot_S = (_tensor(array, torch.int32, device) for array in arrays[1:])
        page_class = PageClass(words["page_class"])
        with contextlib.suppress(*REFUSALS):
            x_T_D = self._rows(arrays[0])
            self._model.append(
                self._states[words["state"]],
                x_T_D,
                start_S1,
                slot_S,
                page_class,
                between_ticks=words["between_ticks"],
            )

    def _rows(self, array: np.ndarray) -> Tensor:
        flat = _tensor(array, self._model.dtype, self._model.device)
        return flat.view(-1, self._model.config.width)


def _messages(ranks: Ranks) -> Iterator[tuple[Words, Arrays]]:
    """Every message of rank 0, the last one, "stop", too."""
    op = None
    while op != "stop":
        words, arrays = unpack(ranks.broadcast(None))
        op = words["op"]
        yield words, arrays


def _from_word(value: Any) -> Any:
    if isinstance(value, dict):
        return KvBudget(**value["budget"]) if "budget" in value else PAGE_DTYPES[value["dtype"]]
    return value


def _tensor(array: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.from_numpy(array).view(dtype).to(device)
