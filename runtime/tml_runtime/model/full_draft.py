"""The reference of output steps that are drafted: one session, whole sequences, in plain torch.

Multi-token-prediction layers draft what the next steps say, and one pass over the model's layers
verifies them all (`verify`). A step also gives speech, which the next one's input holds; a draft
takes it for the quietest level in every band, so drafts of steps are kept while nothing is said
aloud. What is said is the same with drafts as without; only the number of passes is another.
"""

# Dimension key: T tokens, D model width, K output steps of a tick, F mel frames of a step, B mel
# bands, J drafted steps of a pass, P passes.

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tml_kernels.ops.dmel.reference import quantise_ref
from tml_kernels.ops.flow_head import flow_head

from .config import ModelConfig
from .frontend import Frontend
from .full import full_hidden, full_logits, full_mtp
from .output import Drawing
from .verify import draw, verify_draft
from .weights import ModelWeights


class Spoken(NamedTuple):
    """What a tick says. steps: how many of them each pass over the model's layers has said; the
    first is that of the tick's input, each other says one more than of its drafts were right."""

    token_K: Tensor  # int32
    mel_K_F_B: Tensor  # float32
    levels_K_F_B: Tensor  # uint8
    steps_P: list[int]

    @property
    def passes(self) -> int:
        return len(self.steps_P)


def full_steps(
    config: ModelConfig,
    weights: ModelWeights,
    x_T_D: Tensor,
    drawing: Drawing,
    *,
    num_drafts: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Spoken:
    """All K output steps after embedded tokens x, of which the last is the first step's input.

    drawing: of this one session. num_drafts: at most so many steps are drafted for a pass, by as
    many of the multi-token-prediction layers; None: as many as there are. dtype: of the products,
    but for the speech head, which takes float32. Every pass begins anew from the first token.
    Raises ValueError for drafts without layers.
    """
    layers = len(weights.mtp)
    num_drafts = layers if num_drafts is None else num_drafts
    if not 0 <= num_drafts <= layers:
        raise ValueError(f"num_drafts={num_drafts} is not in 0..{layers}, the layers that draft")
    frontend, num_steps = Frontend(config, weights), config.layout.num_steps
    draft_J = torch.empty(0, dtype=torch.int32, device=x_T_D.device)
    draft_J_D = x_T_D[:0]
    said: list[tuple[Tensor, Tensor, Tensor]] = []
    step = 0
    while True:
        h_T_D = full_hidden(config, weights, torch.cat([x_T_D, draft_J_D]).to(dtype))
        h_K_D = h_T_D[len(x_T_D) - 1 :]
        mel_K_F_B, levels_K_F_B = _speech(config, weights, h_K_D, drawing, step)
        verified = verify_draft(
            full_logits(config, weights, h_K_D).float()[None],
            draft_J[None],
            drawing,
            step,
            fallback=config.vocab.silence,
            agrees_S_J=(levels_K_F_B[:-1] == 0).flatten(1).all(1)[None],
        )
        length = int(verified.length_S[0])
        token_K = verified.token_S_K[0, :length]
        said.append((token_K, mel_K_F_B[:length], levels_K_F_B[:length]))
        step += length
        if step == num_steps:
            token_K, mel_K_F_B, levels_K_F_B = map(torch.cat, zip(*said, strict=True))
            return Spoken(token_K, mel_K_F_B, levels_K_F_B, [len(tokens) for tokens, *_ in said])
        next_1_D = frontend.embed_step(token_K[-1:], levels_K_F_B[length - 1 : length])
        x_T_D = torch.cat([x_T_D, draft_J_D[: length - 1], next_1_D])
        draft_J, draft_J_D = _draft(
            config, weights, h_T_D[: len(x_T_D) - 1], x_T_D, drawing, step,
            min(num_drafts, num_steps - step - 1),
        )  # fmt: skip


def _draft(
    config: ModelConfig,
    weights: ModelWeights,
    h_T_D: Tensor,
    x_T1_D: Tensor,
    drawing: Drawing,
    step: int,
    num_drafts: int,
) -> tuple[Tensor, Tensor]:
    """(tokens [J], inputs [J, D]): what steps step, step + 1, ... say, and what follows from it.

    h: the model's, of all tokens but the last, which is the input of step `step`. Before the first
    token a layer takes zeros, as it does in a session's.
    """
    dmel, frontend = config.layout.dmel, Frontend(config, weights)
    quiet_1_F_B = torch.zeros(
        1, config.layout.mel_frames_per_step, dmel.num_bands, dtype=torch.uint8, device=h_T_D.device
    )
    tokens, inputs = [torch.empty(0, dtype=torch.int32, device=h_T_D.device)], [x_T1_D]
    for layer in range(num_drafts):
        before_T_D = F.pad(h_T_D, (0, 0, 1, 0))
        h_T_D = full_mtp(config, weights, layer, before_T_D, torch.cat(inputs), begin=0)
        logits_1_V = full_logits(config, weights, h_T_D[-1:]).float()
        token_1, _ = draw(logits_1_V, drawing, step + layer, fallback=config.vocab.silence)
        tokens.append(token_1)
        inputs.append(frontend.embed_step(token_1, quiet_1_F_B))
    return torch.cat(tokens), torch.cat(inputs)[len(x_T1_D) :]


def _speech(
    config: ModelConfig, weights: ModelWeights, h_K_D: Tensor, drawing: Drawing, step: int
) -> tuple[Tensor, Tensor]:
    """(mel, levels), both [K, F, B], of steps step, step + 1, ..."""
    dmel = config.layout.dmel
    counter_K = drawing.draws_S + torch.arange(step, step + len(h_K_D), device=h_K_D.device)
    mel_K_FB = flow_head(
        h_K_D.to(weights.embed_V_D.dtype),
        weights.flow,
        drawing.seed_S.expand(len(h_K_D)).contiguous(),
        counter_K,
        num_steps=config.flow.num_steps,
        guidance=config.flow.guidance,
    )
    mel_K_F_B = mel_K_FB.unflatten(1, (-1, dmel.num_bands))
    return mel_K_F_B, quantise_ref(mel_K_F_B, dmel)
