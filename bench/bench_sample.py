"""sample: a pass over the logits of every row."""

# Dimension key: S session rows, V vocabulary.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tml_kernels.ops.sample import cases, sample
from tml_kernels.ops.sample.configs import scratch_words
from tml_kernels.ops.sample.reference import sample_ref
from tml_kernels.testing import assert_bitwise

from .harness import OpBench, Variant
from .peers import find


def check(case: cases.Case, device: str) -> None:
    inputs = case.make_inputs(device)
    for actual, expected in zip(sample(**inputs), sample_ref(**inputs), strict=True):
        assert_bitwise(actual, expected)


def with_scratch(inputs: dict[str, Any]) -> dict[str, Any]:
    """As a captured step calls it."""
    rows, vocabulary = inputs["logits_S_V"].shape
    scratch = inputs["logits_S_V"].new_zeros(scratch_words(rows, vocabulary), dtype=torch.int32)
    return inputs | {"scratch_M": scratch}


def with_narrowed(inputs: dict[str, Any]) -> dict[str, Any]:
    """Whether any row has top-k or top-p on, known to the host."""
    is_narrowed = bool((inputs["top_k_S"] > 0).any() or (inputs["top_p_S"] < 1).any())
    return inputs | {"is_narrowed": is_narrowed}


def torch_sample(
    logits_S_V: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    is_narrowed: bool,
    **_: Any,
) -> Tensor:
    """Sort, masks and softmax, then a race of exponentials, as torch.multinomial draws one; without
    the sort where nothing asks for it."""
    scaled_S_V = logits_S_V / temperature_S[:, None]
    if not is_narrowed:
        return race(torch.softmax(scaled_S_V, dim=-1)).int()
    sorted_S_V, order_S_V = scaled_S_V.sort(dim=-1, descending=True)
    rank_V = torch.arange(logits_S_V.shape[1], device=logits_S_V.device)
    out_S_V = (rank_V >= top_k_S[:, None]) & (top_k_S > 0)[:, None]
    p_S_V = torch.softmax(sorted_S_V.masked_fill(out_S_V, float("-inf")), dim=-1)
    p_S_V = p_S_V.masked_fill(p_S_V.cumsum(dim=-1) - p_S_V > top_p_S[:, None], 0.0)
    return order_S_V.gather(1, race(p_S_V)[:, None])[:, 0].int()


def race(p_S_V: Tensor) -> Tensor:
    return (p_S_V / torch.empty_like(p_S_V).exponential_()).argmax(dim=-1)


def flashinfer_sample() -> Variant:
    from_logits = find("flashinfer.sampling", "sampling_from_logits")
    narrowed = find("flashinfer.sampling", "top_k_top_p_sampling_from_logits")

    def run(
        logits_S_V: Tensor, top_k_S: Tensor, top_p_S: Tensor, is_narrowed: bool, **_: Any
    ) -> Tensor:
        """At temperature 1, as the timed cases are."""
        if is_narrowed:
            return narrowed(logits_S_V, top_k_S, top_p_S)
        return from_logits(logits_S_V)

    def prepare(inputs: dict[str, Any]) -> dict[str, Any]:
        """Off is the whole vocabulary there."""
        top_k_S, vocabulary = inputs["top_k_S"], inputs["logits_S_V"].shape[1]
        off = {"top_k_S": torch.where(top_k_S > 0, top_k_S, vocabulary)}
        return with_narrowed(inputs) | off

    return Variant(run, prepare, check=False)


OP = OpBench(
    name="sample",
    edge=cases.EDGE,
    model=cases.MODEL,
    bench=cases.BENCH,
    check=check,
    # Everybody draws by another generator: only ours is compared, with the oracle.
    variants={
        "ours": Variant(sample, with_scratch),
        "torch": Variant(torch_sample, with_narrowed, check=False),
    },
    peers={"flashinfer": flashinfer_sample},
)
