"""A model's weights: tensors in frozen containers, each under its name in the checkpoint.

Gate and up rows stay interleaved as the checkpoint has them. Queries, keys, values and relative
states are rows of one projection; the checkpoint's four tensors are views of it, so that loading
fills it in place. Convolutions, norms, router biases and scales are float32, everything else has
the model's dtype. Matrices may be packed instead (`packing`): then they have no such names.
"""

# Dimension key: D model width, V vocabulary rows, H query heads, C head width, W = KV heads * C,
# I = H * C, B d_rel, J = I + 2 W + H * B rows of the fused projection (also 2 F, of gate and up),
# X extent, F hidden width, E routed experts, Z shared experts, A = E + Z, Y rows of the dMel table.

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tml_kernels.moe import MoEWeights, prepare_moe_weights
from tml_kernels.ops.flow_head import FlowWeights
from tml_kernels.ops.patch_embed import PatchWeights
from tml_kernels.quant import PackedExperts

from .config import ModelConfig

CONV_WIDTH = 4
EXPERT_ORDER = "interleaved"  # of gate and up rows, in the checkpoint and here
FLOW_INNER = 4  # width of a flow block's MLP, in head widths
FLOW_PREFIX = "model.flow."  # ours: the public checkpoint has no speech head
MTP_PREFIX = "model.mtp."  # multi-token-prediction layers

_ROUTED = "experts."  # before the names of a layer's routed experts
_PLAIN = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

Make = Callable[..., Tensor]
Matrix = Tensor | PackedExperts  # rows of outputs, as `linear` takes them


@dataclass(frozen=True)
class AttentionWeights:
    qkvr_J_D: Matrix
    out_D_I: Matrix
    k_conv_W_4: Tensor
    v_conv_W_4: Tensor
    q_norm_C: Tensor
    k_norm_C: Tensor
    rel_table_B_X: Tensor


@dataclass(frozen=True)
class DenseWeights:
    w13_J_D: Matrix
    w2_D_F: Matrix
    scale_1: Tensor


@dataclass(frozen=True)
class MoeWeights:
    gate_A_D: Tensor
    bias_E: Tensor
    scale_1: Tensor
    experts: MoEWeights  # w13 [E, J, D], w2 [E, D, F], and of the shared ones [Z, J, D], [Z, D, F]


@dataclass(frozen=True)
class LayerWeights:
    attn_norm_D: Tensor
    attention: AttentionWeights
    attn_conv_D_4: Tensor
    mlp_norm_D: Tensor
    mlp: DenseWeights | MoeWeights
    mlp_conv_D_4: Tensor


@dataclass(frozen=True)
class MtpWeights:
    """A multi-token-prediction layer: a dense block on a hidden state and the token after it."""

    hidden_norm_D: Tensor
    embed_norm_D: Tensor
    input_D_DD: Matrix  # of [hidden | embedding]
    block: LayerWeights


@dataclass(frozen=True)
class ModelWeights:
    embed_V_D: Tensor
    embed_norm_D: Tensor
    layers: tuple[LayerWeights, ...]
    norm_D: Tensor
    unembed_V_D: Matrix
    audio_table_Y_D: Tensor
    audio_norm_D: Tensor
    patch: PatchWeights
    flow: FlowWeights
    mtp: tuple[MtpWeights, ...] = ()


class Named(NamedTuple):
    """A tensor of the checkpoint and where it lives: a view of a weight, in the file's shape."""

    name: str
    view: Tensor


def empty_weights(
    config: ModelConfig, *, device: torch.device | str, dtype: torch.dtype
) -> ModelWeights:
    """Weights of the right shapes, not written yet. On device "meta" they take no memory."""
    layers = (empty_layer(config, layer, device=device, dtype=dtype) for layer in config.layers)
    return replace(empty_ends(config, device=device, dtype=dtype), layers=tuple(layers))


def empty_ends(
    config: ModelConfig, *, device: torch.device | str, dtype: torch.dtype
) -> ModelWeights:
    """What is before, after and beside the layers, and none of them."""
    make, make_f32 = _makers(device, dtype)
    vocab, width, dmel = config.vocab, config.width, config.layout.dmel
    return ModelWeights(
        embed_V_D=make(vocab.size, width),
        embed_norm_D=make_f32(width),
        layers=(),
        norm_D=make_f32(width),
        unembed_V_D=make(vocab.size, width),
        audio_table_Y_D=make(dmel.table_rows, width),
        audio_norm_D=make_f32(width),
        patch=PatchWeights(
            linears=tuple(make(*shape) for shape in config.patch.linear_shapes(width)),
            norms=tuple(make_f32(size) for size in config.patch.widths),
            final_norm=make_f32(width),
        ),
        flow=_empty_flow(config, make),
        mtp=tuple(
            MtpWeights(
                hidden_norm_D=make_f32(width),
                embed_norm_D=make_f32(width),
                input_D_DD=make(width, 2 * width),
                block=empty_layer(config.mtp_blocks, layer, device=device, dtype=dtype),
            )
            for layer in range(len(config.mtp_layers))
        ),
    )


def _makers(device: torch.device | str, dtype: torch.dtype) -> tuple[Make, Make]:
    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, device=device, dtype=dtype)

    return make, partial(make, dtype=torch.float32)


def empty_layer(
    config: ModelConfig,
    layer: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    routed: MoEWeights | None = None,
) -> LayerWeights:
    """routed: the layer's routed experts, made already; the shared ones are put beside them."""
    make, make_f32 = _makers(device, dtype)
    width, heads, experts = config.width, config.heads(layer), config.experts
    attention = AttentionWeights(
        qkvr_J_D=make(heads.qkvr_width(config.d_rel), width),
        out_D_I=make(width, heads.num_heads * heads.head_width),
        k_conv_W_4=make_f32(heads.kv_width, CONV_WIDTH),
        v_conv_W_4=make_f32(heads.kv_width, CONV_WIDTH),
        q_norm_C=make_f32(heads.head_width),
        k_norm_C=make_f32(heads.head_width),
        rel_table_B_X=make(config.d_rel, heads.extent),
    )
    if config.is_dense(layer):
        mlp = DenseWeights(
            w13_J_D=make(2 * config.dense_width, width),
            w2_D_F=make(width, config.dense_width),
            scale_1=make_f32(1),
        )
    else:
        if routed is None:
            routed = empty_experts(config, experts.num_experts, device=device, dtype=dtype)
        shared = empty_experts(config, experts.num_shared, device=device, dtype=dtype)
        mlp = MoeWeights(
            gate_A_D=make(experts.num_experts + experts.num_shared, width),
            bias_E=make_f32(experts.num_experts),
            scale_1=make_f32(1),
            experts=replace(routed, shared=shared),
        )
    return LayerWeights(
        attn_norm_D=make_f32(width),
        attention=attention,
        attn_conv_D_4=make_f32(width, CONV_WIDTH),
        mlp_norm_D=make_f32(width),
        mlp=mlp,
        mlp_conv_D_4=make_f32(width, CONV_WIDTH),
    )


def empty_experts(
    config: ModelConfig, num_experts: int, *, device: torch.device | str, dtype: torch.dtype
) -> MoEWeights:
    """Plain ones: the tensors themselves, so that loading fills them in place."""
    w13_J_D, w2_D_F = expert_shapes(config)
    return prepare_moe_weights(
        torch.empty(num_experts, *w13_J_D, device=device, dtype=dtype),
        torch.empty(num_experts, *w2_D_F, device=device, dtype=dtype),
        layout=EXPERT_ORDER,
        precision=_PLAIN[dtype],
    )


def expert_shapes(config: ModelConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of w13 and w2, [J, D] and [D, F]."""
    width, expert_width = config.width, config.experts.width
    return (2 * expert_width, width), (width, expert_width)


def _empty_flow(config: ModelConfig, make: Make) -> FlowWeights:
    width, depth, layout = config.flow.width, config.flow.depth, config.layout
    inner, mel = FLOW_INNER * width, layout.mel_frames_per_step * layout.dmel.num_bands
    return FlowWeights(
        cond_W_D=make(width, config.width),
        cond_bias_W=make(width),
        null_W=make(width),
        time_in_W_W=make(width, width),
        time_in_bias_W=make(width),
        time_out_W_W=make(width, width),
        time_out_bias_W=make(width),
        input_W_B=make(width, mel),
        input_bias_W=make(width),
        mod_L_3_W_W=make(depth, 3, width, width),
        mod_bias_L_3_W=make(depth, 3, width),
        up_L_U_W=make(depth, inner, width),
        up_bias_L_U=make(depth, inner),
        down_L_W_U=make(depth, width, inner),
        down_bias_L_W=make(depth, width),
        final_mod_2_W_W=make(2, width, width),
        final_mod_bias_2_W=make(2, width),
        output_B_W=make(mel, width),
        output_bias_B=make(mel),
    )


def named_tensors(config: ModelConfig, weights: ModelWeights) -> Iterator[Named]:
    """Every tensor of the checkpoint layout, and ours under FLOW_PREFIX, once each. Raises
    ValueError at one that is packed."""
    w = weights
    yield Named("model.llm.embed.weight", w.embed_V_D)
    yield Named("model.llm.embed_norm.weight", w.embed_norm_D)
    for layer, lw in enumerate(w.layers):
        yield from named_layer(config, layer, lw)
    yield Named("model.llm.norm.weight", w.norm_D)
    yield _named_plain("model.llm.unembed.weight", w.unembed_V_D)
    yield Named("model.audio.encoder.weight", w.audio_table_Y_D)
    yield Named("model.audio.final_norm.weight", w.audio_norm_D)
    for i, linear in enumerate(w.patch.linears):
        yield Named(f"model.visual.layers.linear_{i}.weight", linear)
    for i, norm in enumerate(w.patch.norms):
        yield Named(f"model.visual.layers.norm_{i}.weight", norm)
    yield Named("model.visual.final_norm.weight", w.patch.final_norm)
    for layer, mtp in enumerate(w.mtp):
        yield from _named_mtp(config, layer, mtp)
    for field, tensor in w.flow._asdict().items():
        yield Named(FLOW_PREFIX + _without_axes(field), tensor)


def named_layer(
    config: ModelConfig, layer: int, w: LayerWeights, *, routed: bool = True
) -> Iterator[Named]:
    """routed: the routed experts too, which may be packed where it is False."""
    yield from _named_block(config, layer, w, _layer_prefix(layer), routed)


def _named_mtp(config: ModelConfig, layer: int, w: MtpWeights) -> Iterator[Named]:
    prefix = mtp_prefix(layer)
    yield Named(prefix + "hidden_norm.weight", w.hidden_norm_D)
    yield Named(prefix + "embed_norm.weight", w.embed_norm_D)
    yield _named_plain(prefix + "input_proj.weight", w.input_D_DD)
    block = prefix + "transformer_block."
    yield from _named_block(config.mtp_blocks, layer, w.block, block, routed=True)


def _named_block(
    config: ModelConfig, layer: int, w: LayerWeights, prefix: str, routed: bool
) -> Iterator[Named]:
    yield Named(prefix + "attn_norm.weight", w.attn_norm_D)
    yield from _named_attention(config, layer, w.attention, prefix + "attn.")
    yield Named(prefix + "attn_sconv.weight", w.attn_conv_D_4[:, None])
    yield Named(prefix + "mlp_norm.weight", w.mlp_norm_D)
    yield from _named_mlp(w.mlp, prefix + "mlp.", routed)
    yield Named(prefix + "mlp_sconv.weight", w.mlp_conv_D_4[:, None])


def routed_names(layer: int) -> tuple[str, str]:
    """Of a layer's w13 and w2."""
    prefix = f"{_layer_prefix(layer)}mlp.{_ROUTED}"
    return f"{prefix}w13_weight", f"{prefix}w2_weight"


def is_routed(name: str) -> bool:
    return f".mlp.{_ROUTED}" in name


def mtp_prefix(layer: int) -> str:
    """Of the names of a multi-token-prediction layer."""
    return f"{MTP_PREFIX}layers.{layer}."


def _layer_prefix(layer: int) -> str:
    return f"model.llm.layers.{layer}."


def _named_plain(name: str, weight: Matrix) -> Named:
    return Named(name, plain(name, weight))


def plain(name: str, weight: Matrix) -> Tensor:
    """The tensor that holds a matrix, or a stack of them. Raises ValueError where it is packed."""
    if isinstance(weight, Tensor):
        return weight
    if weight.format.packed:
        raise ValueError(
            f"{name}: is packed as {weight.format.name}, and a checkpoint has plain tensors; use "
            "the model that it was packed from"
        )
    return weight.data


def _named_attention(
    config: ModelConfig, layer: int, w: AttentionWeights, prefix: str
) -> Iterator[Named]:
    heads = config.heads(layer)
    query, relative = heads.num_heads * heads.head_width, heads.num_heads * config.d_rel
    rows = [query, heads.kv_width, heads.kv_width, relative]
    names = ("wq_du", "wk_dv", "wv_dv", "wr_du")
    qkvr_J_D = plain(prefix + "w[qkvr]", w.qkvr_J_D)
    for name, view in zip(names, qkvr_J_D.split(rows), strict=True):
        yield Named(f"{prefix}{name}.weight", view)
    yield _named_plain(prefix + "wo_ud.weight", w.out_D_I)
    yield Named(prefix + "q_norm.weight", w.q_norm_C)
    yield Named(prefix + "k_norm.weight", w.k_norm_C)
    yield Named(prefix + "k_sconv.weight", w.k_conv_W_4[:, None])
    yield Named(prefix + "v_sconv.weight", w.v_conv_W_4[:, None])
    yield Named(prefix + "rel_logits_proj.proj", w.rel_table_B_X)


def _named_mlp(w: DenseWeights | MoeWeights, prefix: str, routed: bool) -> Iterator[Named]:
    if isinstance(w, DenseWeights):
        yield _named_plain(prefix + "w13_dn.weight", w.w13_J_D)
        yield _named_plain(prefix + "w2_md.weight", w.w2_D_F)
        yield Named(prefix + "global_scale", w.scale_1)
        return
    yield Named(prefix + "gate.weight", w.gate_A_D)
    yield Named(prefix + "gate.bias", w.bias_E)
    yield Named(prefix + "gate.global_scale", w.scale_1)
    experts, shared = w.experts, w.experts.shared
    assert shared is not None
    if routed:
        yield _named_plain(f"{prefix}{_ROUTED}w13_weight", experts.w13)
        yield _named_plain(f"{prefix}{_ROUTED}w2_weight", experts.w2)
    yield _named_plain(prefix + "shared_experts.shared_w13_weight", shared.w13)
    yield _named_plain(prefix + "shared_experts.shared_w2_weight", shared.w2)


def _without_axes(field: str) -> str:
    """mod_bias_L_3_W -> mod_bias"""
    return "_".join(part for part in field.split("_") if part.islower())
