"""transformers' Inkling decoder layer, as bench_layer times it beside ours: the same weights.

Its context lies in buffers that are not copied as the context grows, the best of its caches.
Written against transformers 5.17 and 5.24.
"""

# Dimension key: S sessions, I new tokens of each, T = S * I, L tokens of context, N keys in a
# buffer, D model width, G KV heads, C head width, W = G * C, J gate and up rows, Z shared experts.

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tml_runtime.model.config import ModelConfig
from tml_runtime.model.weights import (
    CONV_WIDTH,
    AttentionWeights,
    DenseWeights,
    LayerWeights,
    MoeWeights,
    plain,
)

from .harness import Variant
from .peers import find


class FixedContext:
    """What a decoder layer of transformers asks of its cache. Every call writes the same rows."""

    record_past = False

    def __init__(self, inputs: dict[str, Any], window: int | None) -> None:
        k, v, num_new = inputs["k_S_G_L_C"], inputs["v_S_G_L_C"], inputs["x_S_I_D"].shape[1]
        self.length = k.shape[2]
        self.kept = self.length if window is None else min(self.length, window - 1)
        first = self.length - self.kept
        self.keys, self.values = (F.pad(x[:, :, first:], (0, 0, 0, num_new)) for x in (k, v))
        taps = inputs["kv_taps_S_2_3_W"]
        both = (taps[:, 0], taps[:, 1], inputs["attn_taps_S_3_D"], inputs["mlp_taps_S_3_D"])
        self.conv_states = [x.float().mT.contiguous() for x in both]
        self.layers = [self]

    def get_mask_sizes(self, q_length: int, layer_idx: int) -> tuple[int, int]:
        return self.kept + q_length, self.length - self.kept

    def get_query_offset(self, layer_idx: int) -> int:
        return self.length

    def update(self, k: Tensor, v: Tensor, layer_idx: int, **_: object) -> tuple[Tensor, Tensor]:
        self.keys[:, :, self.kept :] = k
        self.values[:, :, self.kept :] = v
        return self.keys, self.values

    def has_previous_state(self, layer_idx: int, state_idx: int) -> bool:
        return True

    def is_recording_past(self, layer_idx: int) -> bool:  # this and the next: 5.24 asks
        return self.record_past

    def get_conv_state(self, layer_idx: int, state_idx: int) -> Tensor:
        return self.conv_states[state_idx]

    def update_conv_state(self, new: Tensor, layer_idx: int, state_idx: int, **_: object) -> Tensor:
        state = self.conv_states[state_idx]
        full = torch.cat([state, new], dim=-1)
        state.copy_(full[..., -state.shape[-1] :])
        return full


def interleaved_swiglu(y_A_J: Tensor) -> Tensor:
    """Of rows g0, u0, g1, u1, ...: so that the experts are ours and not a second 9 GB."""
    return F.silu(y_A_J[..., 0::2]) * y_A_J[..., 1::2]


def transformers_inkling(attention: str) -> Variant:
    """With its grouped products. It routes in x's dtype: where scores nearly tie it chooses other
    experts, so the result is not compared. attention: its name of an implementation."""
    config_type = find("transformers", "InklingTextConfig")
    layer_type = find("transformers.models.inkling.modeling_inkling", "InklingDecoderLayer")

    def prepare(inputs: dict[str, Any]) -> dict[str, Any]:
        config, x_S_I_D = inputs["config"], inputs["x_S_I_D"]
        theirs = config_type(**config_fields(config))
        theirs._attn_implementation = attention
        theirs._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            module = layer_type(theirs, 0).eval()
        weights: LayerWeights = inputs["weights"].layers[0]
        module.load_state_dict(dict(named(config, weights, x_S_I_D.dtype)), assign=True)
        if isinstance(weights.mlp, MoeWeights):
            module.mlp.experts._apply_gate = interleaved_swiglu
        context = FixedContext(inputs, config.heads(0).window)
        return {
            "module": module.requires_grad_(False),
            "x_S_I_D": x_S_I_D,
            "mask": _mask(context, x_S_I_D, config.heads(0).window),
            "context": context,
        }

    def run(
        module: nn.Module, x_S_I_D: Tensor, mask: Tensor | None, context: FixedContext
    ) -> Tensor:
        # The fourth is past_key_values in 5.17 and cache in 5.24; the third masks convolutions.
        return module(x_S_I_D, mask, None, context).flatten(0, 1)

    return Variant(run, prepare, check=False)


def _mask(context: FixedContext, x_S_I_D: Tensor, window: int | None) -> Tensor | None:
    """[1, 1, I, N] to add to the logits; a single token sees every key there is."""
    num_new = x_S_I_D.shape[1]
    if num_new == 1:
        return None
    num_keys, first = context.get_mask_sizes(num_new, 0)
    query_I = torch.arange(num_new, device=x_S_I_D.device) + context.length
    distance_I_N = query_I[:, None] - torch.arange(num_keys, device=x_S_I_D.device) - first
    hidden_I_N = distance_I_N < 0
    if window is not None:
        hidden_I_N |= distance_I_N >= window
    mask_I_N = x_S_I_D.new_zeros(num_new, num_keys)
    return mask_I_N.masked_fill(hidden_I_N, torch.finfo(x_S_I_D.dtype).min)[None, None]


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """Of InklingTextConfig: all but the vocabulary's."""
    local, far, experts = config.local_heads, config.global_heads, config.experts
    if local.extent != local.window:
        raise NotImplementedError(f"takes a local extent that is the window, not {local.extent}")
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": far.num_heads,
        "num_key_value_heads": far.num_kv_heads,
        "head_dim": far.head_width,
        "swa_num_attention_heads": local.num_heads,
        "swa_num_key_value_heads": local.num_kv_heads,
        "swa_head_dim": local.head_width,
        "sliding_window_size": local.window,
        "d_rel": config.d_rel,
        "rel_extent": far.extent,
        "log_scaling_n_floor": config.tau_floor,
        "log_scaling_alpha": config.tau_alpha,
        "rms_norm_eps": config.norm_eps,
        "conv_kernel_size": CONV_WIDTH,
        "local_layer_ids": [i for i in config.layers if i not in config.global_layers],
        "mlp_layer_types": ["dense" if config.is_dense(i) else "sparse" for i in config.layers],
        "intermediate_size": config.dense_width,
        "moe_intermediate_size": experts.width,
        "n_routed_experts": experts.num_experts,
        "num_experts_per_tok": experts.top_k,
        "n_shared_experts": experts.num_shared,
        "route_scale": experts.route_scale,
        "hidden_act": "silu",
    }


def named(config: ModelConfig, w: LayerWeights, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Its state: norms and scales in the model's dtype, convolutions in float32, as it keeps them;
    matrices of ours, but where gate and up must lie apart."""
    yield from _named_attention(config, w.attention, dtype)
    yield "input_layernorm.weight", w.attn_norm_D.to(dtype)
    yield "post_attention_layernorm.weight", w.mlp_norm_D.to(dtype)
    yield "attn_sconv.conv1d.weight", w.attn_conv_D_4[:, None]
    yield "mlp_sconv.conv1d.weight", w.mlp_conv_D_4[:, None]
    if isinstance(w.mlp, DenseWeights):
        w13_J_D = plain("w13_J_D", w.mlp.w13_J_D)
        yield "mlp.gate_proj.weight", w13_J_D[0::2].contiguous()
        yield "mlp.up_proj.weight", w13_J_D[1::2].contiguous()
        yield "mlp.down_proj.weight", plain("w2_D_F", w.mlp.w2_D_F)
        yield "mlp.global_scale", w.mlp.scale_1.to(dtype)
        return
    yield "mlp.gate.weight", w.mlp.gate_A_D
    yield "mlp.gate.global_scale", w.mlp.scale_1.to(dtype)
    yield "mlp.gate.e_score_correction_bias", w.mlp.bias_E
    experts, shared = w.mlp.experts, w.mlp.experts.shared
    assert shared is not None
    yield "mlp.experts.gate_up_proj", experts.w13.data
    yield "mlp.experts.down_proj", experts.w2.data
    yield "mlp.shared_experts.gate_proj", shared.w13.data[:, 0::2].contiguous()
    yield "mlp.shared_experts.up_proj", shared.w13.data[:, 1::2].contiguous()
    yield "mlp.shared_experts.down_proj", shared.w2.data


def _named_attention(
    config: ModelConfig, w: AttentionWeights, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    heads = config.heads(0)
    query, relative = heads.num_heads * heads.head_width, heads.num_heads * config.d_rel
    rows = [query, heads.kv_width, heads.kv_width, relative]
    for name, part in zip("qkvr", plain("qkvr_J_D", w.qkvr_J_D).split(rows), strict=True):
        yield f"self_attn.{name}_proj.weight", part
    yield "self_attn.o_proj.weight", plain("out_D_I", w.out_D_I)
    yield "self_attn.q_norm.weight", w.q_norm_C.to(dtype)
    yield "self_attn.k_norm.weight", w.k_norm_C.to(dtype)
    yield "self_attn.k_sconv.conv1d.weight", w.k_conv_W_4[:, None]
    yield "self_attn.v_sconv.conv1d.weight", w.v_conv_W_4[:, None]
    yield "self_attn.rel_logits_proj.proj", w.rel_table_B_X
