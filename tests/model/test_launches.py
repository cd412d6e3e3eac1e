"""What one output step asks of the device, counted from the log of its ops."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from small_model import small_config
from torch import Tensor

from tml_kernels.kv_cache import PageClass
from tml_kernels.testing import LAUNCHES, assert_bitwise, count_launches, log_ops
from tml_runtime.model import InteractionModel, ModelState, TickInput
from tml_runtime.model.backbone import Backbone
from tml_runtime.model.passes import Pass, plan_pass


def log_of_a_step() -> tuple[InteractionModel, Counter[str]]:
    """A decode pass over all layers, after a prefill; with its input's embedding."""
    model = InteractionModel.random(small_config())
    state = model.new_state(2)
    start_S1 = torch.tensor([0, 3, 7], dtype=torch.int32)
    slot_S = torch.tensor([1, 0], dtype=torch.int32)
    model.append(state, torch.randn(7, model.config.width), start_S1, slot_S)
    runs = [[(PageClass.REPLY, 1)]] * 2
    for slot in (1, 0):
        state.reserve(slot, runs[0])
    step = plan_pass(state, [1, 0], runs)
    token_S = torch.tensor([3, 4], dtype=torch.int32)
    levels_S_F_B = torch.zeros(2, 1, 80, dtype=torch.uint8)
    log = log_ops(
        lambda: model.backbone.run(state, model.frontend.embed_step(token_S, levels_S_F_B), step)
    )
    state.commit([1, 0])
    return model, log


def next_states(device: str, dtype: torch.dtype, *, one_each: bool) -> list[Tensor]:
    """Hidden states of three passes of one token for each of three rows, one of them idle."""
    generator = torch.Generator().manual_seed(0)
    config = small_config() if device == "cpu" else replace(small_config(), width=1024)
    model = InteractionModel.random(config, device=device, dtype=dtype)
    state, slots = model.new_state(3), [2, -1, 0]
    out = []
    for _ in range(3):
        x_T_D = torch.randn(3, model.config.width, generator=generator).to(device, dtype)
        for slot in (2, 0):
            state.reserve(slot, [(PageClass.REPLY, 1)])
        step = plan_pass(state, slots, [[(PageClass.REPLY, 1)]] * 3)
        assert step.one_each
        out.append(model.backbone.run(state, x_T_D, step._replace(one_each=one_each)))
        state.commit([2, 0])
    return [*out, state.attn_conv_L_N_3_D, state.mlp_conv_L_N_3_D]


@pytest.mark.parametrize(
    ("place", "dtype"),
    [
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_a_step_in_fewer_launches_has_the_same_bits(place: str, dtype: torch.dtype) -> None:
    """A token says the same whether it comes alone, as in an output step, or in a prefill."""
    fewer = next_states(place, dtype, one_each=True)
    more = next_states(place, dtype, one_each=False)
    for ours, theirs in zip(fewer, more, strict=True):
        assert_bitwise(ours, theirs)


def test_passes_of_one_token_each_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = InteractionModel.random(small_config())
    state = model.new_state(3)

    def one_each(*sizes: int) -> bool:
        runs = [[(PageClass.REPLY, size)] if size else [] for size in sizes]
        slots = list(range(len(sizes)))
        for slot in slots:
            state.reserve(slot, runs[slot])
        step = plan_pass(state, slots, runs)
        state.roll_back(slots)
        return step.one_each

    assert one_each(1, 1, 1)
    assert not one_each(1, 2, 0)  # three rows, three tokens
    passes, run = [], Backbone.run

    def watched(self: Backbone, state: ModelState, x_T_D: Tensor, step: Pass) -> Tensor:
        passes.append(step.one_each)
        return run(self, state, x_T_D, step)

    monkeypatch.setattr(Backbone, "run", watched)
    pcm_S_W = torch.zeros(2, model.config.layout.samples_per_tick)
    slot_S = torch.tensor([0, -1], dtype=torch.int32)
    model.tick(state, TickInput(slot_S, pcm_S_W, torch.zeros(2, dtype=torch.bool)))
    assert passes == [False, True, True, True]


def test_launches_of_an_output_step() -> None:
    model, log = log_of_a_step()
    ours = Counter({op: count for op, count in log.items() if op in LAUNCHES})
    num_dense = len(model.config.dense_layers)
    num_layers, num_sparse = model.config.num_layers, model.config.num_layers - num_dense
    assert ours == {
        "embed_tokens": 1,
        "rms_norm": 1,  # of the first layer; the others' follow a short_conv
        "attention_prologue": num_layers,
        "paged_attention": num_layers,
        "linear": num_layers + 3 * num_dense,
        "linear_conv": num_sparse,
        "short_conv": num_layers + num_dense,
        "route": num_sparse,
        "expert_mlp": num_sparse,
    }
    assert count_launches(ours) - 2 == 8 * num_layers
    # What else torch launches does not grow with the layers.
    torchs_own = {op: n for op, n in log.items() if op not in LAUNCHES}
    assert torchs_own == {"arange": 1, "full_like": 1, "clone": 1}
