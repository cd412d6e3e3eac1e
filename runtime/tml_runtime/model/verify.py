"""Drafts against the model: which of the steps that one pass has gone through are the model's own.

A draft is drawn with the noise of the step it is for, which is a function of seed and count alone;
so the model's own draw of that step, made here, is the one of a model that was never drafted for.
A step counts only while everything before it was drafted as it was then said. Tokens therefore are
not merely distributed as those of step-by-step sampling: from the same logits they are the same
ones, whatever was drafted, at any temperature, and with top-k, top-p and min-p.

Rejection sampling would keep a draft more often, with probability 1 - d where the two
distributions are d apart in total variation; this keeps it with at least (1 - d) / (1 + d), asks
for no logits of the draft, and lets a seed say the same with and without drafts.

Source: Daliri, Musco, Suresh, "Coupling without communication and drafter-invariant speculative
decoding", 2024 (Gumbel sampling).
"""

# Dimension key: S session rows, K steps of a pass, J = K - 1 of them drafted, V vocabulary.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tml_kernels._dims import Dims
from tml_kernels.ops.sample import sample

from .output import Drawing


class Verified(NamedTuple):
    """What rows say in a pass. Steps k < length are the model's own; behind them a token is -1."""

    token_S_K: Tensor  # int32
    length_S: Tensor  # int64, 1..K
    fault_S: Tensor  # bool, of the steps that count


def draw(
    logits_S_V: Tensor,
    drawing: Drawing,
    step: int,
    *,
    fallback: int,
    scratch_M: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(token int32 [S], fault bool [S]) of step `step`, from the model's logits or a draft's."""
    return sample(
        logits_S_V,
        drawing.temperature_S,
        drawing.top_k_S,
        drawing.top_p_S,
        drawing.seed_S,
        drawing.draws_S + step,
        fallback=fallback,
        min_p_S=drawing.min_p_S,
        scratch_M=scratch_M,
    )


def verify_draft(
    logits_S_K_V: Tensor,
    draft_S_J: Tensor,
    drawing: Drawing,
    step: int = 0,
    *,
    fallback: int,
    agrees_S_J: Tensor | None = None,
    scratch_M: Tensor | None = None,
) -> Verified:
    """Draw all K steps of a pass whose inputs behind the first were drafted.

    logits: float32 [S, K, V], of steps step, step + 1, ... draft: int32 [S, J], the tokens that the
    inputs of all but the first of these steps took for said; -1 for no token, which ends the row
    there. agrees: bool [S, J], False where a draft was wrong in something beside its token, such as
    the speech; None: nowhere. scratch: as `sample` takes it for S * K rows.

    Shapes alone decide what is run, and the host is asked nothing. A row is a function of that row.
    Raises TypeError or ValueError naming the argument.
    """
    dims = Dims()
    dims.check(logits_S_K_V=logits_S_K_V, dtype=torch.float32)
    device, num_steps = logits_S_K_V.device, dims["K"]
    if num_steps < 1:
        raise ValueError(f"logits_S_K_V: K={num_steps}, a pass has one step at least")
    dims.check(draft_S_J=draft_S_J, dtype=torch.int32, device=device, contiguous=False)
    if dims["J"] != num_steps - 1:
        raise ValueError(f"draft_S_J: J={dims['J']}, but all of K={num_steps} steps but the first")
    each = Drawing(*(setting_S.repeat_interleave(num_steps) for setting_S in drawing))
    draws_S_K = drawing.draws_S[:, None] + torch.arange(num_steps, device=device)
    drawn_SK, fault_SK = draw(
        logits_S_K_V.flatten(0, 1),
        each._replace(draws_S=draws_S_K.flatten()),
        step,
        fallback=fallback,
        scratch_M=scratch_M,
    )
    token_S_K, fault_S_K = drawn_SK.unflatten(0, (-1, num_steps)), fault_SK.view(-1, num_steps)
    right_S_J = token_S_K[:, :-1] == draft_S_J
    if agrees_S_J is not None:
        dims.check(agrees_S_J=agrees_S_J, dtype=torch.bool, device=device, contiguous=False)
        right_S_J &= agrees_S_J
    length_S = 1 + right_S_J.int().cumprod(1).sum(1)
    counts_S_K = torch.arange(num_steps, device=device) < length_S[:, None]
    return Verified(
        token_S_K.masked_fill(~counts_S_K, -1), length_S, (fault_S_K & counts_S_K).any(1)
    )
