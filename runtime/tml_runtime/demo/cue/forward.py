"""The model on whole episodes at once, in plain torch that can be differentiated.

The same weights, in the same containers, as the streaming path and `full_forward`; tests hold it to
the second. Sound, pictures and the speech head are here too, since `full_forward` begins with
embedded tokens and the ops' plain paths write in place.
"""

# Dimension key: N episodes, T tokens, b queries of a block, S keys that one sees, D model width,
# H query heads, G KV heads, C head width, B d_rel or mel bands, X extent, E routed experts,
# K experts chosen, M = N * T, P patches, L frames in a group, Q rows of the speech head,
# W its width.

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tml_kernels.ops.dmel.reference import dmel_embed_ref
from tml_kernels.ops.flow_head import FlowWeights
from tml_kernels.ops.flow_head.reference import EPS, time_wave
from tml_kernels.ops.patch_embed.reference import PatchWeights, divide_frames

from ...model import ModelConfig
from ...model.config import HeadSpec
from ...model.weights import AttentionWeights, DenseWeights, ModelWeights, MoeWeights, plain
from . import steps

BLOCK = 128  # queries whose scores are in a cache together; later keys are not even looked at


class Block(NamedTuple):
    """Of queries. keys: the first that it looks at, and their end; mask: see `_mask`."""

    keys: tuple[int, int]
    mask: Tensor


def hidden_states(
    config: ModelConfig,
    w: ModelWeights,
    x_N_T_D: Tensor,
    dropped_N_T_T: Tensor | None = None,
    loads: list[Tensor] | None = None,
) -> Tensor:
    """Final-norm hidden states [N, T, D]; tokens behind an episode's end change none before it.

    dropped: bool [episode, query, key], the keys that global layers no longer have. loads: gets
    the number of tokens of each expert, int64 [E] per sparse layer.
    """
    assert config.tau_floor is None or x_N_T_D.shape[1] < config.tau_floor
    x = x_N_T_D
    blocks: dict[int | None, list[Block]] = {}
    for layer, lw in enumerate(w.layers):
        heads = config.heads(layer)
        if heads.window not in blocks:
            blocks[heads.window] = _blocks(x.shape[1], heads.window, dropped_N_T_T)
        x, h = steps.RmsNorm.apply(x, lw.attn_norm_D, config.norm_eps)
        h = _attention(config, heads, lw.attention, h, blocks[heads.window])
        x = x + steps.ShortConv.apply(h, lw.attn_conv_D_4)
        x, h = steps.RmsNorm.apply(x, lw.mlp_norm_D, config.norm_eps)
        if isinstance(lw.mlp, DenseWeights):
            gate, up = plain("w13", lw.mlp.w13_J_D).unflatten(0, (-1, 2)).unbind(1)
            h = _swiglu(h, gate, up, plain("w2", lw.mlp.w2_D_F)) * lw.mlp.scale_1
        else:
            h = _experts(config, lw.mlp, h.flatten(0, 1), loads).view_as(h)
        x = x + steps.ShortConv.apply(h, lw.mlp_conv_D_4)
    return rms_norm(x, w.norm_D, config.norm_eps)


def logits(config: ModelConfig, w: ModelWeights, h_M_D: Tensor) -> Tensor:
    """[M, valid tokens]"""
    unembed_V_D = plain("unembed", w.unembed_V_D)[: config.vocab.num_valid]
    return F.linear(h_M_D / config.logits_divisor, unembed_V_D)


def embed_text(config: ModelConfig, w: ModelWeights, ids_M: Tensor) -> Tensor:
    return rms_norm(F.embedding(ids_M, w.embed_V_D), w.embed_norm_D, config.norm_eps)


def embed_levels(config: ModelConfig, w: ModelWeights, levels_M_B: Tensor) -> Tensor:
    return dmel_embed_ref(
        levels_M_B,
        w.audio_table_Y_D,
        w.audio_norm_D,
        num_levels=config.layout.dmel.num_levels,
        eps=config.norm_eps,
        dtype=w.audio_table_Y_D.dtype,
    )


def embed_patches(config: ModelConfig, w: PatchWeights, frames_P_L_Y_X_3: Tensor) -> Tensor:
    """[P, D] of uint8 frame groups of any number of patches."""
    spec, eps = config.patch, config.norm_eps
    x = divide_frames(frames_P_L_Y_X_3, spec, dtype=w.final_norm.dtype)
    num_patches, frames, side, _, depth = x.shape
    for fold, linear, norm in zip(spec.folds, w.linears, w.norms, strict=False):
        side //= fold
        x = x.reshape(num_patches * frames, side, fold, side, fold, depth)
        x = F.linear(x.permute(0, 1, 3, 2, 4, 5).reshape(-1, fold * fold * depth), linear)
        x = F.gelu(rms_norm(x, norm, eps))
        depth = x.shape[-1]
    x = F.linear(x.reshape(num_patches, frames * depth), w.linears[-1])
    return rms_norm(x, w.final_norm, eps)


def velocity(
    w: FlowWeights, cond_Q_D: Tensor, x_Q_B: Tensor, n_Q: Tensor, num_steps: int
) -> Tensor:
    """[Q, B]: the speech head at Euler step n of `num_steps`, unguided."""
    wave_N_W = time_wave(num_steps, w.time_in_W_W.shape[0], x_Q_B.device).to(x_Q_B.dtype)
    time_N_W = F.silu(F.linear(wave_N_W, w.time_in_W_W, w.time_in_bias_W))
    time_N_W = F.linear(time_N_W, w.time_out_W_W, w.time_out_bias_W)
    act_Q_W = F.silu(time_N_W[n_Q] + F.linear(cond_Q_D, w.cond_W_D, w.cond_bias_W))
    h_Q_W = F.linear(x_Q_B, w.input_W_B, w.input_bias_W)
    for i in range(w.mod_L_3_W_W.shape[0]):
        mod = F.linear(act_Q_W, w.mod_L_3_W_W[i].flatten(0, 1), w.mod_bias_L_3_W[i].flatten())
        shift_Q_W, scale_Q_W, gate_Q_W = mod.chunk(3, dim=1)
        y_Q_W = F.layer_norm(h_Q_W, h_Q_W.shape[-1:], eps=EPS) * (1 + scale_Q_W) + shift_Q_W
        y_Q_U = F.silu(F.linear(y_Q_W, w.up_L_U_W[i], w.up_bias_L_U[i]))
        h_Q_W = h_Q_W + gate_Q_W * F.linear(y_Q_U, w.down_L_W_U[i], w.down_bias_L_W[i])
    final = F.linear(act_Q_W, w.final_mod_2_W_W.flatten(0, 1), w.final_mod_bias_2_W.flatten())
    shift_Q_W, scale_Q_W = final.chunk(2, dim=1)
    y_Q_W = F.layer_norm(h_Q_W, h_Q_W.shape[-1:], eps=EPS) * (1 + scale_Q_W) + shift_Q_W
    return F.linear(y_Q_W, w.output_B_W, w.output_bias_B)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return steps.RmsNorm.apply(x, weight, eps)[1]


def _attention(
    config: ModelConfig,
    heads: HeadSpec,
    w: AttentionWeights,
    x_N_T_D: Tensor,
    blocks: Sequence[Block],
) -> Tensor:
    num_heads, num_kv, width = heads.num_heads, heads.num_kv_heads, heads.head_width
    sizes = [num_heads * width, num_kv * width, num_kv * width, num_heads * config.d_rel]
    q, k, v, r = F.linear(x_N_T_D, plain("qkvr", w.qkvr_J_D)).split(sizes, dim=2)
    q = rms_norm(q.unflatten(2, (num_heads, width)), w.q_norm_C, config.norm_eps).transpose(1, 2)
    k = steps.ShortConv.apply(k, w.k_conv_W_4).unflatten(2, (num_kv, width))
    k = rms_norm(k, w.k_norm_C, config.norm_eps).transpose(1, 2)
    v = steps.ShortConv.apply(v, w.v_conv_W_4).unflatten(2, (num_kv, width)).transpose(1, 2)
    r = r.unflatten(2, (num_heads, config.d_rel)).transpose(1, 2)
    spans = [block.keys for block in blocks]
    k, v = (
        steps.Spans.apply(x[:, :, None].expand(-1, -1, num_heads // num_kv, -1, -1), spans)
        for x in (k, v)
    )
    of_blocks = zip((q / width).split(BLOCK, 2), k, v, r.split(BLOCK, 2), blocks, strict=True)
    attended = []
    for q_N_H_b_C, k_N_H_S_C, v_N_H_S_C, r_N_H_b_B, block in of_blocks:
        bias = _by_distance(r_N_H_b_B, w.rel_table_B_X, k_N_H_S_C.shape[2]) + block.mask
        queries, keys = q_N_H_b_C.flatten(0, 1), k_N_H_S_C.flatten(0, 1)
        scores = torch.baddbmm(bias.flatten(0, 1), queries, keys.transpose(1, 2))
        y = scores.softmax(dim=-1) @ v_N_H_S_C.flatten(0, 1)
        attended.append(y.unflatten(0, (-1, num_heads)))
    attended_N_T_I = torch.cat(attended, dim=2).transpose(1, 2).flatten(2)
    return F.linear(attended_N_T_I, plain("out", w.out_D_I))


def _blocks(num_tokens: int, window: int | None, dropped_N_T_T: Tensor | None) -> list[Block]:
    blocks = []
    for begin in range(0, num_tokens, BLOCK):
        end = min(begin + BLOCK, num_tokens)
        first = 0 if window is None else max(0, begin + 1 - window)
        blocks.append(Block((first, end), _mask(begin, end, first, window, dropped_N_T_T)))
    return blocks


def _mask(
    begin: int, end: int, first: int, window: int | None, dropped_N_T_T: Tensor | None
) -> Tensor:
    """0 where a query of begin..end-1 sees a key of first..end-1, -inf where it does not: [b, S],
    or [N, 1, b, S] where keys are dropped."""
    distance_b_S = torch.arange(begin, end)[:, None] - torch.arange(first, end)
    hidden = distance_b_S < 0
    if window is not None:
        hidden = hidden | (distance_b_S >= window)
    elif dropped_N_T_T is not None:
        hidden = hidden | dropped_N_T_T[:, None, begin:end, first:end]
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))


def _by_distance(r_N_H_b_B: Tensor, rel_table_B_X: Tensor, num_keys: int) -> Tensor:
    """[N, H, b, S] biases of the last b of S tokens to all S: the table's of their distance, zero
    beyond its extent. Entries with a key behind its query are of no use."""
    extent = min(num_keys, rel_table_B_X.shape[1])
    bias = r_N_H_b_B @ rel_table_B_X[:, :extent].flip(1)  # distances extent - 1 .. 0
    return steps.ShiftRows.apply(bias, num_keys)


def _experts(
    config: ModelConfig, w: MoeWeights, x_M_D: Tensor, loads: list[Tensor] | None
) -> Tensor:
    spec, experts, shared = config.experts, w.experts, w.experts.shared
    assert shared is not None
    routed_M_E, shared_M_Z = F.linear(x_M_D, w.gate_A_D).split(
        [spec.num_experts, spec.num_shared], dim=1
    )
    score_M_E = (routed_M_E.sigmoid() + w.bias_E).detach()
    # A stable sort keeps the lowest id first among equal scores.
    chosen_M_K = score_M_E.sort(dim=1, descending=True, stable=True).indices[:, : spec.top_k]
    both = torch.cat([routed_M_E.gather(1, chosen_M_K), shared_M_Z], dim=1)
    weight = F.logsigmoid(both).softmax(dim=1) * spec.route_scale * w.scale_1
    if loads is not None:
        loads.append(chosen_M_K.flatten().bincount(minlength=spec.num_experts))
    order = chosen_M_K.flatten().sort(stable=True).indices  # assignments by expert
    token, weight_A_1 = order // spec.top_k, weight[:, : spec.top_k].flatten()[order, None]
    counts = chosen_M_K.flatten().bincount(minlength=spec.num_experts).tolist()
    w2_E_D_F = plain("w2", experts.w2).unbind()
    gates_and_ups = _gates_and_ups(plain("w13", experts.w13))
    of_experts = zip(x_M_D[token].split(counts), *gates_and_ups, w2_E_D_F, strict=True)
    y_A_D = torch.cat([_swiglu(*of_expert) for of_expert in of_experts])
    out_M_D = torch.zeros_like(x_M_D).index_add(0, token, y_A_D * weight_A_1)
    gates_and_ups, w2_Z_D_F = _gates_and_ups(plain("w13", shared.w13)), plain("w2", shared.w2)
    for z, of_shared in enumerate(zip(*gates_and_ups, w2_Z_D_F.unbind(), strict=True)):
        out_M_D = out_M_D + _swiglu(x_M_D, *of_shared) * weight[:, spec.top_k + z, None]
    return out_M_D


def _gates_and_ups(w13_E_J_D: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """[F, D] of each expert, whose rows take turns."""
    gate_E_F_D, up_E_F_D = w13_E_J_D.unflatten(1, (-1, 2)).unbind(2)
    return gate_E_F_D.unbind(), up_E_F_D.unbind()


def _swiglu(x_M_D: Tensor, gate_F_D: Tensor, up_F_D: Tensor, w2_D_F: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x_M_D, gate_F_D)) * F.linear(x_M_D, up_F_D), w2_D_F)
