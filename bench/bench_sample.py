"""sample: a pass over the logits of every row."""

# Dimension key: S session rows, V vocabulary.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tml_kernels.ops.sample import cases, sample
from tml_kernels.ops.sample.reference import sample_ref
from tml_kernels.testing import assert_bitwise

from .harness import OpBench, Variant
from .peers import find


def check(case: cases.Case, device: str) -> None:
    inputs = case.make_inputs(device)
    for actual, expected in zip(sample(**inputs), sample_ref(**inputs), strict=True):
        assert_bitwise(actual, expected)


def torch_sample(logits_S_V: Tensor, temperature_S: Tensor, **_: Any) -> Tensor:
    """Softmax and a race of exponentials, as in fast torch decoders; no top-k, no top-p."""
    p_S_V = torch.softmax(logits_S_V / temperature_S[:, None], dim=-1)
    return (p_S_V / torch.empty_like(p_S_V).exponential_()).argmax(dim=-1).int()


def flashinfer_sample() -> Variant:
    from_logits = find("flashinfer.sampling", "sampling_from_logits")

    def run(logits_S_V: Tensor, **_: Any) -> Tensor:
        return from_logits(logits_S_V)  # at temperature 1, as the timed cases are

    return Variant(run, check=False)


OP = OpBench(
    name="sample",
    edge=cases.EDGE,
    model=cases.MODEL,
    bench=cases.BENCH,
    check=check,
    # Everybody draws by another generator: only ours is compared, with the oracle.
    variants={"ours": Variant(sample), "torch": Variant(torch_sample, check=False)},
    peers={"flashinfer": flashinfer_sample},
)
