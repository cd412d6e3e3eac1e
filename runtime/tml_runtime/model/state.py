"""What the sessions of one model hold between calls: a fixed slot each, all of it preallocated."""

# Dimension key: L layers of a group, N slots, S session rows of a call, D model width, W samples of
# audio tail or G * C channels of K and V, F mel frames of an output step, B mel bands.

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tml_kernels.kv_cache import (
    CLASSES,
    CacheError,
    GroupPages,
    PageClass,
    RollingKVCache,
    Session,
    SessionFileError,
)

from .buffers import TickBuffers, TickShape
from .config import ModelConfig
from .parts import KvBudget, cache_groups, conv_name, places_of, slot_tensors
from .scratch import Scratch

Run = tuple[PageClass, int]  # tokens of one class, in their order


@dataclass(frozen=True)
class LayerState:
    """Of the layers with one window and head shape: their pages, and the taps of K and V."""

    pages: GroupPages
    conv_L_N_2_3_W: Tensor

    @property
    def window(self) -> int | None:
        return self.pages.spec.window


@dataclass(frozen=True)
class ModelState:
    """All of it lives as long as the model serves; every slot always holds a session, which `reset`
    ends and replaces by a new one.

    Positions count every token since the reset and are never wrapped. `cache` owns all that a
    session holds: pages, and the tensors below by their slot; its verbs (mark, rewind, suspend,
    save, ...) take `session(slot)`.
    """

    config: ModelConfig
    budget: KvBudget
    max_append: int  # the longest block one pass over the layers takes; longer ones are cut
    cache: RollingKVCache
    groups: tuple[LayerState, ...]
    scratch: Scratch
    buffers: TickBuffers
    _sessions: list[Session]  # by slot
    _paged: int | None  # the group of the global layers
    _dropped: list[int]  # its pages by class, until the last take_dropped
    places: tuple[tuple[int, int], ...]  # of each layer: its group, and where it is there
    attn_conv_L_N_3_D: Tensor
    mlp_conv_L_N_3_D: Tensor
    tail_N_W: Tensor  # float32, the newest samples heard, which the next dMel frame needs
    token_N: Tensor  # int64, what the last output step said
    levels_N_F_B: Tensor  # uint8, the speech frames it said it in
    draws_N: Tensor  # int64, output steps since the reset: the counter of all random numbers
    temperature_N: Tensor  # float32, 0: greedy
    top_k_N: Tensor  # int32, 0: off
    top_p_N: Tensor  # float32, 1: off
    min_p_N: Tensor  # float32, 0: off
    seed_N: Tensor  # int64
    num_drafts: int = (
        0  # multi-token-prediction layers that follow the model's; 0: ticks do not draft
    )
    carry_L_N_D: Tensor | None = None  # what each of these takes of the last token

    @classmethod
    def new(
        cls,
        config: ModelConfig,
        num_slots: int,
        *,
        budget: KvBudget,
        max_append: int,
        device: torch.device,
        dtype: torch.dtype,
        page_dtype: torch.dtype,
        global_pages: int | None = None,
        drafts: bool = False,
    ) -> ModelState:
        """Everything allocated, every slot as after `reset`. global_pages: of all sessions, by
        default as many as their budgets; fewer are shared as far as they go. drafts: ticks draft
        (`drafts`), which needs more layers' keys and taps."""
        _check_positive(num_slots=num_slots, max_append=max_append)
        longest = max(max_append, config.layout.max_tokens_per_tick)
        num_drafts = config.num_drafts if drafts else 0
        specs = cache_groups(
            config.with_drafts(num_drafts), num_slots, budget, longest, global_pages
        )

        by_slot = slot_tensors(
            config, specs, num_slots, device=device, dtype=dtype, num_drafts=num_drafts
        )
        cache = RollingKVCache(
            specs,
            max_sessions=num_slots,
            page_dtype=page_dtype,
            device=device,
            slot_tensors=by_slot,
        )
        convs = [by_slot.pop(conv_name(g)).tensor for g in range(len(specs))]
        groups = tuple(map(LayerState, cache.groups, convs))
        sessions = [cache.open(budget.pages()) for _ in range(num_slots)]
        assert [session.slot for session in sessions] == list(range(num_slots))
        tensors = {name: x.tensor for name, x in by_slot.items()}
        dropped = [0] * len(CLASSES)
        shape = TickShape.of(config, specs, num_slots, drafts=drafts)
        buffers = TickBuffers(shape, device)
        scratch = Scratch(device)
        paged = next((g for g, spec in enumerate(specs) if spec.window is None), None)
        return cls(
            config, budget, max_append, cache, groups, scratch, buffers, sessions, paged, dropped,
            places_of(config.with_drafts(num_drafts)), num_drafts=num_drafts, **tensors,
        )  # fmt: skip

    @property
    def num_slots(self) -> int:
        return len(self._sessions)

    @property
    def dtype(self) -> torch.dtype:
        return self.attn_conv_L_N_3_D.dtype

    @property
    def device(self) -> torch.device:
        return self.cache.device

    def taps(self, layer: int = 0) -> list[Tensor]:
        """Of all convolutions of the layers from `layer` on: [layers, N, ..., 3, width] each."""
        begin = [
            sum(g == place[0] for place in self.places[:layer]) for g in range(len(self.groups))
        ]
        return [
            self.attn_conv_L_N_3_D[layer:],
            self.mlp_conv_L_N_3_D[layer:],
            *(group.conv_L_N_2_3_W[i:] for group, i in zip(self.groups, begin, strict=True)),
        ]

    def session(self, slot: int) -> Session:
        self._check_slot(slot)
        return self._sessions[slot]

    def length(self, slot: int) -> int:
        """Tokens appended since the reset."""
        return self.cache.length(self.session(slot))

    def kv_pages(self, slots: Iterable[int]) -> list[int]:
        """Pages that sessions hold in global layers, by class in the order of PageClass."""
        if self._paged is None:
            return [0] * len(CLASSES)
        return self.cache.held([self.session(slot) for slot in slots], self._paged)

    def take_dropped(self) -> list[int]:
        """Pages of global layers, by class, that sessions lost since the last call: over a budget,
        or to make room. What a session holds as it ends does not count."""
        if self._paged is None:
            return [0] * len(CLASSES)
        before, now = list(self._dropped), self.cache.dropped(self._paged)
        self._dropped[:] = now
        return [new - old for new, old in zip(now, before, strict=True)]

    def reset(self, slot: int, *, priority: int = 0) -> None:
        """Make a slot as new: nothing a session left in it, NaN included, reaches the next one.

        Pages are not cleared, they go back to the pool: a page's rows are read only once written.
        priority: where pages run out, sessions of a lower one give way first.
        """
        self.cache.close(self.session(slot))
        self._sessions[slot] = self.cache.open(self.budget.pages(), priority=priority)
        assert self._sessions[slot].slot == slot  # the slot freed last is handed out first

    def fork(self, slot: int, to_slot: int) -> None:
        """Make `to_slot` a session that goes on where `slot` is; what was in it ends, also when
        there are no pages for that, which is OutOfPages and leaves it as new."""
        session, target = self.session(slot), self.session(to_slot)
        if slot == to_slot:
            raise ValueError(f"to_slot={to_slot} is the slot that is forked")
        self.cache.close(target)
        try:
            self._sessions[to_slot] = self.cache.fork(session)
        except BaseException:
            self._sessions[to_slot] = self.cache.open(self.budget.pages())
            raise
        assert self._sessions[to_slot].slot == to_slot

    def load(self, slot: int, path: str | Path) -> None:
        """Make `slot` the session that `cache.save` wrote, with as much of it as this state's
        budget keeps; what was in it ends. SessionFileError also for tokens, levels or settings that
        no session of this model has."""
        self.cache.close(self.session(slot))
        try:
            session = self.cache.load(path, budgets=self.budget.pages())
            try:
                self._check_rows(session.slot, Path(path))
            except BaseException:
                self.cache.close(session)
                raise
            self._sessions[slot] = session
        except BaseException:
            self._sessions[slot] = self.cache.open(self.budget.pages())
            raise
        assert self._sessions[slot].slot == slot

    def _check_rows(self, slot: int, path: Path) -> None:
        """Raises SessionFileError. What a file holds is not trusted: a token that is none would be
        an error of every later tick."""
        rows = {name: x.cpu() for name, x in self.cache.slot_rows(slot).items()}
        token, levels = int(rows["token_N"]), rows["levels_N_F_B"]
        num_valid, num_levels = self.config.vocab.num_valid, self.config.layout.dmel.num_levels
        if not 0 <= token < num_valid:
            raise SessionFileError(path, "token_N", f"{token=} is not in 0..{num_valid - 1}")
        if int(levels.max()) >= num_levels:
            raise SessionFileError(path, "levels_N_F_B", f"a level is not below {num_levels}")
        names = ("temperature", "top_k", "top_p", "min_p", "seed")
        settings: list[Any] = [rows[f"{name}_N"].item() for name in names]
        try:
            check_sampling(*settings)
        except ValueError as error:
            raise SessionFileError(path, "", str(error)) from None

    def put_away(self, slot: int) -> None:
        """Move a slot's keys to host memory, until its next tick. Waits for the device."""
        session = self.session(slot)
        if not self.cache.is_suspended(session):
            self.cache.suspend(session)
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()

    def bring_back(self, slot: int) -> None:
        """Undo `put_away`, and what pages running out did. Raises OutOfPages."""
        session = self.session(slot)
        if self.cache.is_suspended(session):
            self.cache.resume(session)

    def reserve(self, slot: int, runs: Sequence[Run]) -> None:
        """Begin the slot's transaction; brings it back if it was suspended. Raises CacheError."""
        self.bring_back(slot)
        self.cache.reserve(self.session(slot), runs)

    def reserve_all(
        self, slots: Sequence[int], classes: Sequence[PageClass], tokens_S_R: np.ndarray
    ) -> dict[int, CacheError]:
        """`reserve` for one slot after the other, tokens [S, R] of R classes; the indices of those
        for which there is no room, and why."""
        sessions = [self._sessions[slot] for slot in slots]
        refused: dict[int, CacheError] = {}
        at = self.cache.reserve_all(sessions, classes, tokens_S_R)
        while at < len(slots):  # this one is not there, or needs room to be made
            try:
                self.reserve(slots[at], list(zip(classes, tokens_S_R[at].tolist(), strict=True)))
            except CacheError as error:
                refused[at] = error
            except BaseException:  # such as host memory that is refused
                self.roll_back(slot for s, slot in enumerate(slots[:at]) if s not in refused)
                raise
            at += 1
            at += self.cache.reserve_all(sessions[at:], classes, tokens_S_R[at:])
        return refused

    def append_all(
        self,
        slots: Sequence[int],
        classes: Sequence[PageClass],
        tokens_S_R: np.ndarray,
        column_S_R: np.ndarray,
        row_K_Z: np.ndarray,
        position_Z: np.ndarray,
    ) -> None:
        """What was reserved, or less of it: each run of each slot from its own column on."""
        sessions = [self._sessions[slot] for slot in slots]
        self.cache.append_all(sessions, classes, tokens_S_R, column_S_R, row_K_Z, position_Z)

    def commit(self, slots: Iterable[int]) -> None:
        """End the transactions of a tick, and the tick."""
        self.cache.commit_all([self.session(slot) for slot in slots])
        self.cache.tick()

    def commit_between(self, slots: Iterable[int], ago: int = 0) -> None:
        """End the transactions of what slots did between ticks, or in one `ago` ticks before the
        last, which takes none of the others' snapshots."""
        sessions = [self.session(slot) for slot in slots]
        self.cache.commit_all(sessions)
        self.cache.tick(sessions, ago=ago)

    def roll_back(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self.cache.roll_back(self.session(slot))

    def set_sampling(
        self,
        slot: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
    ) -> None:
        """How a slot draws its tokens and its speech. The default is the model's distribution."""
        self._check_slot(slot)
        check_sampling(temperature, top_k, top_p, min_p, seed)
        self.temperature_N[slot] = temperature
        self.top_k_N[slot] = top_k
        self.top_p_N[slot] = top_p
        self.min_p_N[slot] = min_p
        self.seed_N[slot] = seed

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"slot={slot} is not in 0..{self.num_slots - 1}")


def check_sampling(temperature: float, top_k: int, top_p: float, min_p: float, seed: int) -> None:
    """Raises ValueError for what no session draws by, NaN included."""
    if not 0.0 <= temperature <= torch.finfo(torch.float32).max:
        raise ValueError(f"temperature={temperature} is not a finite float32 >= 0")
    if not 0 <= top_k < 2**31:
        raise ValueError(f"top_k={top_k} is not in 0..2**31-1 (0: off)")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p} is not in (0, 1] (1: off)")
    if not 0.0 <= min_p <= 1.0:
        raise ValueError(f"min_p={min_p} is not in 0..1 (0: off)")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed={seed} does not fit 64 bits")


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} is not positive")
