from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_model import small_config

from tml_kernels.ops.expert_mlp import cases as expert_cases
from tml_kernels.ops.linear.configs import problem_of, scratch_bytes
from tml_runtime import InteractionModel
from tml_runtime.model.scratch import Scratch

EXPERTS = expert_cases.Case(1, 64, 32, 4, 2, 1).make_weights("cpu")
META = torch.device("meta")  # allocates nothing; on a CPU there is no scratch


def test_a_cpu_needs_none() -> None:
    scratch = Scratch(torch.device("cpu"))
    assert scratch.linear(torch.zeros(1, 4096), torch.zeros(64, 4096)) is None
    assert scratch.sample(torch.zeros(2, 100)) is None
    assert scratch.routing(torch.zeros(2, 64), EXPERTS, 2) is None


def test_a_buffer_is_as_large_as_its_largest_call_and_stays() -> None:
    scratch = Scratch(META)
    weight = torch.empty(4096, 4096, dtype=torch.bfloat16, device=META)
    few, more = (torch.empty(t, 4096, dtype=torch.bfloat16, device=META) for t in (1, 40))
    first = scratch.linear(few, weight)
    assert first is not None and first.dtype == torch.uint8
    assert first.numel() == scratch_bytes(problem_of(few, weight))
    larger = scratch.linear(more, weight)
    assert larger is not None and larger.numel() > first.numel()
    assert scratch.linear(few, weight) is larger


def test_ops_do_not_share_a_buffer() -> None:
    """One's partial sums may lie where another counts."""
    scratch = Scratch(META)
    x = torch.empty(1, 4096, dtype=torch.bfloat16, device=META)
    linear = scratch.linear(x, torch.empty(4096, 4096, dtype=torch.bfloat16, device=META))
    sample = scratch.sample(torch.empty(1, 200_000, device=META))
    assert linear is not sample and sample is not None and sample.dtype == torch.int32


def test_sample_has_a_buffer_for_each_number_of_rows() -> None:
    """Its counters are zero between calls of one shape only."""
    scratch = Scratch(META)
    logits = torch.empty(8, 200_000, device=META)
    eight = scratch.sample(logits)
    assert scratch.sample(logits[:3]) is not eight
    assert scratch.sample(logits) is eight


def test_a_routing_is_kept_for_each_number_of_tokens() -> None:
    scratch = Scratch(META)
    x = torch.empty(8, 64, device=META)
    eight = scratch.routing(x, EXPERTS, 2)
    assert eight is not None and eight.inv_rms_T is not None
    assert (eight.expert_T_K.shape, eight.shared_weight_T_Z.shape) == ((8, 2), (8, 1))
    assert eight.num_experts == 4
    assert scratch.routing(x[:3], EXPERTS, 2) is not eight
    assert scratch.routing(x, EXPERTS, 2) is eight


def test_a_call_that_needs_none_gets_none() -> None:
    """As many rows as fill the chip are summed by one program each."""
    x = torch.empty(1, 4096, dtype=torch.bfloat16, device=META)
    weight = torch.empty(200_000, 4096, dtype=torch.bfloat16, device=META)
    assert Scratch(META).linear(x, weight) is None


@pytest.mark.gpu
def test_gpu_ticks_of_a_state_share_scratch_and_leave_it_fit() -> None:
    config = replace(small_config(), width=1024)
    model = InteractionModel.random(config, device="cuda", dtype=torch.bfloat16)
    state = model.new_state(2)
    x_T_D = torch.randn(6, config.width, device="cuda", dtype=torch.bfloat16)
    start, slot = (torch.tensor(v, dtype=torch.int32, device="cuda") for v in ([0, 6], [1]))
    results = []
    for _ in range(3):
        state.reset(1)
        results.append(model.append(state, x_T_D, start, slot))
        buffers = {name: buffer.data_ptr() for name, buffer in state.scratch._buffers.items()}
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert buffers
