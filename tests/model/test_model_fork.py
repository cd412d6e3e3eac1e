"""Forks of a model's state."""

from __future__ import annotations

import pytest
import torch

from tml_kernels.kv_cache import OutOfPages
from tml_runtime import InteractionModel, ModelConfig
from tml_runtime.model import TickInput


def silence(model: InteractionModel, slot: int) -> TickInput:
    return TickInput(
        torch.tensor([slot], dtype=torch.int32),
        torch.zeros(1, model.config.layout.samples_per_tick),
        torch.tensor([False]),
        [None],
        [[]],
    )


def test_without_pages_a_fork_leaves_an_empty_slot() -> None:
    model = InteractionModel.random(ModelConfig.preset("tiny"), seed=0)
    state = model.new_state(2, global_pages=6)
    with torch.inference_mode():
        for _ in range(400):
            model.tick(state, silence(model, 0))
            try:
                state.fork(0, 1)
            except OutOfPages:
                break
            state.reset(1)
        else:
            pytest.fail("never out of pages")
        assert state.length(1) == 0
        state.cache.check_invariants()
        state.reset(0)
        assert not model.tick(state, silence(model, 1)).fault_S.any()
