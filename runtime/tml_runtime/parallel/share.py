"""What one of N ranks holds of a model: rows of its matrices, so that no product's sum is cut.

A rank has some KV heads with their query heads, of every layer; and as many parts of the rows of
each other matrix as there are ranks. Router, norms, convolutions on whole rows, front ends,
embeddings and the speech head are the same on all ranks.
"""

# Dimension key: N ranks, J rows of the fused projection, H query heads, G KV heads, C head width,
# B d_rel, V vocabulary rows, D model width.

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tml_kernels.moe_weights import part_of
from tml_kernels.quant import take_rows

from ..errors import InputValueError
from ..model.config import HeadSpec, ModelConfig
from ..model.weights import AttentionWeights, DenseWeights, LayerWeights, Matrix, ModelWeights


def check_sizes(config: ModelConfig, num_ranks: int) -> None:
    """InputValueError naming the first size of the model that the ranks cannot share evenly, and
    for multi-token-prediction layers, which they do not share at all."""
    if config.mtp_layers:
        raise InputValueError(
            f"mtp_layers={config.mtp_layers} of model {config.name!r}: ranks do not share these; "
            "use replace(config, mtp_layers=())"
        )
    sizes = {
        "local_heads.num_kv_heads": config.local_heads.num_kv_heads,
        "global_heads.num_kv_heads": config.global_heads.num_kv_heads,
        "width": config.width,
        "dense_width": config.dense_width,
        "experts.width": config.experts.width,
        "vocab.size": config.vocab.size,
    }
    for name, size in sizes.items():
        if size % num_ranks:
            raise InputValueError(
                f"{name}={size} of model {config.name!r} is not a multiple of {num_ranks} ranks"
            )


def share_config(config: ModelConfig, num_ranks: int) -> ModelConfig:
    """The configuration as a rank's layers and its cache see it: with its share of the heads."""
    check_sizes(config, num_ranks)
    return replace(
        config,
        local_heads=_share_heads(config.local_heads, num_ranks),
        global_heads=_share_heads(config.global_heads, num_ranks),
    )


def share_layer(
    config: ModelConfig, layer: int, w: LayerWeights, rank: int, num_ranks: int
) -> LayerWeights:
    """A rank's share, copied, of a layer's weights, plain or packed. config: of the whole model.

    Raises ValueError where fp8 rows cannot be shared so; see `take_rows`.
    """
    if isinstance(w.mlp, DenseWeights):
        mlp = replace(
            w.mlp,
            w13_J_D=_part(w.mlp.w13_J_D, rank, num_ranks),
            w2_D_F=_part(w.mlp.w2_D_F, rank, num_ranks),
        )
    else:
        mlp = replace(w.mlp, experts=part_of(w.mlp.experts, rank, num_ranks))
    heads = config.heads(layer)
    attention = _share_attention(heads, config.d_rel, w.attention, rank, num_ranks)
    return replace(w, attention=attention, mlp=mlp)


def share_ends(weights: ModelWeights, rank: int, num_ranks: int) -> ModelWeights:
    """A rank's share of what is before and after the layers."""
    return replace(weights, unembed_V_D=_part(weights.unembed_V_D, rank, num_ranks))


def _share_heads(heads: HeadSpec, num_ranks: int) -> HeadSpec:
    return replace(
        heads,
        num_heads=heads.num_heads // num_ranks,
        num_kv_heads=heads.num_kv_heads // num_ranks,
    )


def _share_attention(
    heads: HeadSpec, d_rel: int, w: AttentionWeights, rank: int, num_ranks: int
) -> AttentionWeights:
    """Queries, keys, values and relative states of the rank's heads, in that order again."""
    device = w.q_norm_C.device
    row_J, begin = [], 0
    for size in (heads.num_heads * heads.head_width, heads.kv_width, heads.kv_width,
                 heads.num_heads * d_rel):  # fmt: skip
        row_J.append(begin + _range(size, rank, num_ranks, device))
        begin += size
    channel_W = _range(heads.kv_width, rank, num_ranks, device)
    return replace(
        w,
        qkvr_J_D=take_rows(w.qkvr_J_D, torch.cat(row_J)),
        out_D_I=_part(w.out_D_I, rank, num_ranks),
        k_conv_W_4=w.k_conv_W_4[channel_W],
        v_conv_W_4=w.v_conv_W_4[channel_W],
    )


def _part(matrix: Matrix, rank: int, num_ranks: int) -> Matrix:
    size = matrix.shape[-2] if isinstance(matrix, Tensor) else matrix.num_rows
    return take_rows(matrix, _range(size, rank, num_ranks, matrix.device))


def _range(size: int, rank: int, num_ranks: int, device: torch.device) -> Tensor:
    share = size // num_ranks
    return torch.arange(rank * share, (rank + 1) * share, device=device)
