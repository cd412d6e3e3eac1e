"""The oracle of shift_keys, and its plain path: the same lines in two precisions."""

# Dimension key: L layers, I keys, G KV heads, C head width, B = C / 2 rotary frequencies.

from __future__ import annotations

import torch
from torch import Tensor

from ..._rope import rotate_ref


def shift_keys_ref(
    source_L_I_G_C: Tensor,
    shift_I: Tensor,
    rope_phase_B: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Keys [L, I, G, C] turned further by shift[i] positions, before they are rounded."""
    return rotate_ref(source_L_I_G_C.to(dtype), rope_phase_B, shift_I)
