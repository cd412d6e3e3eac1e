"""Attention sinks that stay right before a window which moves away from them."""

# Dimension key: B batch rows, T tokens of one row, L layers of a group, I sinks of all rows, G KV
# heads, C head width.

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...kv_cache import GroupPages
from ...ops.shift_keys import shift_keys


class Sinks:
    """The first `num_sinks` tokens of every row in one group of layers: their keys as they were
    written, [L, I, G, C] with row b's sink n at b * num_sinks + n, and where in the pages they are.
    """

    def __init__(
        self,
        group: GroupPages,
        max_batch: int,
        num_sinks: int,
        dtype: torch.dtype,
        phase_B: Tensor,
    ) -> None:
        spec, device = group.spec, group.k_pages_L_P_G_R_C.device
        shape = (spec.num_layers, max_batch * num_sinks, spec.num_kv_heads, spec.head_width)
        self._group, self._num_sinks = group, num_sinks
        self._phase_B = phase_B.to(device)
        self._key_L_I_G_C = torch.zeros(shape, dtype=dtype, device=device)
        self._row_I = np.full(max_batch * num_sinks, -1, np.int64)

    def place(self, row_B_T: np.ndarray, start: int) -> None:
        """Where the tokens from `start` on go, of which the sinks among them are remembered."""
        batch, tokens = row_B_T.shape
        row_B_S = self._row_I.reshape(-1, self._num_sinks)
        end = min(start + tokens, self._num_sinks)
        if start == 0:
            row_B_S[:] = -1  # rows of an earlier batch, which may have been larger
        if start < end:
            row_B_S[:batch, start:end] = row_B_T[:, : end - start]

    def keep(self, layer: int, key_B_G_T_C: Tensor, start: int) -> None:
        """The keys of the tokens from `start` on, as far as they are sinks."""
        batch, _, tokens, _ = key_B_G_T_C.shape
        end = min(start + tokens, self._num_sinks)
        if start < end:
            key_B_S_G_C = self._key_L_I_G_C[layer].unflatten(0, (-1, self._num_sinks))
            key_B_S_G_C[:batch, start:end] = key_B_G_T_C[:, :, : end - start].transpose(1, 2)

    def move(self, distance: int) -> None:
        """To `distance` positions after their first ones, in the pages of all layers."""
        row_I = torch.from_numpy(self._row_I).to(self._phase_B.device, copy=True)
        shift_keys(
            self._key_L_I_G_C,
            self._group.k_pages_L_P_G_R_C,
            row_I,
            torch.full_like(row_I, distance),
            self._phase_B,
            k_scale_L_P_G_R=self._group.k_scale_L_P_G_R,
        )
