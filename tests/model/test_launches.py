"""What one output step asks of the device, counted from the log of its ops."""

from __future__ import annotations

from collections import Counter

import torch
from small_model import small_config

from tml_kernels.kv_cache import PageClass
from tml_kernels.testing import LAUNCHES, count_launches, log_ops
from tml_runtime.model import InteractionModel
from tml_runtime.model.passes import plan_pass


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
        "short_conv": 2 * num_layers,
        "linear": 2 * num_layers + 2 * num_dense,
        "route": num_sparse,
        "expert_mlp": num_sparse,
    }
    assert count_launches(ours) - 2 == 8 * num_dense + 9 * num_sparse
    # What else torch launches does not grow with the layers.
    torchs_own = {op: n for op, n in log.items() if op not in LAUNCHES}
    assert torchs_own == {"arange": 1, "full_like": 1, "clone": 1}
