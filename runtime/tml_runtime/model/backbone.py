"""The streaming path: appends blocks of tokens to the sessions of a state, through the ops."""

# Dimension key: T tokens, S session rows, D model width, H query heads, C head width, B d_rel,
# J fused projection rows, V vocabulary.

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tml_kernels._dims import Dims
from tml_kernels.moe import MoEWeights, moe_layer, prepare_moe_weights
from tml_kernels.ops.attention_prologue import attention_prologue
from tml_kernels.ops.linear import linear
from tml_kernels.ops.paged_attention import paged_attention
from tml_kernels.ops.rms_norm import rms_norm
from tml_kernels.ops.short_conv import short_conv

from .config import ModelConfig
from .pages import PageList
from .state import ModelState
from .weights import AttentionWeights, DenseWeights, ModelWeights, MoeWeights


class Batch(NamedTuple):
    """One pass over the layers: which tokens belong to whom, and where their keys go."""

    start_S1: Tensor  # int32
    slot_S: Tensor  # int32, -1: idle
    length_S: Tensor  # int64, tokens of the session once these are appended
    local: PageList
    global_: PageList

    @classmethod
    def of(cls, state: ModelState, start_S1: Tensor, slot_S: Tensor, num_tokens: int) -> Batch:
        """No data is looked at on the host. Tokens from start[S] on are padding."""
        t_T = torch.arange(num_tokens, device=start_S1.device, dtype=torch.int32)
        row_T = torch.searchsorted(start_S1[1:], t_T, right=True)  # S for padding
        slot_S_long = slot_S.long()
        before_S = state.length_N[slot_S_long.clamp(min=0)]  # of idle rows: anything
        slot_T = torch.cat([slot_S_long, slot_S_long.new_full((1,), -1)])[row_T]
        first_S1 = torch.cat([before_S, before_S.new_zeros(1)]) - start_S1
        position_T = first_S1[row_T] + t_T
        length_S = before_S + start_S1.diff()
        return cls(
            start_S1=start_S1,
            slot_S=slot_S,
            length_S=length_S,
            local=state.local.page_list(slot_S_long, length_S, slot_T, position_T),
            global_=state.global_.page_list(slot_S_long, length_S, slot_T, position_T),
        )


class Backbone:
    """The layers of a model. Holds no session state: a pure function of weights, state and input.

    A session's hidden states are bitwise the same whoever else is in the call.
    """

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config = config
        self.weights = weights
        # Python numbers, read once: a captured step must not ask the device for them.
        self._dense_scale = {
            layer: w.mlp.scale_1.item()
            for layer, w in enumerate(weights.layers)
            if isinstance(w.mlp, DenseWeights)
        }
        self._experts = {
            layer: _experts_of(w.mlp)
            for layer, w in enumerate(weights.layers)
            if isinstance(w.mlp, MoeWeights)
        }
        self._layer_in_group = {
            layer: sum(config.heads(i) is config.heads(layer) for i in range(layer))
            for layer in config.layers
        }

    def append(self, state: ModelState, x_T_D: Tensor, start_S1: Tensor, slot_S: Tensor) -> Tensor:
        """Final-norm hidden states [T, D] of new tokens, which the sessions' state then holds.

        x: embedded tokens of all rows back to back. start int32 [S + 1], slot int32 [S], distinct
        slots, -1 idle. Outputs of idle and padding tokens are zero. Blocks longer than
        `state.max_append` are taken in several passes. Bad input raises TypeError or ValueError
        before anything is changed; the check reads start and slot on the host.
        """
        check_ragged(self.config, state, x_T_D, start_S1, slot_S)
        return self.append_in_passes(state, x_T_D, start_S1, slot_S)

    def append_in_passes(
        self, state: ModelState, x_T_D: Tensor, start_S1: Tensor, slot_S: Tensor
    ) -> Tensor:
        """`append` for input known to be sound: cuts blocks that are too long for one pass."""
        start = start_S1.tolist()
        longest = max((b - a for a, b in pairwise(start)), default=0)
        if longest <= state.max_append:
            return self.append_unchecked(state, x_T_D, start_S1, slot_S)
        out_T_D = torch.zeros_like(x_T_D)
        for begin in range(0, longest, state.max_append):
            index: list[int] = []
            piece_start = [0]
            for a, b in pairwise(start):
                index.extend(range(a, b)[begin : begin + state.max_append])
                piece_start.append(len(index))
            index_T = torch.tensor(index, device=x_T_D.device)
            piece_start_S1 = torch.tensor(piece_start, dtype=torch.int32, device=x_T_D.device)
            out_T_D[index_T] = self.append_unchecked(state, x_T_D[index_T], piece_start_S1, slot_S)
        return out_T_D

    def append_unchecked(
        self, state: ModelState, x_T_D: Tensor, start_S1: Tensor, slot_S: Tensor
    ) -> Tensor:
        """`append` for input known to be sound, at most `state.max_append` tokens a session."""
        if x_T_D.shape[0] == 0 or slot_S.shape[0] == 0:
            return torch.zeros_like(x_T_D)
        batch = Batch.of(state, start_S1, slot_S, x_T_D.shape[0])
        eps, layers = self.config.norm_eps, self.weights.layers
        residual_T_D = x_T_D.clone()  # the layers add to it
        h_T_D = rms_norm(residual_T_D, layers[0].attn_norm_D, eps=eps)
        for layer, w in enumerate(layers):
            last = layer + 1 == len(layers)
            next_norm_D = self.weights.norm_D if last else layers[layer + 1].attn_norm_D
            convs = (
                (self._attend, w.attn_conv_D_4, state.attn_conv_L_N_3_D, w.mlp_norm_D),
                (self._mlp, w.mlp_conv_D_4, state.mlp_conv_L_N_3_D, next_norm_D),
            )
            for mix, conv_D_4, taps_L_N_3_D, norm_D in convs:
                h_T_D = short_conv(
                    mix(state, layer, batch, h_T_D),
                    conv_D_4,
                    taps_L_N_3_D[layer],
                    start_S1,
                    slot_S,
                    residual_T_D=residual_T_D,
                    norm_weight_D=norm_D,
                    eps=eps,
                )
        live_S = slot_S >= 0
        slot_A = slot_S[live_S].long()
        state.length_N[slot_A] = batch.length_S[live_S]
        return h_T_D

    def logits(self, h_T_D: Tensor) -> Tensor:
        """float32 [T, V] of final-norm hidden states; columns that are no token are -inf."""
        return linear(
            h_T_D,
            self.weights.unembed_V_D,
            scale=1.0 / self.config.logits_divisor,
            num_valid=self.config.vocab.num_valid,
            out_dtype=torch.float32,
        )

    def _attend(self, state: ModelState, layer: int, batch: Batch, x_T_D: Tensor) -> Tensor:
        config, heads = self.config, self.config.heads(layer)
        w: AttentionWeights = self.weights.layers[layer].attention
        is_local = heads.window is not None
        group, pages = (state.local, batch.local) if is_local else (state.global_, batch.global_)
        k_pages = group.k_pages_L_P_G_R_C[self._layer_in_group[layer]]
        v_pages = group.v_pages_L_P_G_R_C[self._layer_in_group[layer]]
        qkvr_T_J = linear(x_T_D, w.qkvr_J_D)
        q_T_H_C = attention_prologue(
            qkvr_T_J,
            w.k_conv_W_4,
            w.v_conv_W_4,
            w.q_norm_C,
            w.k_norm_C,
            group.conv_L_N_2_3_W[self._layer_in_group[layer]],
            k_pages,
            v_pages,
            pages.pool_row_T,
            batch.start_S1,
            batch.slot_S,
            num_heads=heads.num_heads,
            eps=config.norm_eps,
        )
        rel_T_HB = qkvr_T_J[:, -heads.num_heads * config.d_rel :]
        attended_T_H_C = paged_attention(
            q_T_H_C,
            k_pages,
            v_pages,
            pages.plan,
            batch.start_S1,
            batch.length_S,
            scale=1.0 / heads.head_width,
            window=group.window,
            rel_T_H_B=rel_T_HB.unflatten(1, (heads.num_heads, config.d_rel)),
            rel_table_B_X=w.rel_table_B_X,
            tau_floor=None if is_local else config.tau_floor,
            tau_alpha=config.tau_alpha,
        )
        return linear(attended_T_H_C.flatten(1), w.out_D_I)

    def _mlp(self, state: ModelState, layer: int, batch: Batch, x_T_D: Tensor) -> Tensor:
        w = self.weights.layers[layer].mlp
        if isinstance(w, DenseWeights):
            hidden_T_F = linear(x_T_D, w.w13_J_D, activation="swiglu")
            return linear(hidden_T_F, w.w2_D_F, scale=self._dense_scale[layer])
        assert isinstance(w, MoeWeights)
        experts = self.config.experts
        return moe_layer(
            x_T_D,
            w.gate_A_D,
            self._experts[layer],
            scoring="sink_sigmoid",
            bias_E=w.bias_E,
            global_scale_1=w.scale_1,
            top_k=experts.top_k,
            scale=experts.route_scale,
        )


def _experts_of(w: MoeWeights) -> MoEWeights:
    """Views of a layer's tensors: nothing is copied, and what is loaded into them later counts."""
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

    def view(w13_E_J_D: Tensor, w2_E_D_F: Tensor, shared: MoEWeights | None) -> MoEWeights:
        return prepare_moe_weights(
            w13_E_J_D,
            w2_E_D_F,
            layout="interleaved",
            precision=precision[w13_E_J_D.dtype],
            shared=shared,
        )

    shared = None
    if w.shared_w13_Z_J_D.shape[0] > 0:
        shared = view(w.shared_w13_Z_J_D, w.shared_w2_Z_D_F, None)
    return view(w.w13_E_J_D, w.w2_E_D_F, shared)


def check_ragged(
    config: ModelConfig, state: ModelState, x_T_D: Tensor, start_S1: Tensor, slot_S: Tensor
) -> None:
    """TypeError or ValueError unless x, start and slot describe an append to this state."""
    dims = Dims(D=config.width)
    device = state.length_N.device
    dims.check(x_T_D=x_T_D, dtype=state.attn_conv_L_N_3_D.dtype, device=device)
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
    for slot in slots:
        if not -1 <= slot < state.num_slots:
            raise ValueError(f"slot_S: {slot} is not -1 or in 0..{state.num_slots - 1}")
        if slot >= 0 and slots.count(slot) > 1:
            raise ValueError(f"slot_S: slot {slot} is given twice")
