"""The second path: one whole sequence at once, dense, in plain torch and without the ops.

Shares nothing with the streaming path but the weights, so that each checks the other. Packed ones
are taken at their exact values.
"""

# Dimension key: T tokens, D model width, H query heads, G KV heads, C head width, B d_rel,
# X extent, V vocabulary, E routed experts, Z shared experts, A = E + Z.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tml_kernels.quant import PackedExperts, dequantize

from .config import HeadSpec, ModelConfig
from .weights import (
    AttentionWeights,
    DenseWeights,
    LayerWeights,
    Matrix,
    ModelWeights,
    MoeWeights,
)


def full_forward(
    config: ModelConfig,
    weights: ModelWeights,
    x_T_D: Tensor,
    *,
    dropped_T_T: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Logits [T, V] in `dtype` of one sequence of embedded tokens, from its first token.

    Allocates the whole [H, T, T] attention. dropped: bool [query, key], the keys that global layers
    have dropped before a query came; none by default.
    """
    h_T_D = full_hidden(config, weights, x_T_D.to(dtype), dropped_T_T)
    return full_logits(config, weights, h_T_D)


def full_hidden(
    config: ModelConfig,
    weights: ModelWeights,
    x_T_D: Tensor,
    dropped_T_T: Tensor | None = None,
) -> Tensor:
    """Final-norm hidden states [T, D], in x's dtype."""
    for layer, w in enumerate(weights.layers):
        x_T_D = full_attention(config, layer, w, x_T_D, dropped_T_T)
        x_T_D = full_mlp(config, w, x_T_D)
    return _rms_norm(x_T_D, weights.norm_D, config.norm_eps)


def full_logits(config: ModelConfig, weights: ModelWeights, h_T_D: Tensor) -> Tensor:
    """[T, V] in h's dtype, of final-norm hidden states or of a multi-token-prediction layer's."""
    logits_T_V = F.linear(h_T_D / config.logits_divisor, _plain(weights.unembed_V_D, h_T_D.dtype))
    logits_T_V[:, config.vocab.num_valid :] = float("-inf")
    return logits_T_V


def full_mtp(
    config: ModelConfig,
    weights: ModelWeights,
    layer: int,
    h_T_D: Tensor,
    x_T_D: Tensor,
    begin: int | None = None,
) -> Tensor:
    """Hidden states [T, D] of a multi-token-prediction layer, in h's dtype.

    h: the final-norm hidden states of tokens 0..T - 1, or of a later layer what the one before made
    of them. x: the embedded tokens layer + 1.. of the same sequence, as the backbone takes them.
    Row t is what says, through `full_logits`, the token after x's, and has the position of x's.
    begin: that of the first of x, where it is not layer + 1.
    """
    w, blocks = weights.mtp[layer], config.mtp_blocks
    both_T_DD = torch.cat(
        [
            _rms_norm(h_T_D, w.hidden_norm_D, config.norm_eps),
            _rms_norm(x_T_D.to(h_T_D.dtype), w.embed_norm_D, config.norm_eps),
        ],
        dim=1,
    )
    y_T_D = F.linear(both_T_DD, _plain(w.input_D_DD, h_T_D.dtype))
    begin = layer + 1 if begin is None else begin
    y_T_D = full_attention(blocks, layer, w.block, y_T_D, begin=begin)
    return full_mlp(blocks, w.block, y_T_D)


def full_attention(
    config: ModelConfig,
    layer: int,
    w: LayerWeights,
    x_T_D: Tensor,
    dropped_T_T: Tensor | None = None,
    begin: int = 0,
) -> Tensor:
    """The residual stream [T, D] after a layer's first half, in x's dtype. begin: the position of
    the first token."""
    h_T_D = _rms_norm(x_T_D, w.attn_norm_D, config.norm_eps)
    h_T_D = _attention(config, config.heads(layer), w.attention, h_T_D, dropped_T_T, begin)
    return x_T_D + _short_conv(h_T_D, w.attn_conv_D_4)


def full_mlp(config: ModelConfig, w: LayerWeights, x_T_D: Tensor) -> Tensor:
    """The residual stream [T, D] after a layer's second half."""
    h_T_D = _rms_norm(x_T_D, w.mlp_norm_D, config.norm_eps)
    if isinstance(w.mlp, DenseWeights):
        h_T_D = _swiglu(h_T_D, w.mlp.w13_J_D, w.mlp.w2_D_F) * w.mlp.scale_1.to(x_T_D.dtype)
    else:
        h_T_D = _experts(config, w.mlp, h_T_D)
    return x_T_D + _short_conv(h_T_D, w.mlp_conv_D_4)


def expert_scores(config: ModelConfig, w: LayerWeights, x_T_D: Tensor) -> Tensor:
    """[T, E]: by what a sparse layer's second half chooses experts for the stream it is given."""
    assert isinstance(w.mlp, MoeWeights)
    h_T_D = _rms_norm(x_T_D, w.mlp_norm_D, config.norm_eps)
    return _route(config, w.mlp, h_T_D)[0]


def _attention(
    config: ModelConfig,
    heads: HeadSpec,
    w: AttentionWeights,
    x_T_D: Tensor,
    dropped_T_T: Tensor | None,
    begin: int,
) -> Tensor:
    num_tokens, dtype = x_T_D.shape[0], x_T_D.dtype
    num_heads, num_kv, width = heads.num_heads, heads.num_kv_heads, heads.head_width
    sizes = [num_heads * width, num_kv * width, num_kv * width, num_heads * config.d_rel]
    q, k, v, r = F.linear(x_T_D, _plain(w.qkvr_J_D, dtype)).split(sizes, dim=1)
    q = _rms_norm(q.unflatten(1, (num_heads, width)), w.q_norm_C, config.norm_eps)
    k = _short_conv(k, w.k_conv_W_4).unflatten(1, (num_kv, width))
    k = _rms_norm(k, w.k_norm_C, config.norm_eps)
    v = _short_conv(v, w.v_conv_W_4).unflatten(1, (num_kv, width))
    k = k.repeat_interleave(num_heads // num_kv, dim=1)
    v = v.repeat_interleave(num_heads // num_kv, dim=1)

    position_T = torch.arange(begin, begin + num_tokens, device=x_T_D.device)
    distance_T_T = position_T[:, None] - position_T
    bias_H_T_X = torch.einsum(
        "thb,bx->htx", r.unflatten(1, (num_heads, config.d_rel)), w.rel_table_B_X.to(dtype)
    )
    index = distance_T_T.clamp(0, heads.extent - 1).expand(num_heads, -1, -1)
    bias_H_T_T = bias_H_T_X.gather(2, index)
    bias_H_T_T = bias_H_T_T.masked_fill(distance_T_T >= heads.extent, 0.0)

    logits_H_T_T = torch.einsum("thc,uhc->htu", q, k) / width + bias_H_T_T
    is_global = heads.window is None
    if is_global and config.tau_floor is not None:
        growth_T = ((position_T + 1).to(dtype) / config.tau_floor).clamp(min=1.0).log()
        logits_H_T_T = logits_H_T_T * (1.0 + config.tau_alpha * growth_T)[:, None]
    hidden_T_T = distance_T_T < 0
    if heads.window is not None:
        hidden_T_T = hidden_T_T | (distance_T_T >= heads.window)
    elif dropped_T_T is not None:
        hidden_T_T = hidden_T_T | dropped_T_T
    weight_H_T_T = logits_H_T_T.masked_fill(hidden_T_T, float("-inf")).softmax(dim=-1)
    attended = torch.einsum("htu,uhc->thc", weight_H_T_T, v).flatten(1)
    return F.linear(attended, _plain(w.out_D_I, dtype))


def _experts(config: ModelConfig, w: MoeWeights, x_T_D: Tensor) -> Tensor:
    spec, dtype = config.experts, x_T_D.dtype
    score_T_E, routed_T_E, shared_T_Z = _route(config, w, x_T_D)
    # A stable sort keeps the lowest id first among equal scores.
    chosen_T_K = score_T_E.sort(dim=1, descending=True, stable=True).indices[:, : spec.top_k]
    both = torch.cat([routed_T_E.gather(1, chosen_T_K), shared_T_Z], dim=1)
    weight = F.logsigmoid(both).softmax(dim=1) * spec.route_scale * w.scale_1.to(dtype)

    out_T_D = torch.zeros_like(x_T_D)
    for expert in chosen_T_K.unique().tolist():
        t, k = torch.where(chosen_T_K == expert)
        y = _swiglu(x_T_D[t], *w.experts.dequantize(expert))
        out_T_D.index_add_(0, t, y * weight[t, k, None])
    shared = w.experts.shared
    assert shared is not None
    for z in range(spec.num_shared):
        y_T_D = _swiglu(x_T_D, *shared.dequantize(z))
        out_T_D += y_T_D * weight[:, spec.top_k + z, None]
    return out_T_D


def _route(config: ModelConfig, w: MoeWeights, x_T_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(score [T, E], logits [T, E], logits of the shared experts [T, Z])"""
    spec, dtype = config.experts, x_T_D.dtype
    logits_T_A = F.linear(x_T_D, w.gate_A_D.to(dtype))
    routed_T_E, shared_T_Z = logits_T_A.split([spec.num_experts, spec.num_shared], dim=1)
    return routed_T_E.sigmoid() + w.bias_E.to(dtype), routed_T_E, shared_T_Z


def _swiglu(x_T_D: Tensor, w13_J_D: Matrix, w2_D_F: Matrix) -> Tensor:
    gate_up = F.linear(x_T_D, _plain(w13_J_D, x_T_D.dtype))
    return F.linear(F.silu(gate_up[:, 0::2]) * gate_up[:, 1::2], _plain(w2_D_F, x_T_D.dtype))


def _plain(weight: Matrix, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, PackedExperts):
        weight = dequantize(weight, 0)
    return weight.to(dtype)


def _short_conv(x_T_W: Tensor, weight_W_4: Tensor) -> Tensor:
    """x + a depthwise causal convolution of four taps, the last of them the current token's."""
    num_taps = weight_W_4.shape[1]
    padded = F.pad(x_T_W.T[None], (num_taps - 1, 0))
    y = F.conv1d(padded, weight_W_4.to(x_T_W.dtype)[:, None], groups=x_T_W.shape[1])
    return x_T_W + y[0].T


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
