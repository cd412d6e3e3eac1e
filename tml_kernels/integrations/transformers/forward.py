"""One forward of a model over a RollingKVCache: a transaction of all rows of the batch."""

# Dimension key: S session rows (the batch), T tokens of one row, N = S * T, K layer groups,
# H query heads, C head width.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..._page_plan import PagePlan
from ...kv_cache import GroupPages, PageClass, RollingKVCache, Session
from ...ops.attention_prologue import attention_prologue
from ...ops.paged_attention import paged_attention
from ...ops.plan_pages import plan_pages


@dataclass
class Forward:
    """What its layers share, and how far it has come."""

    tokens: int  # of each row
    row_K_N: np.ndarray  # where they go in the pages of each group
    on_device_K_N: Tensor  # the same
    start_S1: Tensor
    slot_S: Tensor
    length_S: Tensor
    plans: list[PagePlan]
    updated: int = -1  # the last layer that gave its keys
    arrived: int = -1  # the last layer whose keys came to the attention function
    attended: int = -1  # the last layer that read them


def begin(
    rolling: RollingKVCache,
    sessions: Sequence[Session],
    runs: Sequence[tuple[PageClass, int]],
    length: int,
) -> Forward:
    """Reserve and append the runs, the same for all sessions, and tell the device.

    Raises BudgetExceeded where they do not fit; call `roll_back` then.
    """
    for session in sessions:
        rolling.reserve(session, runs)
    tokens, batch, device = sum(count for _, count in runs), len(sessions), rolling.device
    row_K_N = np.full((len(rolling.groups), batch * tokens), -1, np.int64)
    for s, session in enumerate(sessions):
        column = s * tokens
        for page_class, count in runs:
            rolling.append(session, page_class, count, row_K_N, column)
            column += count
    position_N = np.tile(length + np.arange(tokens), batch)
    on_device_K_N = rolling.apply(row_K_N, position_N).row_K_T
    slots = [session.slot for session in sessions]
    slot_S = torch.tensor(slots, dtype=torch.int32, device=device)
    return Forward(
        tokens,
        row_K_N,
        on_device_K_N,
        tokens * torch.arange(batch + 1, dtype=torch.int32, device=device),
        slot_S,
        torch.full((batch,), length + tokens, device=device),
        [plan_pages(g.page_N_M, g.base_N_M, g.rows_N_M, slot_S) for g in rolling.groups],
    )


def roll_back(rolling: RollingKVCache, sessions: Sequence[Session]) -> None:
    """Of those that are in a transaction."""
    for session in sessions:
        if rolling.session_stats(session).in_transaction:
            rolling.roll_back(session)


def attend(
    forward: Forward,
    g: int,
    group: GroupPages,
    layer: int,
    qkv: tuple[Tensor, Tensor, Tensor],
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Keys and values [S, G, T, C] to layer `layer` of group g, and the attention of the queries
    [S, H, T, C] over all that is there: [S, T, H, C]."""
    batch, num_heads, tokens, width = qkv[0].shape
    qkv_S_T_J = torch.cat([x.transpose(1, 2).flatten(2) for x in qkv], -1)
    pages = (group.k_pages_L_P_G_R_C[layer], group.v_pages_L_P_G_R_C[layer])
    k_scale, v_scale = (
        None if scale_L_P_G_R is None else scale_L_P_G_R[layer]
        for scale_L_P_G_R in (group.k_scale_L_P_G_R, group.v_scale_L_P_G_R)
    )
    q_N_H_C = attention_prologue(
        qkv_S_T_J.flatten(0, 1),
        None,
        None,
        None,
        None,
        None,
        *pages,
        forward.on_device_K_N[g],
        forward.start_S1,
        forward.slot_S,
        num_heads=num_heads,
        k_scale_P_G_R=k_scale,
        v_scale_P_G_R=v_scale,
    )
    out_N_H_C = paged_attention(
        q_N_H_C,
        *pages,
        forward.plans[g],
        forward.start_S1,
        forward.length_S,
        row_position_P_R=group.row_position_P_R,
        span=group.spec.span,
        scale=scale,
        window=group.spec.window,
        softcap=softcap,
        k_scale_P_G_R=k_scale,
        v_scale_P_G_R=v_scale,
    )
    return out_N_H_C.view(batch, tokens, num_heads, width)
