"""What the sessions of one model hold between calls: a fixed slot each, all of it preallocated."""

# Dimension key: L layers, N slots, D model width, W samples of audio tail, F mel frames of an
# output step, B mel bands.

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .config import ModelConfig
from .pages import CONV_TAPS, KvGroup


@dataclass(frozen=True)
class ModelState:
    """All of it lives as long as the model serves; a session is a slot of it, until its reset.

    A global layer sees a session's last `max_tokens` tokens, a local layer its window. The length
    counts every token since the reset and is never wrapped.
    """

    config: ModelConfig
    max_tokens: int
    max_append: int  # the longest block one pass over the layers takes; longer ones are cut
    local: KvGroup
    global_: KvGroup
    attn_conv_L_N_3_D: Tensor
    mlp_conv_L_N_3_D: Tensor
    length_N: Tensor  # int64, tokens appended since the reset
    tail_N_W: Tensor  # float32, the newest samples heard, which the next dMel frame needs
    token_N: Tensor  # int64, what the last output step said
    levels_N_F_B: Tensor  # uint8, the speech frames it said it in
    draws_N: Tensor  # int64, output steps since the reset: the counter of all random numbers
    temperature_N: Tensor  # float32, 0: greedy
    top_k_N: Tensor  # int32, 0: off
    top_p_N: Tensor  # float32, 1: off
    seed_N: Tensor  # int64

    @classmethod
    def zeros(
        cls,
        config: ModelConfig,
        num_slots: int,
        *,
        max_tokens: int,
        max_append: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> ModelState:
        """Everything allocated, every slot as after `reset`."""
        _check_positive(num_slots=num_slots, max_tokens=max_tokens, max_append=max_append)
        assert config.local_heads.window is not None
        make_group = partial(
            KvGroup.zeros, num_slots=num_slots, max_append=max_append, device=device, dtype=dtype
        )
        num_global, layout = len(config.global_layers), config.layout

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_slots, *shape, device=device, dtype=dtype)

        taps = (config.num_layers, num_slots, CONV_TAPS, config.width)
        state = cls(
            config=config,
            max_tokens=max_tokens,
            max_append=max_append,
            local=make_group(
                config.local_heads,
                num_layers=config.num_layers - num_global,
                window=config.local_heads.window,
            ),
            global_=make_group(config.global_heads, num_layers=num_global, window=max_tokens),
            attn_conv_L_N_3_D=torch.zeros(taps, device=device, dtype=dtype),
            mlp_conv_L_N_3_D=torch.zeros(taps, device=device, dtype=dtype),
            length_N=zeros(dtype=torch.int64),
            tail_N_W=zeros(layout.dmel.tail, dtype=torch.float32),
            token_N=zeros(dtype=torch.int64),
            levels_N_F_B=zeros(
                layout.mel_frames_per_step, layout.dmel.num_bands, dtype=torch.uint8
            ),
            draws_N=zeros(dtype=torch.int64),
            temperature_N=zeros(dtype=torch.float32),
            top_k_N=zeros(dtype=torch.int32),
            top_p_N=zeros(dtype=torch.float32),
            seed_N=zeros(dtype=torch.int64),
        )
        for slot in range(num_slots):
            state.reset(slot)
        return state

    @property
    def num_slots(self) -> int:
        return self.length_N.shape[0]

    def reset(self, slot: int) -> None:
        """Make a slot as new: nothing a session left in it, NaN included, reaches the next one.

        Pages are not cleared, they become unreachable: see pages.py.
        """
        self._check_slot(slot)
        self.length_N[slot] = 0
        for group in (self.local, self.global_):
            group.conv_L_N_2_3_W[:, slot] = 0
        self.attn_conv_L_N_3_D[:, slot] = 0
        self.mlp_conv_L_N_3_D[:, slot] = 0
        self.tail_N_W[slot] = 0
        self.token_N[slot] = self.config.vocab.silence
        self.levels_N_F_B[slot] = 0
        self.draws_N[slot] = 0
        self.set_sampling(slot)

    def set_sampling(
        self,
        slot: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        """How a slot draws its tokens and its speech. The default is the model's distribution."""
        self._check_slot(slot)
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"temperature={temperature} is not a finite number >= 0")
        if not 0 <= top_k < 2**31:
            raise ValueError(f"top_k={top_k} is not in 0..2**31-1 (0: off)")
        if not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p={top_p} is not in (0, 1] (1: off)")
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed={seed} does not fit 64 bits")
        self.temperature_N[slot] = temperature
        self.top_k_N[slot] = top_k
        self.top_p_N[slot] = top_p
        self.seed_N[slot] = seed

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"slot={slot} is not in 0..{self.num_slots - 1}")


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} is not positive")
