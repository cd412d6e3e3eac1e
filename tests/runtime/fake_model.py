"""A model small enough to see through: it keeps what it hears, and what it says tells its state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tml_runtime import ModelConfig, Runtime, TurnLayout
from tml_runtime.model import TickInput, TickOutput
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


class FakeState:
    def __init__(self, num_slots: int) -> None:
        self.memory = [0.0] * num_slots  # everything a slot ever heard, as one number
        self.sampling: list[dict] = [{}] * num_slots
        self.resets = [0] * num_slots

    def reset(self, slot: int) -> None:
        self.memory[slot] = 0.0
        self.resets[slot] += 1

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
    ticks: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def new_state(self, num_slots: int, *, budget: object) -> FakeState:
        return FakeState(num_slots)

    def tick(self, state: FakeState, tick: TickInput) -> TickOutput:
        layout, slots = self.config.layout, tick.slot_S.tolist()
        assert not torch.is_grad_enabled()
        token_S_K = torch.full((len(slots), layout.num_steps), SILENCE, dtype=torch.int32)
        mel_S_K_B = torch.zeros(len(slots), layout.mel_frames, layout.dmel.num_bands)
        fault_S = torch.zeros(len(slots), dtype=torch.bool)
        for row, slot in enumerate(slots):
            heard = float(tick.pcm_S_W[row].sum() + tick.missing_S[row]) + sum(tick.text[row])
            if tick.frames[row] is not None:
                heard += float(np.asarray(tick.frames[row], np.float64).mean())
            state.memory[slot] = 0.5 * state.memory[slot] + heard
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
