"""A model small enough to see through: it keeps what it hears, and what it says tells its state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tml_kernels.kv_cache import NoSnapshot
from tml_runtime import ModelConfig, Runtime, TurnLayout
from tml_runtime.model import PastTick, TickInput, TickOutput
from tml_runtime.model.layout import DMEL_25HZ

CONFIG = ModelConfig.preset("tiny")
SILENCE, DELEGATE, YIELD = CONFIG.vocab.silence, CONFIG.vocab.delegate, CONFIG.vocab.yield_turn
# The shortest tick the checks of TurnLayout allow: one frame.
MS40 = TurnLayout(period_ms=40, dmel=DMEL_25HZ, num_steps=1)


@dataclass
class Heard:
    """One row of one tick, copied."""

    slot: int
    pcm: np.ndarray
    missing: bool
    frames: np.ndarray | None
    text: list[int]


def heard(
    pcm_W: np.ndarray, missing: bool, text: Sequence[int], frames: np.ndarray | None
) -> float:
    seen = 0.0 if frames is None else float(np.asarray(frames, np.float64).mean())
    return float(np.float64(pcm_W.sum()) + missing) + sum(text) + seen


class FakeState:
    def __init__(self, num_slots: int) -> None:
        self.memory = [0.0] * num_slots  # everything a slot ever heard, as one number
        self.lengths = [0] * num_slots
        self.ends: list[dict[int, float]] = [{0: 0.0} for _ in range(num_slots)]  # by length
        self.priority = [0] * num_slots
        self.away: set[int] = set()
        self.sampling: list[dict] = [{}] * num_slots
        self.resets = [0] * num_slots

    def reset(self, slot: int, *, priority: int = 0) -> None:
        self.memory[slot], self.lengths[slot], self.ends[slot] = 0.0, 0, {0: 0.0}
        self.priority[slot] = priority
        self.resets[slot] += 1

    def length(self, slot: int) -> int:
        """One for every tick, and for every token read."""
        return self.lengths[slot]

    def remember(self, slot: int, heard: float) -> None:
        self.memory[slot] = 0.5 * self.memory[slot] + heard
        self.lengths[slot] += 1
        self.ends[slot][self.lengths[slot]] = self.memory[slot]
        self.ends[slot].pop(self.lengths[slot] - 16, None)

    def rewind(self, slot: int, length: int) -> None:
        if length not in self.ends[slot]:
            raise NoSnapshot(length, list(self.ends[slot]))
        self.memory[slot], self.lengths[slot] = self.ends[slot][length], length

    def put_away(self, slot: int) -> None:
        self.away.add(slot)

    def set_sampling(self, slot: int, **options) -> None:
        self.sampling[slot] = options


@dataclass
class FakeModel:
    """`say(tick, slot)` gives a tick's tokens, `on_tick(tick)` may do anything, ticks counted here.

    `faulty` holds (tick, slot) pairs. With `keep`, `heard[tick]` is the rows of that tick.
    """

    config: ModelConfig = CONFIG
    say: Callable[[int, int], Sequence[int]] | None = None
    on_tick: Callable[[int], None] | None = None
    faulty: set[tuple[int, int]] = field(default_factory=set)
    keep: bool = True
    heard: list[list[Heard]] = field(default_factory=list)
    replayed: list[tuple[int, int, list[list[int]]]] = field(default_factory=list)
    ticks: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def new_state(
        self,
        num_slots: int,
        *,
        budget: object,
        global_pages: int | None = None,
        page_dtype: torch.dtype | None = None,
    ) -> FakeState:
        return FakeState(num_slots)

    def read(self, state: FakeState, slot: int, ids: Sequence[int]) -> None:
        for token in ids:
            state.remember(slot, float(token))

    def replay(
        self, state: FakeState, slot: int, position: int, past: Sequence[PastTick]
    ) -> list[int]:
        state.rewind(slot, position)
        ends = []
        for tick in past:
            state.remember(slot, heard(tick.pcm_W, tick.missing, tick.text, tick.frames))
            ends.append(state.length(slot))
        self.replayed.append((slot, position, [tick.token_K.tolist() for tick in past]))
        return ends

    def tick(self, state: FakeState, tick: TickInput) -> TickOutput:
        layout, slots = self.config.layout, tick.slot_S.tolist()
        assert not torch.is_grad_enabled()
        token_S_K = torch.full((len(slots), layout.num_steps), SILENCE, dtype=torch.int32)
        mel_S_K_B = torch.zeros(len(slots), layout.mel_frames, layout.dmel.num_bands)
        fault_S = torch.zeros(len(slots), dtype=torch.bool)
        for row, slot in enumerate(slots):
            missing = bool(tick.missing_S[row])
            pcm_W = tick.pcm_S_W[row].numpy()
            state.remember(slot, heard(pcm_W, missing, tick.text[row], tick.frames[row]))
            state.away.discard(slot)
            mel_S_K_B[row] = state.memory[slot] + state.sampling[slot].get("seed", 0) % 1000
            if self.say is not None:
                token_S_K[row] = torch.tensor(self.say(self.ticks, slot), dtype=torch.int32)
            fault_S[row] = (self.ticks, slot) in self.faulty
        if self.keep:
            self.heard.append([self._copy(tick, row) for row in range(len(slots))])
        if self.on_tick is not None:
            self.on_tick(self.ticks)
        self.ticks += 1
        return TickOutput(token_S_K, mel_S_K_B, fault_S, {"think": 1})

    @staticmethod
    def _copy(tick: TickInput, row: int) -> Heard:
        frames = tick.frames[row]
        return Heard(
            slot=int(tick.slot_S[row]),
            pcm=tick.pcm_S_W[row].numpy().copy(),
            missing=bool(tick.missing_S[row]),
            frames=None if frames is None else np.array(frames),
            text=list(tick.text[row]),
        )


class FakeVocoder:
    """Samples of frame k: the frame's first band, plus how many frames came since the reset."""

    def __init__(self, hop: int = CONFIG.layout.dmel.hop) -> None:
        self._hop = hop
        self.reset()

    def push(self, mel_K_B: torch.Tensor) -> np.ndarray:
        frames = mel_K_B[:, 0].numpy() + np.arange(self._count, self._count + len(mel_K_B))
        self._count += len(mel_K_B)
        return np.repeat(frames.astype(np.float32), self._hop)

    def reset(self) -> None:
        self._count = 0


def make_runtime(model: FakeModel | None = None, **options) -> tuple[Runtime, FakeModel]:
    """A runtime on the virtual clock, unless told otherwise, and its fake model."""
    model = FakeModel() if model is None else model
    hop = model.config.layout.dmel.hop
    options = {"realtime": False, "vocoder": lambda: FakeVocoder(hop)} | options
    return Runtime(model, **options), model  # type: ignore[arg-type]
