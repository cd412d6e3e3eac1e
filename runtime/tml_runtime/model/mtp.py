"""The multi-token-prediction layers beside the model's: what a state that drafts holds of them.

Layer d takes, at each token, the token's embedding and what the layer before it made of the token
before; of the first layer that is the model's hidden state. So at the first token of a pass it
takes what the state carries over from the pass before, zeros in a new session.
"""

# Dimension key: T tokens, S session rows, N slots, L layers that draft, D model width.

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tml_kernels.ops.linear import linear
from tml_kernels.ops.rms_norm import rms_norm

from .passes import Pass
from .state import ModelState

if TYPE_CHECKING:
    from .backbone import Backbone


class MtpLayers:
    """Of one backbone, whose layers' state theirs lies behind."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._first = len(backbone.weights.layers)

    def follow(
        self,
        state: ModelState,
        x_T_D: Tensor,
        h_T_D: Tensor,
        step: Pass,
        end_S: Tensor | None = None,
    ) -> None:
        """Run them over the tokens x of a pass that made h of them. end: int64, the carry is that
        of the tokens before these instead of each row's last."""
        if x_T_D.shape[0] == 0 or step.slot_S.shape[0] == 0:
            return
        carry_L_N_D = state.carry_L_N_D
        assert carry_L_N_D is not None
        shift = _shift(step, x_T_D.shape[0], state.num_slots, end_S)
        for layer, carry_N_D in enumerate(carry_L_N_D):
            source = torch.cat([carry_N_D, h_T_D])
            torch.index_select(source, 0, shift.last_N, out=carry_N_D)
            before_T_D = source.index_select(0, shift.before_T)
            h_T_D = self.layer(state, layer, step, before_T_D, x_T_D)

    def layer(
        self, state: ModelState, layer: int, step: Pass, before_T_D: Tensor, x_T_D: Tensor
    ) -> Tensor:
        """Hidden states [T, D], as `Backbone.logits` takes them. before: of the token before."""
        backbone, eps = self._backbone, self._backbone.config.norm_eps
        w = backbone.weights.mtp[layer]
        both_T_DD = torch.cat(
            [
                rms_norm(before_T_D, w.hidden_norm_D, eps=eps),
                rms_norm(x_T_D, w.embed_norm_D, eps=eps),
            ],
            dim=1,
        )
        scratch_B = state.scratch.linear(both_T_DD, w.input_D_DD)
        y_T_D = linear(both_T_DD, w.input_D_DD, scratch_B=scratch_B)
        h_T_D = rms_norm(y_T_D, w.block.attn_norm_D, eps=eps)
        backbone.block(state, self._first + layer, step, h_T_D, y_T_D, None)
        return y_T_D


class _Shift(NamedTuple):
    """Rows of [carry of every slot | tokens]."""

    before_T: Tensor  # the token before each, or its slot's carry; of padding anything
    last_N: Tensor  # the token that a slot carries over, or what it carries already


def _shift(step: Pass, num_tokens: int, num_slots: int, end_S: Tensor | None) -> _Shift:
    """start = [0, 2, 2, 3], slot = [1, 0, -1], two slots: before = [1, 2, 0], last = [0, 3]."""
    start_S1, slot_S = step.start_S1, step.slot_S
    token_T = torch.arange(num_tokens, dtype=torch.int32, device=slot_S.device)
    end_S = start_S1[1:].long() if end_S is None else end_S
    row_T = torch.searchsorted(start_S1[1:].contiguous(), token_T, right=True)
    row_T = row_T.clamp(max=len(slot_S) - 1)
    is_first_T = token_T == start_S1.index_select(0, row_T)
    slot_T = slot_S.index_select(0, row_T).clamp(min=0)
    before_T = torch.where(is_first_T, slot_T, token_T + (num_slots - 1))

    own_N = torch.arange(num_slots, device=slot_S.device)
    takes_S_N = (slot_S[:, None] == own_N) & (end_S > start_S1[:-1])[:, None]
    last_N = end_S.index_select(0, takes_S_N.int().argmax(0)) + (num_slots - 1)
    return _Shift(before_T, torch.where(takes_S_N.any(0), last_N, own_N))
