"""The streaming path: appends blocks of tokens to the sessions of a state, through the ops."""

# Dimension key: T tokens, S session rows, D model width, H query heads, C head width, B d_rel,
# J fused projection rows, V vocabulary.

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tml_kernels._dims import Dims
from tml_kernels.kv_cache import PageClass
from tml_kernels.moe import moe_layer, moe_route
from tml_kernels.ops.attention_prologue import attention_prologue
from tml_kernels.ops.expert_mlp import expert_hidden, expert_sum
from tml_kernels.ops.linear import linear, linear_conv
from tml_kernels.ops.paged_attention import paged_attention
from tml_kernels.ops.rms_norm import rms_norm
from tml_kernels.ops.short_conv import short_conv

from .config import ModelConfig
from .mtp import MtpLayers
from .passes import Pass, plan_pass
from .scratch import Scratch
from .state import ModelState, Run
from .weights import AttentionWeights, DenseWeights, Matrix, ModelWeights, MoeWeights

if TYPE_CHECKING:
    from ..parallel.ranks import Ranks


class Backbone:
    """The layers of a model. Holds no session state: a pure function of weights, state and input.

    A session's hidden states are bitwise the same whoever else is in the call.

    ranks: that share the rows of the layers' matrices; config and weights are then one rank's, and
    `gather` puts the columns of all ranks together. Where every row is here it does nothing.
    """

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, ranks: Ranks | None = None
    ) -> None:
        self.config = config
        self.weights = weights
        self.parts = 1 if ranks is None else ranks.size
        self.gather = _all_here if ranks is None else ranks.gather
        # The multi-token-prediction layers' blocks are as more layers behind the model's.
        self.mtp = MtpLayers(self)
        self._layers = (*weights.layers, *(w.block for w in weights.mtp))
        self._heads = [
            config.with_drafts(len(weights.mtp)).heads(i) for i in range(len(self._layers))
        ]
        # Python numbers, read once: a captured step must not ask the device for them.
        self._dense_scale = {
            layer: w.mlp.scale_1.item()
            for layer, w in enumerate(self._layers)
            if isinstance(w.mlp, DenseWeights)
        }

    def append(
        self,
        state: ModelState,
        x_T_D: Tensor,
        start_S1: Tensor,
        slot_S: Tensor,
        page_class: PageClass = PageClass.TEXT,
        *,
        between_ticks: bool = False,
    ) -> Tensor:
        """Final-norm hidden states [T, D] of new tokens, which the sessions' state then holds.

        x: embedded tokens of all rows back to back. start int32 [S + 1], slot int32 [S], distinct
        slots, -1 idle. Outputs of idle and padding tokens are zero. Blocks longer than
        `state.max_append` are taken in several passes, each a tick of the cache; between_ticks:
        one of these sessions alone, see `RollingKVCache.tick`. Raises TypeError or ValueError for
        bad input before anything is changed; the check reads start and slot on the host. Raises
        CacheError where there is no room, and keeps the passes before.
        """
        check_ragged(self.config, state, x_T_D, start_S1, slot_S)
        start, slots = start_S1.tolist(), slot_S.tolist()
        longest = max((b - a for a, b in pairwise(start)), default=0)
        out_T_D = torch.zeros_like(x_T_D)
        for begin in range(0, longest, state.max_append):
            pieces = [range(a, b)[begin : begin + state.max_append] for a, b in pairwise(start)]
            index_T = torch.tensor([t for piece in pieces for t in piece], device=x_T_D.device)
            runs: list[list[Run]] = [[(page_class, len(piece))] for piece in pieces]
            out_T_D[index_T] = self._append_piece(state, x_T_D[index_T], slots, runs, between_ticks)
        return out_T_D

    def _append_piece(
        self,
        state: ModelState,
        x_T_D: Tensor,
        slots: list[int],
        runs: list[list[Run]],
        between_ticks: bool,
    ) -> Tensor:
        begun: list[int] = []
        try:
            for slot, row_runs in zip(slots, runs, strict=True):
                if slot >= 0:
                    state.reserve(slot, row_runs)
                    begun.append(slot)
            h_T_D = self.run(state, x_T_D, plan_pass(state, slots, runs))
        except BaseException:
            state.roll_back(begun)
            raise
        if between_ticks:
            state.commit_between(begun)
        else:
            state.commit(begun)
        return h_T_D

    def run(self, state: ModelState, x_T_D: Tensor, step: Pass) -> Tensor:
        """Final-norm hidden states [T, D] of one pass, whose keys and taps the state then holds;
        where its ticks draft, those of the layers that do too."""
        h_T_D = self.run_own(state, x_T_D, step)
        if state.num_drafts:
            self.mtp.follow(state, x_T_D, h_T_D, step)
        return h_T_D

    def run_own(self, state: ModelState, x_T_D: Tensor, step: Pass) -> Tensor:
        """`run` without the layers that draft."""
        if x_T_D.shape[0] == 0 or step.slot_S.shape[0] == 0:
            return torch.zeros_like(x_T_D)
        residual_T_D = x_T_D.clone()  # the layers add to it
        h_T_D = rms_norm(residual_T_D, self.weights.layers[0].attn_norm_D, eps=self.config.norm_eps)
        for layer in self.config.layers:
            h_T_D = self.layer(state, layer, step, h_T_D, residual_T_D)
        return h_T_D

    def layer(
        self, state: ModelState, layer: int, step: Pass, h_T_D: Tensor, residual_T_D: Tensor
    ) -> Tensor:
        """One layer of a pass: adds to `residual` in place.

        h is the residual under this layer's first norm; the result is what the next layer takes, or
        after the last one the final-norm hidden states.
        """
        layers = self.weights.layers
        last = layer + 1 == len(layers)
        next_norm_D = self.weights.norm_D if last else layers[layer + 1].attn_norm_D
        return self.block(state, layer, step, h_T_D, residual_T_D, next_norm_D)

    def block(
        self,
        state: ModelState,
        layer: int,
        step: Pass,
        h_T_D: Tensor,
        residual_T_D: Tensor,
        next_norm_D: Tensor | None,
    ) -> Tensor:
        """`layer`, of the model or behind its own; the residual's norm is the result, if any."""
        w = self._layers[layer]
        h_T_D = self._attend(state, layer, step, h_T_D)
        h_T_D = self._project(state, layer, step, h_T_D, residual_T_D)
        return short_conv(
            self._mlp(state, layer, step, h_T_D, residual_T_D),
            w.mlp_conv_D_4,
            state.mlp_conv_L_N_3_D[layer],
            step.start_S1,
            step.slot_S,
            residual_T_D=residual_T_D,
            norm_weight_D=next_norm_D,
            eps=self.config.norm_eps,
        )

    def logits(self, h_T_D: Tensor, scratch: Scratch | None = None) -> Tensor:
        """float32 [T, V] of final-norm hidden states; columns that are no token are -inf."""
        weight_V_D, num_valid = self.weights.unembed_V_D, self.config.vocab.num_valid
        logits_T_V = linear(
            h_T_D,
            weight_V_D,
            scratch_B=scratch.linear(h_T_D, weight_V_D, self.parts)
            if scratch is not None
            else None,
            scale=1.0 / self.config.logits_divisor,
            num_valid=num_valid if self.parts == 1 else None,
            out_dtype=torch.float32,
            parts=self.parts,
        )
        if self.parts > 1:
            logits_T_V = self.gather(logits_T_V)
            logits_T_V[:, num_valid:] = float("-inf")
        return logits_T_V

    def _attend(self, state: ModelState, layer: int, step: Pass, x_T_D: Tensor) -> Tensor:
        config, heads = self.config, self._heads[layer]
        w: AttentionWeights = self._layers[layer].attention
        g, i = state.places[layer]
        group, pages = state.groups[g], state.groups[g].pages
        k_scale, v_scale = (
            None if scale is None else scale[i]
            for scale in (pages.k_scale_L_P_G_R, pages.v_scale_L_P_G_R)
        )
        scratch = state.scratch
        qkvr_T_J = self._linear(scratch, x_T_D, w.qkvr_J_D)
        q_T_H_C = attention_prologue(
            qkvr_T_J,
            w.k_conv_W_4,
            w.v_conv_W_4,
            w.q_norm_C,
            w.k_norm_C,
            group.conv_L_N_2_3_W[i],
            pages.k_pages_L_P_G_R_C[i],
            pages.v_pages_L_P_G_R_C[i],
            step.row_K_T[g],
            step.start_S1,
            step.slot_S,
            num_heads=heads.num_heads,
            eps=config.norm_eps,
            k_scale_P_G_R=k_scale,
            v_scale_P_G_R=v_scale,
        )
        rel_T_HB = qkvr_T_J[:, -heads.num_heads * config.d_rel :]
        rel_T_H_B = rel_T_HB.unflatten(1, (heads.num_heads, config.d_rel))
        k_pages_P_G_R_C, plan = pages.k_pages_L_P_G_R_C[i], step.plans[g]
        is_global = heads.window is None
        attended_T_H_C = paged_attention(
            q_T_H_C,
            k_pages_P_G_R_C,
            pages.v_pages_L_P_G_R_C[i],
            plan,
            step.start_S1,
            step.length_S,
            row_position_P_R=pages.row_position_P_R,
            span=pages.spec.span if is_global else None,
            scale=1.0 / heads.head_width,
            window=heads.window,
            rel_T_H_B=rel_T_H_B,
            rel_table_B_X=w.rel_table_B_X,
            tau_floor=config.tau_floor if is_global else None,
            tau_alpha=config.tau_alpha,
            k_scale_P_G_R=k_scale,
            v_scale_P_G_R=v_scale,
            scratch_B=scratch.attention(q_T_H_C, k_pages_P_G_R_C, plan, heads.window, rel_T_H_B),
        )
        return self.gather(attended_T_H_C.flatten(1))

    def _project(
        self, state: ModelState, layer: int, step: Pass, x_T_I: Tensor, residual_T_D: Tensor
    ) -> Tensor:
        """What the heads have found joins the residual; the result is what `_mlp` takes."""
        w, taps_N_3_D = self._layers[layer], state.attn_conv_L_N_3_D[layer]
        out_D_I, late_norm = w.attention.out_D_I, isinstance(w.mlp, MoeWeights)
        if late_norm and step.one_each and self.parts == 1:  # a part of its rows convolves nothing
            scratch_B = state.scratch.linear(x_T_I, out_D_I)
            conv = (w.attn_conv_D_4, taps_N_3_D, step.slot_S, residual_T_D, w.mlp_norm_D)
            return linear_conv(x_T_I, out_D_I, *conv, scratch_B=scratch_B)
        return short_conv(
            self.gather(self._linear(state.scratch, x_T_I, out_D_I)),
            w.attn_conv_D_4,
            taps_N_3_D,
            step.start_S1,
            step.slot_S,
            residual_T_D=residual_T_D,
            norm_weight_D=w.mlp_norm_D,
            eps=self.config.norm_eps,
            late_norm=late_norm,
        )

    def _mlp(
        self, state: ModelState, layer: int, step: Pass, x_T_D: Tensor, residual_T_D: Tensor
    ) -> Tensor:
        """x is the residual under the layer's second norm; of experts without its division, which
        they make themselves."""
        w = self._layers[layer].mlp
        if isinstance(w, DenseWeights):
            scratch, scale = state.scratch, self._dense_scale[layer]
            hidden_T_F = self._linear(scratch, x_T_D, w.w13_J_D, activation="swiglu")
            return self.gather(
                self._linear(scratch, self.gather(hidden_T_F), w.w2_D_F, scale=scale)
            )
        assert isinstance(w, MoeWeights)
        experts = self.config.experts
        routing = state.scratch.routing(x_T_D, w.experts, experts.top_k) if step.one_each else None
        router = {
            "residual_T_D": residual_T_D,
            "eps": self.config.norm_eps,
            "scoring": "sink_sigmoid",
            "bias_E": w.bias_E,
            "global_scale_1": w.scale_1,
            "top_k": experts.top_k,
            "scale": experts.route_scale,
        }
        if self.parts == 1:
            return moe_layer(x_T_D, w.gate_A_D, w.experts, routing=routing, **router)
        num_shared = w.experts.num_shared
        routing = moe_route(x_T_D, w.gate_A_D, num_shared=num_shared, out=routing, **router)
        h_T_S_F = self.gather(expert_hidden(x_T_D, w.experts, routing))
        return self.gather(expert_sum(h_T_S_F, w.experts, routing, dtype=x_T_D.dtype))

    def _linear(self, scratch: Scratch, x_T_D: Tensor, weight: Matrix, **options: Any) -> Tensor:
        scratch_B = scratch.linear(x_T_D, weight, self.parts)
        return linear(x_T_D, weight, scratch_B=scratch_B, parts=self.parts, **options)


def _all_here(x: Tensor) -> Tensor:
    return x


def check_ragged(
    config: ModelConfig, state: ModelState, x_T_D: Tensor, start_S1: Tensor, slot_S: Tensor
) -> None:
    """TypeError or ValueError unless x, start and slot describe an append to this state."""
    dims = Dims(D=config.width)
    device = state.device
    dims.check(x_T_D=x_T_D, dtype=state.dtype, device=device)
    dims.check(slot_S=slot_S, dtype=torch.int32, device=device)
    dims.check(start_S1=start_S1, dtype=torch.int32, device=device)
    start = start_S1.tolist()
    if start[0] != 0 or start != sorted(start) or start[-1] > dims["T"]:
        raise ValueError(f"start_S1: {start} does not rise from 0 to at most T={dims['T']}")
    check_slots(config, state, slot_S.tolist())


def check_slots(config: ModelConfig, state: ModelState, slots: list[int]) -> None:
    """ValueError unless the state is of this model and every slot is -1 or one of its own."""
    if state.config is not config and state.config != config:
        raise ValueError(
            f"state: made for {state.config.name!r}, not {config.name!r} as it is here"
        )
    if slots and not (min(slots) >= -1 and max(slots) < state.num_slots):
        wrong = next(slot for slot in slots if not -1 <= slot < state.num_slots)
        raise ValueError(f"slot_S: {wrong} is not -1 or in 0..{state.num_slots - 1}")
    live = [slot for slot in slots if slot >= 0]
    if len(set(live)) < len(live):
        twice = next(slot for slot in live if live.count(slot) > 1)
        raise ValueError(f"slot_S: slot {twice} is given twice")
