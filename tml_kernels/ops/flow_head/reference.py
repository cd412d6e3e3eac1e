"""The oracle of flow_head, and its plain path: the same lines in float64 and in float32."""

# Dimension key: S session rows, D model width, W head width, U inner width of a block's MLP,
# L blocks, B output values (mel bins), N Euler steps, Q rows evaluated together: S, or 2 S when
# guided (conditioned rows, then unconditioned ones).

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from ..._philox import FLOW_STREAM, normal
from ..._plain import row_blocked_matmul
from ..._pointwise import silu

TIME_SCALE = 1000.0  # the sinusoids see 0..1000 for t in 0..1
TIME_BASE = 10000.0
EPS = 1e-6


class FlowWeights(NamedTuple):
    """Weights of the velocity network, [out, in] throughout.

    mod_L_3_W_W gives a block's shift, scale and gate, final_mod_2_W_W the last layer's shift and
    scale; null_W is the learned condition of the unconditioned evaluation, in place of the
    projected hidden state.
    """

    cond_W_D: Tensor
    cond_bias_W: Tensor
    null_W: Tensor
    time_in_W_W: Tensor
    time_in_bias_W: Tensor
    time_out_W_W: Tensor
    time_out_bias_W: Tensor
    input_W_B: Tensor
    input_bias_W: Tensor
    mod_L_3_W_W: Tensor
    mod_bias_L_3_W: Tensor
    up_L_U_W: Tensor
    up_bias_L_U: Tensor
    down_L_W_U: Tensor
    down_bias_L_W: Tensor
    final_mod_2_W_W: Tensor
    final_mod_bias_2_W: Tensor
    output_B_W: Tensor
    output_bias_B: Tensor


def flow_head_ref(
    cond_S_D: Tensor,
    weights: FlowWeights,
    seed_S: Tensor,
    counter_S: Tensor,
    *,
    num_steps: int,
    guidance: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """mel_S_B in `dtype`: x_0 = noise(seed, counter); x += v(x, n / N, c) / N for n = 0..N-1.

    Guided (guidance g != 1): v = v_null + g (v_cond - v_null).
    """
    w = FlowWeights(*(tensor.to(dtype) for tensor in weights))
    num_rows, guided = cond_S_D.shape[0], guidance != 1.0
    cond_Q_W = _linear(cond_S_D.to(dtype), w.cond_W_D, w.cond_bias_W)
    if guided:
        cond_Q_W = torch.cat([cond_Q_W, w.null_W.expand(num_rows, -1)])
    mod_N_Q_L_3_W, final_N_Q_2_W = _modulation(cond_Q_W, w, num_steps)

    x_S_B = normal(seed_S, counter_S, w.output_B_W.shape[0], FLOW_STREAM, dtype)
    for n in range(num_steps):
        h_Q_W = _linear(x_S_B, w.input_W_B, w.input_bias_W)
        if guided:
            h_Q_W = torch.cat([h_Q_W, h_Q_W])
        v_Q_B = _velocity(h_Q_W, mod_N_Q_L_3_W[n], final_N_Q_2_W[n], w)
        v_S_B = v_Q_B[:num_rows]
        if guided:
            null_S_B = v_Q_B[num_rows:]
            v_S_B = null_S_B + guidance * (v_S_B - null_S_B)
        x_S_B = x_S_B + v_S_B / num_steps
    return x_S_B


def _linear(x_S_D: Tensor, weight_W_D: Tensor, bias_W: Tensor) -> Tensor:
    return row_blocked_matmul(x_S_D, weight_W_D) + bias_W


def _modulation(cond_Q_W: Tensor, w: FlowWeights, num_steps: int) -> tuple[Tensor, Tensor]:
    """(mod_N_Q_L_3_W, final_N_Q_2_W) of all steps at once: they do not depend on x."""
    time_N_W = _time_embedding(num_steps, w)
    num_rows, width = cond_Q_W.shape
    act_NQ_W = silu(time_N_W[:, None] + cond_Q_W).flatten(0, 1)
    mod = _linear(act_NQ_W, w.mod_L_3_W_W.view(-1, width), w.mod_bias_L_3_W.view(-1))
    final = _linear(act_NQ_W, w.final_mod_2_W_W.view(-1, width), w.final_mod_bias_2_W.view(-1))
    mod_N_Q_L_3_W = mod.view(num_steps, num_rows, *w.mod_bias_L_3_W.shape)
    return mod_N_Q_L_3_W, final.view(num_steps, num_rows, 2, width)


def time_wave(num_steps: int, width: int, device: torch.device) -> Tensor:
    """wave_N_W, float64: cos then sin of TIME_SCALE * n / N at W / 2 frequencies."""
    half = width // 2
    index = torch.arange(half, device=device, dtype=torch.float64)
    t_N = torch.arange(num_steps, device=device, dtype=torch.float64) / num_steps
    angle = TIME_SCALE * t_N[:, None] * torch.exp(index * (-math.log(TIME_BASE) / half))
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def _time_embedding(num_steps: int, w: FlowWeights) -> Tensor:
    """time_N_W: the sinusoids through a SiLU MLP."""
    like = w.time_in_W_W
    wave_N_W = time_wave(num_steps, like.shape[0], like.device).to(like.dtype)
    h_N_W = silu(_linear(wave_N_W, w.time_in_W_W, w.time_in_bias_W))
    return _linear(h_N_W, w.time_out_W_W, w.time_out_bias_W)


def _velocity(h_Q_W: Tensor, mod_Q_L_3_W: Tensor, final_Q_2_W: Tensor, w: FlowWeights) -> Tensor:
    """v_Q_B from the projected input. Block: h += gate * MLP(LN(h) (1 + scale) + shift)."""
    for i in range(mod_Q_L_3_W.shape[1]):
        shift_Q_W, scale_Q_W, gate_Q_W = mod_Q_L_3_W[:, i].unbind(1)
        y_Q_W = _norm(h_Q_W) * (1.0 + scale_Q_W) + shift_Q_W
        y_Q_U = silu(_linear(y_Q_W, w.up_L_U_W[i], w.up_bias_L_U[i]))
        h_Q_W = h_Q_W + gate_Q_W * _linear(y_Q_U, w.down_L_W_U[i], w.down_bias_L_W[i])
    shift_Q_W, scale_Q_W = final_Q_2_W.unbind(1)
    return _linear(_norm(h_Q_W) * (1.0 + scale_Q_W) + shift_Q_W, w.output_B_W, w.output_bias_B)


def _norm(h_Q_W: Tensor) -> Tensor:
    return layer_norm(h_Q_W, h_Q_W.shape[-1:], eps=EPS)
