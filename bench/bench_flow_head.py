"""flow_head: a deep narrow network for few rows, its weights read again in every step."""

from __future__ import annotations

from torch import Tensor

from tml_kernels.ops.flow_head import FlowWeights, cases, flow_head
from tml_kernels.ops.flow_head.reference import flow_head_ref
from tml_kernels.testing import assert_matches

from .harness import OpBench, Variant


def check(case: cases.Case, device: str) -> None:
    inputs = case.make_inputs(device)
    assert_matches(flow_head(**inputs), flow_head_ref(**inputs))


def torch_flow_head(
    cond_S_D: Tensor,
    weights: FlowWeights,
    seed_S: Tensor,
    counter_S: Tensor,
    num_steps: int,
    guidance: float,
) -> Tensor:
    """The reference's lines in the weights' dtype."""
    arguments = (cond_S_D, weights, seed_S, counter_S)
    return flow_head_ref(*arguments, num_steps=num_steps, guidance=guidance, dtype=cond_S_D.dtype)


OP = OpBench(
    name="flow_head",
    edge=cases.EDGE,
    model=cases.MODEL,
    bench=cases.BENCH,
    check=check,
    variants={
        "ours": Variant(flow_head),
        # In bf16 throughout, noise and integration included: another function, not compared.
        "torch": Variant(torch_flow_head, check=False),
    },
)
