"""A tick that has passed, once more: the same input, and an output that is given."""

# Dimension key: S session rows (here one), T tokens, D model width, W samples of a tick, K output
# steps, M mel frames of a tick, B mel bands.

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from tml_kernels.ops.dmel.reference import quantise_ref

from .backbone import Backbone
from .frontend import Frontend
from .passes import classes_of, plan_pass
from .state import ModelState
from .tick import embed_rows
from .tick_input import Frames, TickInput


class PastTick(NamedTuple):
    """What a session heard and said in one tick, on the host."""

    pcm_W: np.ndarray  # float32
    missing: bool
    frames: Frames | None
    text: list[int]
    token_K: np.ndarray  # int32
    mel_M_B: np.ndarray  # float32


def replay_tick(
    backbone: Backbone,
    frontend: Frontend,
    state: ModelState,
    slot: int,
    past: PastTick,
    ago: int = 0,
) -> None:
    """The slot hears `past` and says exactly what it says: one pass over the layers, nothing drawn.

    Its state is then that of a tick in which the model had said so itself, up to the rounding of
    sums. ago: it was so many ticks before the last one. Raises CacheError where there is no room;
    the session is then as it was.
    """
    config, device = backbone.config, state.device
    tick = TickInput(
        torch.tensor([slot], dtype=torch.int32),
        torch.from_numpy(past.pcm_W)[None],
        torch.tensor([past.missing]),
        [past.frames],
        [past.text],
    )
    counts = tick.counts(config)[0].tolist()
    runs = list(zip(classes_of(config.layout.blocks), counts, strict=True))
    state.reserve(slot, runs)
    try:
        token_K = torch.from_numpy(past.token_K).to(device)
        levels_M_B = quantise_ref(torch.from_numpy(past.mel_M_B).to(device), config.layout.dmel)
        levels_K_F_B = levels_M_B.unflatten(0, (config.layout.num_steps, -1))
        heard_T_D, _ = embed_rows(frontend, state, tick)  # ends with the input of the first step
        said_T_D = frontend.embed_step(token_K[:-1], levels_K_F_B[:-1])
        state.token_N[slot] = token_K[-1]
        state.levels_N_F_B[slot] = levels_K_F_B[-1]
        state.draws_N[slot] += config.layout.num_steps
        step = plan_pass(state, [slot], [runs])
        backbone.run(state, torch.cat([heard_T_D, said_T_D]), step)
    except BaseException:
        state.roll_back([slot])
        raise
    state.commit_between([slot], ago)
