"""Output steps that are drafted: what multi-token-prediction layers draft, one pass verifies.

A tick with drafts has two parts, each of which asks the host nothing. The first says step 0, drafts
what follows and verifies that in one pass over the layers, which for every row also is its step 1.
Where every row's drafts were right, that is all; else the second takes the other rows' steps one by
one, each from its first wrong draft on, and a tick has no more passes than it has without drafts.

A draft takes the speech for the quietest level in every band. What is said is the same as without
drafts, see `verify`.
"""

# Dimension key: S session rows, N slots, K output steps of a tick, J = K - 1 of them in the pass
# that verifies, I = J - 1 drafted, F mel frames of a step, B mel bands, D model width, L layers,
# W width of a convolution.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tml_kernels.ops.dmel.reference import quantise_ref

from .buffers import TickInputs, TickSaid
from .config import CONV_TAPS
from .output import Done, Drawing, Speaker
from .passes import Pass, pass_of_steps, passes_of
from .state import ModelState
from .verify import draw, verify_draft


class Drafter:
    """Runs output steps as a `Speaker` does, of states that draft."""

    def __init__(self, speaker: Speaker) -> None:
        self.speaker = speaker
        self.backbone = speaker.backbone
        self.frontend = speaker.frontend
        self.config = speaker.config

    def run_first(
        self,
        state: ModelState,
        h_S_D: Tensor,
        step: Pass,
        inputs: TickInputs[Tensor],
        said: TickSaid[Tensor],
        done: Done,
    ) -> None:
        """The first part. `step` is the pass that made h; into `said`, where steps that are not
        known hold anything. The state is that of the rows' known steps, its count of draws that of
        all."""
        num_steps, frames = self.config.layout.num_steps, self.config.layout.mel_frames_per_step
        drawing = Drawing.of(state, inputs.at_S)
        first = self.speaker.say(state, h_S_D, drawing, 0, done)
        x_S_D = self.frontend.embed_step(first.token_S, first.levels_S_F_B)
        saved = [taps.clone() for taps in state.taps()]
        draft_S_I, x_S_J_D = self._draft(state, x_S_D, step, inputs, drawing)
        for now, before in zip(state.taps(self.config.num_layers), saved, strict=True):
            now.copy_(before[len(before) - len(now) :])

        together = pass_of_steps(inputs, step.plans, num_steps - 1)
        x_SJ_D = x_S_J_D.flatten(0, 1)
        h_SJ_D = self.backbone.run_own(state, x_SJ_D, together)
        length_S, fault_S = self._verify(state, h_SJ_D, draft_S_I, drawing, said, done)
        end_S = together.start_S1[:-1] + length_S
        self.backbone.mtp.follow(state, x_SJ_D, h_SJ_D, together, end_S)
        length_N = _by_slot(length_S, inputs.slot_S, state.num_slots)
        _keep(state.taps(), saved, num_steps - 1, length_N)

        said.token_S_O[:, 0] = first.token_S
        said.mel_S_F_B[:, :frames] = first.mel_S_F_B
        broken_S = ~inputs.pcm_S_W.isfinite().all(1)
        said.fault_S.copy_(broken_S | first.fault_S | fault_S)
        said.known_S.copy_((1 + length_S).masked_fill(inputs.slot_S < 0, num_steps))
        self._remember(state, inputs, said)
        state.draws_N.add_(inputs.steps_N)

    def run_rest(
        self,
        state: ModelState,
        inputs: TickInputs[Tensor],
        said: TickSaid[Tensor],
        done: Done,
    ) -> None:
        """The second part, after the first of the same tick: the steps that it left unknown."""
        num_steps, frames = self.config.layout.num_steps, self.config.layout.mel_frames_per_step
        slot_S = inputs.slot_S.masked_fill(said.known_S == num_steps, -1)
        passes = passes_of(state, inputs, slot_S)
        drawing = Drawing.of(state, inputs.at_S)
        drawing = drawing._replace(draws_S=drawing.draws_S - num_steps)  # as the tick began
        mel_S_K_F_B = said.mel_S_F_B.unflatten(1, (num_steps, frames))
        for k in range(2, num_steps):
            is_known_S = said.known_S > k
            step = passes[k]._replace(slot_S=slot_S.masked_fill(is_known_S, -1))
            levels_S_F_B = quantise_ref(mel_S_K_F_B[:, k - 1], self.config.layout.dmel)
            token_S = said.token_S_O[:, k - 1].contiguous()
            x_S_D = self.frontend.embed_step(token_S, levels_S_F_B)
            h_S_D = self.backbone.run(state, x_S_D, step)
            spoken = self.speaker.say(state, h_S_D, drawing, k, done)
            for to, new in (
                (said.token_S_O[:, k], spoken.token_S),
                (mel_S_K_F_B[:, k], spoken.mel_S_F_B),
            ):
                known = is_known_S.view(-1, *[1] * (new.ndim - 1))
                to.copy_(torch.where(known, to, new))
            said.fault_S.logical_or_(spoken.fault_S & ~is_known_S)
        self._remember(state, inputs, said)

    def _draft(
        self,
        state: ModelState,
        x_S_D: Tensor,
        step: Pass,
        inputs: TickInputs[Tensor],
        drawing: Drawing,
    ) -> tuple[Tensor, Tensor]:
        """(tokens [S, I] of steps 1 to I, inputs [S, J, D] of steps 1 to J), of which the first is
        x. Layers leave taps behind that are nobody's."""
        layout, silence = self.config.layout, self.config.vocab.silence
        carry_L_N_D, num_rows = state.carry_L_N_D, len(x_S_D)
        assert carry_L_N_D is not None
        quiet_S_F_B = torch.zeros(
            (num_rows, layout.mel_frames_per_step, layout.dmel.num_bands),
            dtype=torch.uint8,
            device=x_S_D.device,
        )
        tokens: list[Tensor] = []
        x: list[Tensor] = [x_S_D]
        before: Sequence[Tensor] = ()
        for layer in range(state.num_drafts):
            # Over all steps so far, so that its keys of them are there too.
            carried_S_1_D = carry_L_N_D[layer].index_select(0, inputs.at_S)[:, None]
            h_R_D = self.backbone.mtp.layer(
                state,
                layer,
                pass_of_steps(inputs, step.plans, layer + 1),
                torch.cat([carried_S_1_D, *before], dim=1).flatten(0, 1),
                torch.stack(x, dim=1).flatten(0, 1),
            )
            h_S_R_D = h_R_D.unflatten(0, (num_rows, layer + 1))
            before = (h_S_R_D,)
            logits_S_V = self.backbone.logits(h_S_R_D[:, -1].contiguous(), state.scratch)
            scratch_M = state.scratch.sample(logits_S_V)
            token_S, _ = draw(logits_S_V, drawing, 1 + layer, fallback=silence, scratch_M=scratch_M)
            tokens.append(token_S)
            x.append(self.frontend.embed_step(token_S, quiet_S_F_B))
        return torch.stack(tokens, dim=1), torch.stack(x, dim=1)

    def _verify(
        self,
        state: ModelState,
        h_SJ_D: Tensor,
        draft_S_I: Tensor,
        drawing: Drawing,
        said: TickSaid[Tensor],
        done: Done,
    ) -> tuple[Tensor, Tensor]:
        """(how many of the J steps each row has said, whether one of these is a fault), and them
        into `said`."""
        num_rows, num_drafts = draft_S_I.shape
        steps, frames = num_drafts + 1, self.config.layout.mel_frames_per_step
        seed_SJ = drawing.seed_S.repeat_interleave(steps)
        step_J = torch.arange(1, 1 + steps, device=h_SJ_D.device)
        counter_SJ = (drawing.draws_S[:, None] + step_J).flatten()
        mel_SJ_FB = self.speaker.flow(h_SJ_D, seed_SJ, counter_SJ)
        done("steps in one", mel_SJ_FB.view(num_rows, -1))
        mel_SJ_F_B, levels_SJ_F_B, broken_SJ = self.speaker.heard(mel_SJ_FB)
        is_quiet_S_J = (levels_SJ_F_B == 0).flatten(1).all(1).view(num_rows, steps)
        logits_SJ_V = self.backbone.logits(h_SJ_D, state.scratch)
        verified = verify_draft(
            logits_SJ_V.unflatten(0, (num_rows, steps)),
            draft_S_I,
            drawing,
            1,
            fallback=self.config.vocab.silence,
            agrees_S_J=is_quiet_S_J[:, :-1],
            scratch_M=state.scratch.sample(logits_SJ_V),
        )
        said.token_S_O[:, 1:] = verified.token_S_K.clamp(min=0)  # what is not known is a token too
        said.mel_S_F_B[:, frames:] = mel_SJ_F_B.unflatten(0, (num_rows, steps)).flatten(1, 2)
        counts_S_J = step_J <= verified.length_S[:, None]
        broken_S = (broken_SJ.view(num_rows, steps) & counts_S_J).any(1)
        return verified.length_S, verified.fault_S | broken_S

    def _remember(
        self, state: ModelState, inputs: TickInputs[Tensor], said: TickSaid[Tensor]
    ) -> None:
        frames = self.config.layout.mel_frames_per_step
        levels_S_F_B = quantise_ref(said.mel_S_F_B[:, -frames:], self.config.layout.dmel)
        self.speaker.remember(state, inputs, said.token_S_O[:, -1], levels_S_F_B)


def _by_slot(length_S: Tensor, slot_S: Tensor, num_slots: int) -> Tensor:
    """int64 [N], 0 where no row has the slot."""
    own_N = torch.arange(num_slots, device=slot_S.device)
    return ((slot_S[:, None] == own_N) * length_S[:, None]).sum(0)


def _keep(
    taps: Sequence[Tensor], saved: Sequence[Tensor], num_tokens: int, length_N: Tensor
) -> None:
    """Make taps [L, N, ..., 3, W] those after the first length[n] tokens of a pass, before which
    they were as saved. It had no more tokens than there are taps, so these hold all its inputs;
    saved ones and those are a row, of which a window is kept."""
    own_3 = torch.arange(CONV_TAPS, device=length_N.device)
    for now, before in zip(taps, saved, strict=True):
        rows = now.shape[2:-2].numel()
        both = torch.cat([before, now[..., CONV_TAPS - num_tokens :, :]], dim=-2).flatten(1, -2)
        begin_R = length_N.repeat_interleave(rows)
        in_row = CONV_TAPS + num_tokens
        begin_R = begin_R + in_row * torch.arange(len(begin_R), device=begin_R.device)
        now.copy_(both.index_select(1, (begin_R[:, None] + own_3).flatten()).view_as(now))
