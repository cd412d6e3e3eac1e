"""The input side of a tick on the device: text, pictures and sound of all rows as one block."""

# Dimension key: S session rows, T tokens, D model width, N frame groups, L frames in a group,
# Y and X height and width of a frame, F mel frames of an output step, B mel bands, P patches.

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tml_kernels.ops.dmel import dmel_embed, dmel_levels
from tml_kernels.ops.embed_tokens import TokenKind, embed_tokens
from tml_kernels.ops.patch_embed import patch_embed
from tml_kernels.ops.rms_norm import rms_norm

from .buffers import TickInputs
from .config import ModelConfig
from .state import ModelState
from .weights import ModelWeights


class Frontend:
    """Turns token ids, frames and samples into tokens of the backbone."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config = config
        self.weights = weights
        self._patch = replace(config.patch, extra_column=False)  # of frames that are cut already

    def embed_text(self, ids_T: Tensor) -> Tensor:
        """[T, D] of int64 token ids, which must be in range."""
        rows_T_D = self.weights.embed_V_D[ids_T]
        return rms_norm(rows_T_D, self.weights.embed_norm_D, eps=self.config.norm_eps)

    def embed_levels(self, levels_T_B: Tensor) -> Tensor:
        """[T, D] of dMel frames given as uint8 levels."""
        return dmel_embed(
            levels_T_B,
            self.weights.audio_table_Y_D,
            self.weights.audio_norm_D,
            num_levels=self.config.layout.dmel.num_levels,
            eps=self.config.norm_eps,
        )

    def embed_frames(self, frames_N_L_Y_X_3: Tensor) -> Tensor:
        """[T, D] of uint8 frame groups: groups, then patch rows, then patch columns."""
        return patch_embed(
            frames_N_L_Y_X_3, self.weights.patch, spec=self.config.patch, eps=self.config.norm_eps
        )

    def embed_step(self, token_S: Tensor, levels_S_F_B: Tensor) -> Tensor:
        """[S, D], the input of an output step: what the step before said, in both its forms."""
        row_S = torch.arange(len(token_S), dtype=torch.int32, device=token_S.device)
        kind_S = torch.full_like(row_S, TokenKind.STEP)
        return self._embed(kind_S, row_S, token_N=token_S, levels_N_F_B=levels_S_F_B)

    def embed_tick(self, state: ModelState, inputs: TickInputs[Tensor]) -> Tensor:
        """[T, D]: each row's input blocks, then its first output step; zeros behind the last row.

        The first step's input is known before the tick runs, it is what the session said last; so
        the step is part of the same pass. Advances the audio tails and nothing else.
        """
        levels_S_F_B = dmel_levels(
            inputs.pcm_S_W, state.tail_N_W, inputs.slot_S, spec=self.config.layout.dmel
        )
        return self._embed(
            inputs.kind_T,
            inputs.index_T,
            levels_A_B=levels_S_F_B.flatten(0, 1),
            x_P_D=self._embed_patches(inputs) if len(inputs.patch_P_L_Y_Y_3) else None,
            token_N=state.token_N,
            levels_N_F_B=state.levels_N_F_B,
        )

    def _embed_patches(self, inputs: TickInputs[Tensor]) -> Tensor:
        return patch_embed(
            inputs.patch_P_L_Y_Y_3,
            self.weights.patch,
            spec=self._patch,
            eps=self.config.norm_eps,
            extent_N_2=inputs.extent_P_2 if self.config.patch.extra_column else None,
        )

    def _embed(self, kind_T: Tensor, index_T: Tensor, **sources: Tensor | None) -> Tensor:
        return embed_tokens(
            kind_T,
            index_T,
            self.weights.embed_V_D,
            self.weights.embed_norm_D,
            self.weights.audio_table_Y_D,
            self.weights.audio_norm_D,
            num_levels=self.config.layout.dmel.num_levels,
            eps=self.config.norm_eps,
            **sources,
        )
