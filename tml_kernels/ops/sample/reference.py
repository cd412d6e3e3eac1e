"""The oracle of sample, and its plain path: the same lines in float64 and in float32."""

# Dimension key: S session rows, V vocabulary.

from __future__ import annotations

import torch
from torch import Tensor

from ..._philox import SAMPLE_STREAM, gumbel, random_bits


def sample_ref(
    logits_S_V: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    seed_S: Tensor,
    counter_S: Tensor,
    *,
    fallback: int,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """(token_S int32, fault_S bool): arg max of logits / temperature + Gumbel noise, over the kept.

    A row's noise in column v is a function of (seed, counter, v). arg max takes the lowest id of
    equal values.
    """
    fault_S = logits_S_V.isnan().any(-1) | (logits_S_V == float("-inf")).all(-1)
    logits_S_V = logits_S_V.to(dtype).clamp(max=torch.finfo(dtype).max)
    logits_S_V = logits_S_V - logits_S_V.amax(-1, keepdim=True)
    greedy_S_1 = (temperature_S <= 0)[:, None]
    temperature_S_1 = temperature_S.to(dtype)[:, None].masked_fill(greedy_S_1, 1.0)
    scaled_S_V = logits_S_V / temperature_S_1

    noise_S_V = gumbel(random_bits(seed_S, counter_S, logits_S_V.shape[1], SAMPLE_STREAM), dtype)
    score_S_V = scaled_S_V + noise_S_V.masked_fill(greedy_S_1, 0.0)
    score_S_V.masked_fill_(~_kept(scaled_S_V, top_k_S, top_p_S), float("-inf"))
    token_S = score_S_V.argmax(-1).masked_fill(fault_S, fallback)
    return token_S.to(torch.int32), fault_S


def _kept(scaled_S_V: Tensor, top_k_S: Tensor, top_p_S: Tensor) -> Tensor:
    """kept_S_V bool: the first top_k by descending value (ties: lowest id), and of those the first
    whose preceding mass, renormalised to the top_k, is below top_p; the best is always kept."""
    sorted_S_V, order_S_V = torch.sort(scaled_S_V, dim=-1, descending=True, stable=True)
    rank_V = torch.arange(scaled_S_V.shape[1], device=scaled_S_V.device)
    kept_S_V = (rank_V < top_k_S[:, None]) | (top_k_S <= 0)[:, None]
    p_S_V = torch.softmax(sorted_S_V.masked_fill_(~kept_S_V, float("-inf")), dim=-1)
    # In float64: over a vocabulary a float32 running sum drifts by more than small probabilities.
    before_S_V = p_S_V.double().cumsum(-1) - p_S_V
    kept_S_V &= (before_S_V < top_p_S[:, None]) | (top_p_S >= 1)[:, None] | (rank_V == 0)
    return torch.zeros_like(kept_S_V).scatter_(1, order_S_V, kept_S_V)
