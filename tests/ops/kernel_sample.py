"""Runs sample's kernel on any device, cut small: the interpreter's time is by operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tml_kernels.ops.sample.configs import Config
from tml_kernels.ops.sample.kernel import launch_sample

SMALL = Config(run_v=16, block_v=64, look_v=32, num_warps=2)
PER_ROW = ("logits_S_V", "temperature_S", "top_k_S", "top_p_S", "seed_S", "counter_S")

OPTIONS = ("min_p_S", "bias_id_S_N", "bias_S_N", "seen_S_W", "penalty_S")


def rows_of(
    logits: Tensor,
    num_rows: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 5,
) -> dict[str, Any]:
    """`num_rows` draws of one row of logits, by one session."""
    device = logits.device
    return {
        "logits_S_V": logits.expand(num_rows, -1).contiguous(),
        "temperature_S": torch.full((num_rows,), temperature, device=device),
        "top_k_S": torch.full((num_rows,), top_k, dtype=torch.int32, device=device),
        "top_p_S": torch.full((num_rows,), top_p, device=device),
        "seed_S": torch.full((num_rows,), seed, device=device),
        "counter_S": torch.arange(num_rows, device=device),
        "fallback": 0,
    }


def take_rows(inputs: dict[str, Any], rows: Any) -> dict[str, Any]:
    names = [name for name in (*PER_ROW, *OPTIONS) if name in inputs]
    return inputs | {name: inputs[name][rows].contiguous() for name in names}


def words_of(seen_S_V: Tensor) -> Tensor:
    """seen_S_W of a mask, by the definition."""
    words = torch.zeros(seen_S_V.shape[0], -(-seen_S_V.shape[1] // 32), dtype=torch.int64)
    for s, v in seen_S_V.nonzero().tolist():
        words[s, v // 32] += 1 << (v % 32)
    return words.int().to(seen_S_V.device)  # bit 31 is the sign


def random_options(inputs: dict[str, Any]) -> dict[str, Any]:
    """With every option: a fourth of the ids seen, five biases a row, one of which forbids the
    largest logit, and one that is unused."""
    logits = inputs["logits_S_V"].cpu()
    num_rows, vocabulary = logits.shape
    bias_id = torch.randint(vocabulary, (num_rows, 5), dtype=torch.int32)
    bias_id[:, 0], bias_id[:, 3] = logits.argmax(1), -1
    bias = 3.0 * torch.randn(num_rows, 5)
    bias[:, 0] = float("-inf")
    s = torch.arange(num_rows)
    options = {
        "min_p_S": 0.1 * (s % 3),
        "bias_id_S_N": bias_id,
        "bias_S_N": bias,
        "seen_S_W": words_of(torch.rand(num_rows, vocabulary) < 0.25),
        "penalty_S": 0.8 + 0.4 * (s % 4),
    }
    return inputs | {name: x.to(inputs["logits_S_V"].device) for name, x in options.items()}


def run_kernel(
    inputs: dict[str, Any], config: Config | None = SMALL, scratch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(token, fault), filled beforehand with what no launch writes."""
    logits = inputs["logits_S_V"]
    out = logits.new_full((logits.shape[0],), -7, dtype=torch.int32)
    fault = torch.ones_like(out, dtype=torch.bool)
    if logits.shape[0]:
        launch_sample(
            logits, inputs["temperature_S"], inputs["top_k_S"], inputs["top_p_S"],
            inputs["seed_S"], inputs["counter_S"], *(inputs.get(name) for name in OPTIONS),
            inputs["fallback"], out, fault, scratch, config,
        )  # fmt: skip
    return out, fault
