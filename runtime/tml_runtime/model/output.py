"""The output side of a tick: K steps that each say one token and one stretch of speech."""

# Dimension key: S session rows, K output steps of a tick, F mel frames of a step, B mel bands,
# D model width.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tml_kernels.kv_cache import CacheError
from tml_kernels.ops.dmel.reference import quantise_ref
from tml_kernels.ops.flow_head import flow_head
from tml_kernels.ops.sample import sample

from .backbone import Backbone
from .buffers import Bucket, TickInputs, TickSaid
from .frontend import Frontend
from .passes import Pass
from .state import ModelState

Done = Callable[[str, Tensor], None]  # told of each stage of a tick, and what it made


@dataclass(frozen=True)
class TickOutput:
    """What one tick said, on the host. Row s is row s of the input.

    token: int32, one text or action token per step. mel: float32 log10 mel frames in time order,
    K * F of them. fault: the session's samples, logits or speech were not finite; its tokens are
    silence from there on, its speech is the quietest level, and the session should be closed and
    its slot reset. An idle row says -1 and the quietest level. stage_ns: how long each stage took,
    one after the other; of ops queued one by one on a GPU, how long that took. bucket: the shapes
    it ran in, None where no row was live. gpu_ns: from when to when a GPU worked on a replayed
    graph. shed: frames that there was no bucket for, by row. refused: rows that found no room for
    this tick's keys, and why; they are faults, and their state is as it was. tokens: that the tick
    appended, by class (anchor, text, audio, video, reply). kv_pages: that the rows' sessions hold
    in global layers, by class. kv_dropped: that they lost there since the last tick with live rows.
    passes: over the model's layers. drafts: output steps of rows that were drafted; drafts_kept: of
    these, those that came as drafted, and nothing wrong before them in their tick.
    """

    token_S_K: Tensor
    mel_S_K_B: Tensor
    fault_S: Tensor
    stage_ns: dict[str, int] = field(default_factory=dict)
    bucket: Bucket | None = None
    gpu_ns: tuple[int, int] | None = None
    shed: dict[int, int] = field(default_factory=dict)
    refused: dict[int, CacheError] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=lambda: [0] * 5)
    kv_pages: list[int] = field(default_factory=lambda: [0] * 5)
    kv_dropped: list[int] = field(default_factory=lambda: [0] * 5)
    passes: int = 0
    drafts: int = 0
    drafts_kept: int = 0


class Drawing(NamedTuple):
    """How each row draws; read from the state once per tick."""

    temperature_S: Tensor
    top_k_S: Tensor
    top_p_S: Tensor
    min_p_S: Tensor
    seed_S: Tensor
    draws_S: Tensor

    @classmethod
    def of(cls, state: ModelState, at_S: Tensor) -> Drawing:
        return cls(
            *(
                setting_N.index_select(0, at_S)
                for setting_N in (
                    state.temperature_N,
                    state.top_k_N,
                    state.top_p_N,
                    state.min_p_N,
                    state.seed_N,
                    state.draws_N,
                )
            )
        )


class Step(NamedTuple):
    token_S: Tensor  # int32
    mel_S_F_B: Tensor
    levels_S_F_B: Tensor
    fault_S: Tensor


class Speaker:
    """Runs the output steps: hidden state -> token and speech -> input of the next step."""

    def __init__(self, backbone: Backbone, frontend: Frontend) -> None:
        self.backbone = backbone
        self.frontend = frontend
        self.config = backbone.config

    def run_steps(
        self,
        state: ModelState,
        h_S_D: Tensor,
        steps: Sequence[Pass],
        inputs: TickInputs[Tensor],
        said: TickSaid[Tensor],
        done: Done,
    ) -> None:
        """All K steps of the rows, into `said`; `steps` are the tick's passes, of which the first
        has been run: h is its hidden state.

        The last one said is not appended: it opens the next tick's output. Updates what the state
        knows of the last step and its count of draws.
        """
        drawing = Drawing.of(state, inputs.at_S)
        spoken: list[Step] = []
        for k, step in enumerate(steps):
            if k > 0:
                x_S_D = self.frontend.embed_step(spoken[-1].token_S, spoken[-1].levels_S_F_B)
                h_S_D = self.backbone.run(state, x_S_D, step)
            spoken.append(self.say(state, h_S_D, drawing, k, done))
        self.remember(state, inputs, spoken[-1].token_S, spoken[-1].levels_S_F_B)
        state.draws_N.add_(inputs.steps_N)
        torch.stack([step.token_S for step in spoken], dim=1, out=said.token_S_O)
        torch.cat([step.mel_S_F_B for step in spoken], dim=1, out=said.mel_S_F_B)
        broken_S = ~inputs.pcm_S_W.isfinite().all(1)
        faults = torch.stack([broken_S, *(step.fault_S for step in spoken)])
        torch.any(faults, 0, out=said.fault_S)

    def remember(
        self, state: ModelState, inputs: TickInputs[Tensor], token_S: Tensor, levels_S_F_B: Tensor
    ) -> None:
        """What the rows said last opens their next tick's output."""
        for own_N, last_S in ((state.token_N, token_S.long()), (state.levels_N_F_B, levels_S_F_B)):
            torch.index_select(torch.cat([own_N, last_S]), 0, inputs.said_N, out=own_N)

    def say(self, state: ModelState, h_S_D: Tensor, drawing: Drawing, k: int, done: Done) -> Step:
        """Step k of the rows, from the hidden states of its input."""
        counter_S = drawing.draws_S + k
        logits_S_V = self.backbone.logits(h_S_D, state.scratch)
        token_S, fault_S = sample(
            logits_S_V,
            drawing.temperature_S,
            drawing.top_k_S,
            drawing.top_p_S,
            drawing.seed_S,
            counter_S,
            fallback=self.config.vocab.silence,
            min_p_S=drawing.min_p_S,
            scratch_M=state.scratch.sample(logits_S_V),
        )
        mel_S_FB = self.flow(h_S_D, drawing.seed_S, counter_S)
        done(f"step {k}", mel_S_FB)
        mel_S_F_B, levels_S_F_B, broken_S = self.heard(mel_S_FB)
        return Step(token_S, mel_S_F_B, levels_S_F_B, fault_S | broken_S)

    def flow(self, h_S_D: Tensor, seed_S: Tensor, counter_S: Tensor) -> Tensor:
        """The speech of a step, [S, F * B], which may not be finite."""
        return flow_head(
            h_S_D,
            self.backbone.weights.flow,
            seed_S,
            counter_S,
            num_steps=self.config.flow.num_steps,
            guidance=self.config.flow.guidance,
        )

    def heard(self, mel_S_FB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mel [S, F, B], its levels, where it was not finite [S]); there it is quiet."""
        dmel = self.config.layout.dmel
        finite_S = mel_S_FB.isfinite().all(1)
        mel_S_FB = mel_S_FB.where(finite_S[:, None], dmel.level_min)
        mel_S_F_B = mel_S_FB.unflatten(1, (-1, dmel.num_bands))
        return mel_S_F_B, quantise_ref(mel_S_F_B, dmel), ~finite_S
