"""The oracle of sample, and its plain path: the same lines in float64 and in float32."""

# Dimension key: S session rows, V vocabulary, N biases of a row, W words of 32 ids.

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
    min_p_S: Tensor | None = None,
    bias_id_S_N: Tensor | None = None,
    bias_S_N: Tensor | None = None,
    seen_S_W: Tensor | None = None,
    penalty_S: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """(token_S int32, fault_S bool): arg max of logits / temperature + Gumbel noise, over the kept.

    A row's noise in column v is a function of (seed, counter, v). arg max takes the lowest id of
    equal values.
    """
    limit = torch.finfo(dtype).max
    logits_S_V = logits_S_V.to(dtype).clamp(max=limit)
    logits_S_V = edit_ref(logits_S_V, bias_id_S_N, bias_S_N, seen_S_W, penalty_S)
    fault_S = logits_S_V.isnan().any(-1) | (logits_S_V == float("-inf")).all(-1)
    logits_S_V = logits_S_V.clamp(max=limit)
    logits_S_V = logits_S_V - logits_S_V.amax(-1, keepdim=True)
    greedy_S_1 = (temperature_S <= 0)[:, None]
    temperature_S_1 = temperature_S.to(dtype)[:, None].masked_fill(greedy_S_1, 1.0)
    scaled_S_V = logits_S_V / temperature_S_1

    noise_S_V = gumbel(random_bits(seed_S, counter_S, logits_S_V.shape[1], SAMPLE_STREAM), dtype)
    score_S_V = scaled_S_V + noise_S_V.masked_fill(greedy_S_1, 0.0)
    score_S_V.masked_fill_(~_kept(scaled_S_V, top_k_S, top_p_S, min_p_S), float("-inf"))
    token_S = score_S_V.argmax(-1).masked_fill(fault_S, fallback)
    return token_S.to(torch.int32), fault_S


def edit_ref(
    logits_S_V: Tensor,
    bias_id_S_N: Tensor | None,
    bias_S_N: Tensor | None,
    seen_S_W: Tensor | None,
    penalty_S: Tensor | None,
) -> Tensor:
    """Biases added, list by list, then logits of seen ids divided by the penalty where positive
    and multiplied by it else. Of finite logits, or NaN, which stays."""
    if bias_id_S_N is not None and bias_S_N is not None:
        for id_S, bias_S in zip(bias_id_S_N.long().T, bias_S_N.to(logits_S_V).T, strict=True):
            at_S_1 = id_S.clamp(min=0)[:, None]
            logit_S = logits_S_V.gather(1, at_S_1)[:, 0]
            new_S = torch.where(id_S >= 0, logit_S + bias_S, logit_S)
            logits_S_V = logits_S_V.scatter(1, at_S_1, new_S[:, None])
    if seen_S_W is not None and penalty_S is not None:
        bit_32 = torch.arange(32, device=logits_S_V.device)
        seen_S_V = ((seen_S_W.long()[:, :, None] >> bit_32) & 1).flatten(1).bool()
        penalty_S_1 = penalty_S.to(logits_S_V)[:, None]
        penalised_S_V = torch.where(
            logits_S_V > 0, logits_S_V / penalty_S_1, logits_S_V * penalty_S_1
        )
        seen_S_V = seen_S_V[:, : logits_S_V.shape[1]]
        logits_S_V = torch.where(seen_S_V, penalised_S_V, logits_S_V)
    return logits_S_V


def _kept(scaled_S_V: Tensor, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor | None) -> Tensor:
    """kept_S_V bool: the first top_k by descending value (ties: lowest id); of those the first
    whose preceding mass, renormalised to the top_k, is below top_p; of those the ones with min_p
    times the best one's probability or more. The best is always kept."""
    sorted_S_V, order_S_V = torch.sort(scaled_S_V, dim=-1, descending=True, stable=True)
    rank_V = torch.arange(scaled_S_V.shape[1], device=scaled_S_V.device)
    kept_S_V = (rank_V < top_k_S[:, None]) | (top_k_S <= 0)[:, None]
    p_S_V = torch.softmax(sorted_S_V.masked_fill_(~kept_S_V, float("-inf")), dim=-1)
    # In float64: over a vocabulary a float32 running sum drifts by more than small probabilities.
    before_S_V = p_S_V.double().cumsum(-1) - p_S_V
    kept_S_V &= (before_S_V < top_p_S[:, None]) | (top_p_S >= 1)[:, None] | (rank_V == 0)
    if min_p_S is not None:
        kept_S_V &= (sorted_S_V.exp() >= min_p_S[:, None]) | (rank_V == 0)
    return torch.zeros_like(kept_S_V).scatter_(1, order_S_V, kept_S_V)
