"""InteractionModel: one set of weights that listens, watches, reads, speaks and acts in ticks."""

# Dimension key: T tokens, S session rows, D model width, V vocabulary, K output steps of a tick,
# B mel bands.

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tml_kernels._dims import Dims
from tml_kernels.precision import ACTIVATIONS

from .backbone import Backbone
from .config import ModelConfig
from .frontend import Frontend, TickInput, check_ids
from .full import full_forward
from .load import WeightReport, load_weights, random_weights
from .output import Speaker, TickOutput
from .state import ModelState
from .weights import ModelWeights


class InteractionModel:
    """Weights and the functions on them. Sessions live in a `ModelState`, which callers hold.

    For inference: run under `torch.no_grad()` or `torch.inference_mode()`. With the same weights,
    seeds and input every output is bitwise the same, run after run, and a session's does not depend
    on the other sessions of a call.
    """

    def __init__(self, config: ModelConfig, weights: ModelWeights, report: WeightReport) -> None:
        self.config = config
        self.weights = weights
        self.report = report  # which weights were loaded and which are random
        self.dtype = weights.embed_V_D.dtype
        self.device = weights.embed_V_D.device
        self.backbone = Backbone(config, weights)
        self.frontend = Frontend(config, weights)
        self._speaker = Speaker(self.backbone, self.frontend)

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> InteractionModel:
        """Random weights, the same ones for a seed. They say nothing sensible, at full speed."""
        _check_dtype(dtype)
        weights, report = random_weights(config, seed=seed, device=device, dtype=dtype)
        return cls(config, weights, report)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        config: ModelConfig,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> InteractionModel:
        """Weights of a safetensors checkpoint in the published layout; see `load_weights`.

        `report.random` names what the checkpoint lacks and `seed` made up. Raises CheckpointError.
        """
        _check_dtype(dtype)
        weights, report = load_weights(path, config, seed=seed, device=device, dtype=dtype)
        return cls(config, weights, report)

    def new_state(
        self, num_slots: int, *, max_tokens: int = 4096, max_append: int | None = None
    ) -> ModelState:
        """State of `num_slots` sessions, allocated here and never again.

        max_tokens: how far back a global layer sees; older tokens are overwritten. max_append: the
        longest block of one pass over the layers, by default the longest tick.
        """
        return ModelState.zeros(
            self.config,
            num_slots,
            max_tokens=max_tokens,
            max_append=self.config.layout.max_tokens_per_tick if max_append is None else max_append,
            device=self.device,
            dtype=self.dtype,
        )

    def embed_text(self, ids: Sequence[int]) -> Tensor:
        """[T, D] of token ids. Raises TypeError or ValueError for what is no token."""
        check_ids(self.config, "ids", ids)
        ids_T = torch.tensor(list(ids), dtype=torch.int64, device=self.device)
        return self.frontend.embed_text(ids_T)

    def embed_levels(self, levels_T_B: Tensor) -> Tensor:
        """[T, D] of dMel frames given as uint8 levels [T, B]."""
        return self.frontend.embed_levels(levels_T_B)

    def embed_frames(self, frames_N_L_Y_X_3: Tensor) -> Tensor:
        """[T, D] of uint8 RGB frame groups [N, frames, height, width, 3]."""
        return self.frontend.embed_frames(frames_N_L_Y_X_3)

    def append(self, state: ModelState, x_T_D: Tensor, start_S1: Tensor, slot_S: Tensor) -> Tensor:
        """Final-norm hidden states [T, D] of new tokens of any sessions; see `Backbone.append`."""
        return self.backbone.append(state, x_T_D, start_S1, slot_S)

    def logits(self, h_T_D: Tensor) -> Tensor:
        """float32 [T, V] of final-norm hidden states; columns that are no token are -inf."""
        return self.backbone.logits(h_T_D)

    def forward(self, x_T_D: Tensor, *, max_tokens: int | None = None) -> Tensor:
        """float32 logits [T, V] of one whole sequence of embedded tokens, without state.

        A second path that shares only the weights with `append` and `logits`; see `full_forward`.
        """
        Dims(D=self.config.width).check(x_T_D=x_T_D, dtype=ACTIVATIONS, device=self.device)
        return full_forward(self.config, self.weights, x_T_D, max_tokens=max_tokens)

    def tick(self, state: ModelState, tick: TickInput) -> TickOutput:
        """Hear, see and read one tick of every live row, then speak it in K output steps.

        Raises TypeError or ValueError before anything is changed. A session with samples that are
        not finite is reported in `fault_S` and harms no other.
        """
        begin = time.perf_counter_ns()
        tick.check(self.config, state)
        output = self._quiet(len(tick.slot_S))
        rows = tick.live_rows()
        if not rows:
            return output
        live = tick.select(rows)
        x_T_D, start_S1 = self.frontend.embed_tick(state, live)
        embedded = time.perf_counter_ns()
        h_T_D = self.backbone.append_in_passes(state, x_T_D, start_S1, live.slot_S)
        h_S_D = h_T_D[start_S1[1:].long() - 1]
        prefilled = time.perf_counter_ns()
        said = self._speaker.run_steps(state, h_S_D, live.slot_S)
        index = torch.tensor(rows, device=self.device)
        output.token_S_K[index] = said.token_S_K
        output.mel_S_K_B[index] = said.mel_S_K_B
        output.fault_S[index] = said.fault_S | ~live.pcm_S_W.isfinite().all(1)
        done = time.perf_counter_ns()
        output.stage_ns.update(
            frontend=embedded - begin, prefill=prefilled - embedded, steps=done - prefilled
        )
        return output

    def _quiet(self, num_rows: int) -> TickOutput:
        """What idle rows say."""
        layout, device = self.config.layout, self.device
        mel = (num_rows, layout.mel_frames, layout.dmel.num_bands)
        return TickOutput(
            torch.full((num_rows, layout.num_steps), -1, dtype=torch.int32, device=device),
            torch.full(mel, layout.dmel.level_min, device=device),
            torch.zeros(num_rows, dtype=torch.bool, device=device),
            dict.fromkeys(("frontend", "prefill", "steps"), 0),
        )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in ACTIVATIONS:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
