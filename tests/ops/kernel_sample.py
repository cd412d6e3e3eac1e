"""Runs sample's kernel on any device, cut small: the interpreter's time is by operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tml_kernels.ops.sample.configs import Config
from tml_kernels.ops.sample.kernel import launch_sample

SMALL = Config(run_v=16, block_v=64, num_warps=2)
PER_ROW = ("logits_S_V", "temperature_S", "top_k_S", "top_p_S", "seed_S", "counter_S")


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
    return inputs | {name: inputs[name][rows].contiguous() for name in PER_ROW}


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
            inputs["seed_S"], inputs["counter_S"], inputs["fallback"], out, fault, scratch, config,
        )  # fmt: skip
    return out, fault
