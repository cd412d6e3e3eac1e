"""The oracle of embed_tokens, and its plain path: the same lines in float64 and in float32."""

# Dimension key: T tokens, D model width, V rows of the text table, B bands, Y = B * levels rows of
# the dMel table, A frames heard, P embedded tokens, N rows of steps, F frames of a step.

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .kinds import TokenKind


def embed_tokens_ref(
    kind_T: Tensor,
    index_T: Tensor,
    embed_V_D: Tensor,
    embed_norm_D: Tensor,
    table_Y_D: Tensor,
    table_norm_D: Tensor,
    *,
    levels_A_B: Tensor | None = None,
    x_P_D: Tensor | None = None,
    token_N: Tensor | None = None,
    levels_N_F_B: Tensor | None = None,
    num_levels: int = 16,
    eps: float = 1e-6,
    dtype: torch.dtype = torch.float64,
    rounded: torch.dtype | None = None,
) -> Tensor:
    """x_T_D in `rounded` (default: `dtype`), which each row, and each addition of a step, is
    rounded to; computed in `dtype`."""
    rounded = rounded or dtype
    out_T_D = embed_V_D.new_zeros(kind_T.shape[0], embed_V_D.shape[1], dtype=rounded)

    def rms_norm(h_T_D: Tensor, weight_D: Tensor) -> Tensor:
        scale_T_1 = torch.rsqrt(h_T_D.square().mean(-1, keepdim=True) + eps)
        return (h_T_D * scale_T_1 * weight_D.to(dtype)).to(rounded)

    def text(ids_T: Tensor) -> Tensor:
        return rms_norm(embed_V_D[ids_T.long()].to(dtype), embed_norm_D)

    def sound(levels_T_B: Tensor) -> Tensor:
        if len(levels_T_B) == 0:
            return out_T_D[:0]
        offset_B = num_levels * torch.arange(levels_T_B.shape[1], device=levels_T_B.device)
        rows_T_B = levels_T_B.long() + offset_B
        return rms_norm(embedding_bag(rows_T_B, table_Y_D.to(dtype), mode="sum"), table_norm_D)

    is_text_T = kind_T == TokenKind.TEXT
    out_T_D[is_text_T] = text(index_T[is_text_T])
    if levels_A_B is not None:
        is_heard_T = kind_T == TokenKind.LEVELS
        out_T_D[is_heard_T] = sound(levels_A_B[index_T[is_heard_T].long()])
    if x_P_D is not None:
        is_embedded_T = kind_T == TokenKind.EMBEDDED
        out_T_D[is_embedded_T] = x_P_D[index_T[is_embedded_T].long()].to(rounded)
    if token_N is not None and levels_N_F_B is not None:
        is_step_T = kind_T == TokenKind.STEP
        row_S = index_T[is_step_T].long()
        x_S_D = text(token_N[row_S])
        for f in range(levels_N_F_B.shape[1]):
            x_S_D = x_S_D + sound(levels_N_F_B[row_S, f])
        out_T_D[is_step_T] = x_S_D
    return out_T_D
