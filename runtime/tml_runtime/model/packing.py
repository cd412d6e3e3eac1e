"""Packing a model's matrices into the precisions that its ops read, one layer at a time.

Routed experts have a precision of their own; all other matrices of the layers, shared experts and
the unembedding share one. Everything else stays as it is: router gates, norms, convolutions,
relative-position tables, embeddings, the audio table, the patch tower and the speech head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tml_kernels.moe import MoEWeights, prepare_moe_weights
from tml_kernels.ops.linear.configs import STEP
from tml_kernels.quant import FORMATS, PackedExperts, pack_matrix

from .weights import DenseWeights, LayerWeights, Matrix, ModelWeights, MoeWeights

EXPERTS = tuple(name for name, format in FORMATS.items() if format.packed)
REST = tuple(name for name in EXPERTS if name in STEP)  # what `linear` takes


@dataclass(frozen=True)
class Packing:
    """Names of precisions. None: as they are. Raises ValueError for any other."""

    experts: str | None = None  # the routed ones
    rest: str | None = None

    def __post_init__(self) -> None:
        for field, allowed in (("experts", EXPERTS), ("rest", REST)):
            name = getattr(self, field)
            if name is not None and name not in allowed:
                raise ValueError(f"{field}: {name!r} is not None or one of {', '.join(allowed)}")

    def check(self, dtype: torch.dtype) -> None:
        """ValueError where a model of this dtype cannot be packed so."""
        if dtype == torch.float16 and (self.experts or self.rest):
            raise ValueError(
                f"dtype: {dtype} rows are not multiplied with packed weights; use a bfloat16 or "
                "float32 model"
            )


def pack_weights(weights: ModelWeights, packing: Packing) -> ModelWeights:
    """The packed form beside the plain one, which stays as it is. Tensors that are not packed are
    the same ones in both. Raises ValueError for what is packed already, or holds NaN or Inf."""
    packing.check(weights.embed_V_D.dtype)
    layers = (pack_layer(layer, w, packing) for layer, w in enumerate(weights.layers))
    return replace(pack_ends(weights, packing), layers=tuple(layers))


def pack_ends(weights: ModelWeights, packing: Packing) -> ModelWeights:
    """What is before and after the layers, which stay as they are."""
    unembed_V_D = _pack_matrix("unembedding", weights.unembed_V_D, packing.rest)
    return replace(weights, unembed_V_D=unembed_V_D)


def pack_layer(layer: int, w: LayerWeights, packing: Packing) -> LayerWeights:
    where, rest = f"layer {layer}", packing.rest
    attention = replace(
        w.attention,
        qkvr_J_D=_pack_matrix(f"{where} qkvr", w.attention.qkvr_J_D, rest),
        out_D_I=_pack_matrix(f"{where} attention output", w.attention.out_D_I, rest),
    )
    if isinstance(w.mlp, DenseWeights):
        mlp: DenseWeights | MoeWeights = replace(
            w.mlp,
            w13_J_D=_pack_matrix(f"{where} w13", w.mlp.w13_J_D, rest),
            w2_D_F=_pack_matrix(f"{where} w2", w.mlp.w2_D_F, rest),
        )
    else:
        routed, shared = w.mlp.experts, w.mlp.experts.shared
        assert shared is not None
        shared = _pack_experts(f"{where} shared experts", shared, rest)
        routed = _pack_experts(f"{where} experts", routed, packing.experts)
        mlp = replace(w.mlp, experts=replace(routed, shared=shared))
    return replace(w, attention=attention, mlp=mlp)


def _pack_matrix(where: str, weight: Matrix, precision: str | None) -> Matrix:
    if precision is None:
        return weight
    if isinstance(weight, PackedExperts):
        raise ValueError(f"{where}: is packed as {weight.format.name} already; pack a plain model")
    try:
        return pack_matrix(weight, precision)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _pack_experts(where: str, experts: MoEWeights, precision: str | None) -> MoEWeights:
    """Without their shared ones. Nothing of the result lies in the storage of the plain ones, which
    would stay allocated with it."""
    if precision is None:
        return experts
    found = experts.w13.format
    if found.packed:
        raise ValueError(f"{where}: are packed as {found.name} already; pack a plain model")
    try:
        return prepare_moe_weights(
            experts.w13.data,
            experts.w2.data,
            layout=experts.order,
            precision=precision,
            inplace=False,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
