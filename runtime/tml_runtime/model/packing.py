"""Packing a model's matrices into the precisions that its ops read, one layer at a time.

Routed experts have a precision of their own; all other matrices of the layers, shared experts and
the unembedding share one. Everything else stays as it is: router gates, norms, convolutions,
relative-position tables, embeddings, the audio table, the patch tower, the speech head and the
multi-token-prediction layers.
"""

# Dimension key: E experts, R rows of a matrix, K columns.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tml_kernels.moe import MoEWeights, prepare_moe_weights
from tml_kernels.ops.linear.configs import STEP
from tml_kernels.quant import FORMATS, PackedExperts, pack_matrix
from tml_kernels.quant.fill import FloatSource, pack_experts

from .weights import DenseWeights, LayerWeights, Matrix, ModelWeights, MoeWeights

EXPERTS = tuple(name for name, format in FORMATS.items() if format.packed)
REST = tuple(name for name in EXPERTS if name in STEP)  # what `linear` takes
PIECE = 8  # routed experts that are there in plain form at once while a stack of them is packed


@dataclass(frozen=True)
class Packing:
    """Names of precisions. None: as they are. Raises ValueError for any other, and for a search
    where nothing is int4."""

    experts: str | None = None  # the routed ones
    rest: str | None = None
    search: bool = False  # int4 scales with the least error in each group

    def __post_init__(self) -> None:
        for field, allowed in (("experts", EXPERTS), ("rest", REST)):
            name = getattr(self, field)
            if name is not None and name not in allowed:
                raise ValueError(f"{field}: {name!r} is not None or one of {', '.join(allowed)}")
        if self.search and not (_has_search(self.experts) or _has_search(self.rest)):
            raise ValueError(
                "search: int4 and int4_f16 scales are searched for, and neither experts nor rest "
                f"is one of these: {self.experts!r}, {self.rest!r}"
            )

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
    unembed_V_D = _pack_matrix("unembedding", weights.unembed_V_D, packing.rest, packing.search)
    return replace(weights, unembed_V_D=unembed_V_D)


def pack_layer(
    layer: int, w: LayerWeights, packing: Packing, *, routed: bool = True
) -> LayerWeights:
    """routed: pack the routed experts too; False where they are as they should be."""
    where = f"layer {layer}"

    def pack(part: str, weight: Matrix) -> Matrix:
        return _pack_matrix(f"{where} {part}", weight, packing.rest, packing.search)

    attention = replace(
        w.attention,
        qkvr_J_D=pack("qkvr", w.attention.qkvr_J_D),
        out_D_I=pack("attention output", w.attention.out_D_I),
    )
    if isinstance(w.mlp, DenseWeights):
        mlp: DenseWeights | MoeWeights = replace(
            w.mlp, w13_J_D=pack("w13", w.mlp.w13_J_D), w2_D_F=pack("w2", w.mlp.w2_D_F)
        )
    else:
        experts, shared = w.mlp.experts, w.mlp.experts.shared
        assert shared is not None
        shared = _pack_experts(f"{where} shared experts", shared, packing.rest, packing.search)
        if routed:
            experts = _pack_experts(f"{where} experts", experts, packing.experts, packing.search)
        mlp = replace(w.mlp, experts=replace(experts, shared=shared))
    return replace(w, attention=attention, mlp=mlp)


def pack_stack(
    name: str, weights_E_R_K: Tensor, precision: str, *, search: bool = False
) -> PackedExperts:
    """One matrix of each of some experts, bitwise as `pack_layer` packs it in a longer stack.
    Raises ValueError."""
    search = search and _has_search(precision)
    fmt = FORMATS[precision]
    return pack_experts(FloatSource(name, weights_E_R_K, fmt, False, search), fmt)


def joined(num_experts: int, piece: Callable[[int, int], PackedExperts]) -> PackedExperts:
    """A stack of `piece(begin, end)` for every PIECE experts; each is let go of when it is copied
    into its place."""
    whole: PackedExperts | None = None
    for begin in range(0, num_experts, PIECE):
        end = min(begin + PIECE, num_experts)
        part = piece(begin, end)
        if whole is None:
            whole = replace(part, **{
                name: x.new_empty(num_experts, *x.shape[1:]) for name, x in _tensors(part).items()
            })  # fmt: skip
        for name, stack in _tensors(whole).items():
            stack[begin:end] = getattr(part, name)
        del part  # before the next one is made
    assert whole is not None
    return whole


def _tensors(stack: PackedExperts) -> dict[str, Tensor]:
    return {name: x for name, x in vars(stack).items() if isinstance(x, Tensor)}


def _has_search(precision: str | None) -> bool:
    return precision is not None and precision.startswith("int4")


def _pack_matrix(where: str, weight: Matrix, precision: str | None, search: bool) -> Matrix:
    if precision is None:
        return weight
    if isinstance(weight, PackedExperts):
        raise ValueError(f"{where}: is packed as {weight.format.name} already; pack a plain model")
    try:
        return pack_matrix(weight, precision, search=search and _has_search(precision))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _pack_experts(
    where: str, experts: MoEWeights, precision: str | None, search: bool
) -> MoEWeights:
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
            search=search and _has_search(precision),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
