"""The oracle of expert_mlp, and its plain path: the same lines in float64 and in float32."""

# Dimension key: T tokens, D model width, E routed experts, Z shared experts, F expert width,
# J = 2 F gate and up rows, K experts chosen per token, A = T * K assignments, S = K + Z slots of a
# token, N tokens of one expert.

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..._plain import row_blocked_matmul
from ..._pointwise import silu
from ...moe_weights import MoEWeights
from ...quant import dequantize

OAI_LIMIT, OAI_ALPHA = 7.0, 1.702


def fused_moe_ref(
    x_T_D: Tensor,
    weights: MoEWeights,
    expert_T_K: Tensor,
    weight_T_K: Tensor,
    shared_weight_T_Z: Tensor | None = None,
    *,
    inv_rms_T: Tensor | None = None,
    activation: str = "silu",
    quantize_x: bool = False,
    expert_map_G: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """out_T_D in `dtype`: sum over k of weight[t, k] * mlp(expert[t, k], x[t]), then the shared.

    mlp(e, x) = w2[e] act(w13[e] x + b13[e]) + b2[e], with the dequantised weights; x[t] is first
    multiplied by inv_rms[t] where that is given. Only experts with a token are read; ids outside
    0..E-1 contribute nothing, whatever their weight holds.
    """
    h_T_S_F = expert_hidden_ref(
        x_T_D,
        weights,
        expert_T_K,
        inv_rms_T=inv_rms_T,
        activation=activation,
        quantize_x=quantize_x,
        expert_map_G=expert_map_G,
        dtype=dtype,
    )
    return expert_sum_ref(
        h_T_S_F,
        weights,
        expert_T_K,
        weight_T_K,
        shared_weight_T_Z,
        quantize_x=quantize_x,
        expert_map_G=expert_map_G,
    )


def expert_hidden_ref(
    x_T_D: Tensor,
    weights: MoEWeights,
    expert_T_K: Tensor,
    *,
    inv_rms_T: Tensor | None = None,
    activation: str = "silu",
    quantize_x: bool = False,
    expert_map_G: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """h_T_S_F in `dtype`: act(w13[e] x + b13[e]) of a token's chosen experts, then of the shared
    ones, x multiplied by inv_rms where that is given. Zeros where an id is skipped, and past the
    width of the narrower kind of experts."""
    num_tokens, top_k = expert_T_K.shape
    num_experts, shared = weights.num_experts, weights.shared
    expert_A = local_experts(expert_T_K.reshape(-1), num_experts, expert_map_G)
    x_T_D = x_T_D.to(dtype)
    if inv_rms_T is not None:
        x_T_D = x_T_D * inv_rms_T.to(dtype)[:, None]
    x_T_D = round_to_fp8(x_T_D) if quantize_x else x_T_D
    widest = max(side.w13.num_rows // 2 for side in (weights, shared or weights))
    h_T_S_F = x_T_D.new_zeros(num_tokens, top_k + weights.num_shared, widest)
    for expert, token_N, slot_N in _by_expert(expert_A, num_experts, top_k):
        h_N_F = _hidden(x_T_D[token_N], weights, expert, activation)
        h_T_S_F[token_N, slot_N, : h_N_F.shape[1]] = h_N_F
    for z in range(weights.num_shared):
        assert shared is not None
        h_T_F = _hidden(x_T_D, shared, z, activation)
        h_T_S_F[:, top_k + z, : h_T_F.shape[1]] = h_T_F
    return h_T_S_F


def expert_sum_ref(
    h_T_S_F: Tensor,
    weights: MoEWeights,
    expert_T_K: Tensor,
    weight_T_K: Tensor,
    shared_weight_T_Z: Tensor | None = None,
    *,
    quantize_x: bool = False,
    expert_map_G: Tensor | None = None,
) -> Tensor:
    """out_T_D in h's dtype: the sum of weight * (w2[e] h + b2[e]) over a token's slots in order."""
    num_tokens, top_k = expert_T_K.shape
    num_experts, dtype = weights.num_experts, h_T_S_F.dtype
    expert_A = local_experts(expert_T_K.reshape(-1), num_experts, expert_map_G)
    out_T_D = h_T_S_F.new_zeros(num_tokens, weights.w2.num_rows)
    y_T_K_D = h_T_S_F.new_zeros(num_tokens, top_k, weights.w2.num_rows)
    for expert, token_N, slot_N in _by_expert(expert_A, num_experts, top_k):
        y_T_K_D[token_N, slot_N] = _down(h_T_S_F[token_N, slot_N], weights, expert, quantize_x)
    # A skipped assignment adds an exact zero, even when its weight is NaN.
    skipped_T_K = (expert_A == num_experts).view(num_tokens, top_k)
    y_T_K_D *= weight_T_K.to(dtype).masked_fill(skipped_T_K, 0.0)[:, :, None]
    for k in range(top_k):
        out_T_D += y_T_K_D[:, k]
    for z in range(weights.num_shared):
        assert weights.shared is not None and shared_weight_T_Z is not None
        y_T_D = _down(h_T_S_F[:, top_k + z], weights.shared, z, quantize_x)
        out_T_D += y_T_D * shared_weight_T_Z[:, z : z + 1].to(dtype)
    return out_T_D


def _by_expert(
    expert_A: Tensor, num_experts: int, top_k: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens, their slots) of every expert that has any; skipped ids are nobody's."""
    order_A = torch.argsort(expert_A, stable=True)
    *counts, _ = torch.bincount(expert_A, minlength=num_experts + 1).tolist()
    begin = 0
    for expert, count in enumerate(counts):
        if count > 0:
            a_N = order_A[begin : begin + count]
            yield expert, a_N // top_k, a_N % top_k
            begin += count


def local_experts(expert_A: Tensor, num_experts: int, expert_map_G: Tensor | None) -> Tensor:
    """int64 rows of the weights; num_experts where an id is skipped. With a map of G global ids,
    map[id] is the row, -1 for an expert that is elsewhere."""
    expert_A = expert_A.long()
    if expert_map_G is not None:
        outside_A = (expert_A < 0) | (expert_A >= expert_map_G.shape[0])
        expert_A = expert_map_G.long()[expert_A.masked_fill(outside_A, 0)]
        expert_A = expert_A.masked_fill(outside_A, num_experts)
    outside_A = (expert_A < 0) | (expert_A >= num_experts)
    return expert_A.masked_fill(outside_A, num_experts)


def _hidden(x_T_D: Tensor, weights: MoEWeights, expert: int, activation: str) -> Tensor:
    w13_J_D = dequantize(weights.w13, expert).to(x_T_D.dtype)
    y_T_J = row_blocked_matmul(x_T_D, w13_J_D)
    if weights.bias13_E_J is not None:
        y_T_J = y_T_J + weights.bias13_E_J[expert].to(x_T_D.dtype)
    return activate(*split_gate_up(y_T_J, weights.order), activation)


def _down(h_T_F: Tensor, weights: MoEWeights, expert: int, quantize_x: bool) -> Tensor:
    h_T_F = h_T_F[:, : weights.expert_width].contiguous()
    h_T_F = round_to_fp8(h_T_F) if quantize_x else h_T_F
    w2_D_F = dequantize(weights.w2, expert).to(h_T_F.dtype)
    y_T_D = row_blocked_matmul(h_T_F, w2_D_F)
    if weights.bias2_E_D is not None:
        y_T_D = y_T_D + weights.bias2_E_D[expert].to(h_T_F.dtype)
    return y_T_D


def round_to_fp8(x_T_D: Tensor) -> Tensor:
    """To e4m3 and back, with the scale amax / 448 of every token and 128 columns."""
    num_tokens, width = x_T_D.shape
    x_T_B_128 = torch.nn.functional.pad(x_T_D, (0, -width % 128)).view(num_tokens, -1, 128)
    scale_T_B_1 = x_T_B_128.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448.0
    rounded = (x_T_B_128 / scale_T_B_1).float().to(torch.float8_e4m3fn).to(x_T_D.dtype)
    return (rounded * scale_T_B_1).view(num_tokens, -1)[:, :width].contiguous()


def split_gate_up(y_T_J: Tensor, order: str) -> tuple[Tensor, Tensor]:
    """(gate, up) of rows in the order of w13's."""
    if order == "interleaved":
        return y_T_J[:, 0::2], y_T_J[:, 1::2]
    first, second = y_T_J.chunk(2, dim=1)
    return (first, second) if order == "gate_up" else (second, first)


def activate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Of the element alone, bit for bit: exp is, torch's own sigmoid and gelu are not."""
    if activation == "silu":
        return silu(gate) * up
    if activation == "gelu":
        return 0.5 * gate * (1.0 + torch.erf(gate * math.sqrt(0.5))) * up
    if activation == "gelu_tanh":
        inner = math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + torch.exp(-2.0 * inner)) * up
    assert activation == "swiglu_oai", activation
    gate, up = gate.clamp(max=OAI_LIMIT), up.clamp(-OAI_LIMIT, OAI_LIMIT)
    return (up + 1.0) * gate / (1.0 + torch.exp(-OAI_ALPHA * gate))
