"""Bytes that a model and its sessions take on a GPU, by part, from shapes alone: no weight and no
page is allocated for it."""

# Dimension key: E experts, R rows of a matrix, K its columns, T tokens, S session rows.

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tml_kernels._routing import Routing, Schedule, choose_blocking, new_scratch
from tml_kernels.kv_cache import CacheGroup
from tml_kernels.kv_cache.slot_state import NUM_SNAPSHOTS
from tml_kernels.ops.linear import configs as linear_configs
from tml_kernels.ops.paged_attention import configs as attention_configs
from tml_kernels.ops.sample import configs as sample_configs
from tml_kernels.quant import FORMATS
from tml_kernels.quant.packed import packed_bytes

from .graph import MARGIN, buckets_of
from .model import KvBudget, ModelConfig
from .model.buffers import Bucket, TickShape, size_of
from .model.packing import Packing
from .model.parts import cache_groups, slot_tensors
from .model.weights import (
    DenseWeights,
    LayerWeights,
    Matrix,
    MtpWeights,
    empty_ends,
    empty_layer,
)

META = torch.device("meta")
DTYPE = torch.bfloat16  # of a model on a GPU

# Allowances, which nobody has measured yet.
CONTEXT = 1 << 30  # driver, CUDA context, and code of the kernels
GRAPH = 8 << 20  # of one captured graph: its nodes and their arguments


@dataclass(frozen=True)
class WeightBytes:
    """What kernels read: `PackedExperts.nbytes` of matrices, scales and padding included."""

    routed_experts: int
    shared_experts: int
    attention: int
    dense_layers: int
    embeddings: int
    unembedding: int
    norms_convs_router: int
    front_ends: int
    flow_head: int
    mtp_layers: int


@dataclass(frozen=True)
class StateBytes:
    """Of all sessions. taps: of the convolutions, and whatever else a slot holds beside its pages.
    buffers: both that a tick is sent and answered in. scratch: of kernels, from call to call."""

    local_rings: int
    global_pages: int
    page_lists: int
    taps: int
    snapshots: int
    buffers: int
    scratch: int


@dataclass(frozen=True)
class AllowanceBytes:
    """Guesses. activations: of the largest bucket. margin: what `global_pages="auto"` leaves to
    other libraries and to fragmentation."""

    activations: int
    graphs: int
    context: int
    margin: int


def total(part: WeightBytes | StateBytes | AllowanceBytes) -> int:
    return sum(vars(part).values())


@lru_cache(maxsize=64)
def weight_bytes(config: ModelConfig, packing: Packing, dtype: torch.dtype = DTYPE) -> WeightBytes:
    """As `InteractionModel.random` and `load` make them."""
    ends = empty_ends(config, device=META, dtype=dtype)
    sums = Counter(
        embeddings=ends.embed_V_D.nbytes,
        unembedding=_bytes(ends.unembed_V_D, packing.rest),
        norms_convs_router=ends.embed_norm_D.nbytes + ends.norm_D.nbytes,
        front_ends=_bytes_of(
            ends.audio_table_Y_D, ends.audio_norm_D, *ends.patch.linears, *ends.patch.norms,
            ends.patch.final_norm,
        ),
        flow_head=_bytes_of(*ends.flow),
        mtp_layers=sum(_mtp_bytes(w) for w in ends.mtp),
        shared_experts=0, routed_experts=0, dense_layers=0,
    )  # fmt: skip
    kinds = Counter((config.heads(n), config.is_dense(n)) for n in config.layers)
    first = {(config.heads(n), config.is_dense(n)): n for n in config.layers}
    for kind, count in kinds.items():
        layer = _layer_bytes(empty_layer(config, first[kind], device=META, dtype=dtype), packing)
        for part, size in layer.items():
            sums[part] += count * size
    return WeightBytes(**sums)


def _mtp_bytes(w: MtpWeights) -> int:
    ends = (w.hidden_norm_D, w.embed_norm_D, w.input_D_DD)
    block = _layer_bytes(w.block, Packing())  # they are never packed
    return sum(x.nbytes for x in ends) + sum(block.values())


def _layer_bytes(w: LayerWeights, packing: Packing) -> dict[str, int]:
    attention, mlp = w.attention, w.mlp
    small = [
        w.attn_norm_D, w.attn_conv_D_4, w.mlp_norm_D, w.mlp_conv_D_4, attention.k_conv_W_4,
        attention.v_conv_W_4, attention.q_norm_C, attention.k_norm_C,
    ]  # fmt: skip
    matrices = (attention.qkvr_J_D, attention.out_D_I)
    sizes = {
        "attention": attention.rel_table_B_X.nbytes
        + sum(_bytes(matrix, packing.rest) for matrix in matrices)
    }
    if isinstance(mlp, DenseWeights):
        sizes["dense_layers"] = _bytes(mlp.w13_J_D, packing.rest) + _bytes(mlp.w2_D_F, packing.rest)
        small.append(mlp.scale_1)
    else:
        experts, shared = mlp.experts, mlp.experts.shared
        assert shared is not None
        for name, stack, precision in (
            ("routed_experts", experts, packing.experts),
            ("shared_experts", shared, packing.rest),
        ):
            sizes[name] = _bytes(stack.w13, precision) + _bytes(stack.w2, precision)
        small += [mlp.gate_A_D, mlp.bias_E, mlp.scale_1]
    return sizes | {"norms_convs_router": _bytes_of(*small)}


def _bytes(weight: Matrix, precision: str | None) -> int:
    if precision is None:
        return weight.nbytes
    if isinstance(weight, Tensor):
        return packed_bytes(FORMATS[precision], 1, *weight.shape)
    sizes = (weight.num_experts, weight.num_rows, weight.num_columns)
    return packed_bytes(FORMATS[precision], *sizes)


def _bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def state_bytes(
    config: ModelConfig,
    packing: Packing,
    num_slots: int,
    budget: KvBudget,
    page_dtype: torch.dtype,
    dtype: torch.dtype = DTYPE,
    *,
    drafts: bool = False,
) -> StateBytes:
    """Of `InteractionModel.new_state` with as many pages as the budgets need, and of the scratch
    that ticks in the buckets of `num_slots` rows make it take on a GPU."""
    num_drafts = config.num_drafts if drafts else 0
    longest = config.layout.max_tokens_per_tick
    specs = cache_groups(config.with_drafts(num_drafts), num_slots, budget, longest)
    slots = slot_tensors(
        config, specs, num_slots, device=META, dtype=dtype, num_drafts=num_drafts
    ).values()
    shape = TickShape.of(config, specs, num_slots, drafts=drafts)
    pages = {
        is_local: sum(
            spec.pages * spec.page_bytes(page_dtype)
            for spec in specs
            if (spec.window is not None) == is_local
        )
        for is_local in (True, False)
    }
    list_entry = 4 + 8 + 4  # page, base and rows
    positions = sum(8 * spec.pages * spec.page_rows for spec in specs if spec.window is None)
    return StateBytes(
        local_rings=pages[True],
        global_pages=pages[False] + positions,
        page_lists=shape.num_keys * list_entry,
        taps=_bytes_of(*(x.tensor for x in slots)),
        snapshots=(NUM_SNAPSHOTS + 1)  # one more is that of the mark
        * _bytes_of(*(x.tensor for x in slots if not x.is_setting)),
        buffers=size_of(shape.inputs(shape.largest)) + size_of(shape.said(num_slots)),
        scratch=scratch_bytes(config, packing, specs, num_slots, page_dtype, dtype, num_drafts),
    )


def scratch_bytes(
    config: ModelConfig,
    packing: Packing,
    specs: list[CacheGroup],
    num_slots: int,
    page_dtype: torch.dtype,
    dtype: torch.dtype = DTYPE,
    num_drafts: int = 0,
) -> int:
    """What `Scratch` comes to hold: one buffer for all products and one for attention, as large as
    the largest call, and one for each number of rows that draw or are routed by themselves."""
    buckets = buckets_of(config.layout, num_slots)
    passes = {(b.rows, tokens) for b in buckets for tokens in (b.tokens, b.rows)}
    if num_drafts:  # those of several steps, of which the last draws for all of them
        passes |= {(b.rows, n * b.rows) for b in buckets for n in range(2, 2 + num_drafts)}
    products = {
        linear_configs.scratch_bytes(linear_configs.Problem(tokens, columns, rows, form))
        for tokens in {tokens for _, tokens in passes}
        for rows, columns, form in _products(config, packing, num_drafts)
    }
    attention = {
        attention_configs.scratch_bytes(_attention(config, spec, *p, page_dtype, dtype))
        for p in passes
        for spec in specs
    }
    rows = {bucket.rows for bucket in buckets}
    draws = rows | ({(1 + num_drafts) * n for n in rows} if num_drafts else set())
    drawn = sum(4 * sample_configs.scratch_words(n, config.vocab.size) for n in draws)
    routed = 0
    if len(config.dense_layers) < config.num_layers:
        routed = sum(_routing_bytes(config, n) for n in rows)
    return max(products) + max(attention) + drawn + routed


def _products(config: ModelConfig, packing: Packing, num_drafts: int) -> set[tuple[int, int, str]]:
    """(rows, columns, format) of all matrices that `linear` multiplies by."""
    width, form = config.width, packing.rest or "plain"
    found = {(config.vocab.size, width, form)}
    for heads in {config.heads(layer) for layer in config.layers}:
        found |= {
            (heads.qkvr_width(config.d_rel), width, form),
            (width, heads.num_heads * heads.head_width, form),
        }
    if config.dense_layers:
        found |= {(2 * config.dense_width, width, form), (width, config.dense_width, form)}
    if num_drafts:  # by layers that are never packed
        found.add((width, 2 * width, "plain"))
        found |= {(2 * config.dense_width, width, "plain"), (width, config.dense_width, "plain")}
        for heads in {config.mtp_blocks.heads(layer) for layer in range(num_drafts)}:
            found |= {
                (heads.qkvr_width(config.d_rel), width, "plain"),
                (width, heads.num_heads * heads.head_width, "plain"),
            }
    return found


def _attention(
    config: ModelConfig,
    spec: CacheGroup,
    num_rows: int,
    num_tokens: int,
    page_dtype: torch.dtype,
    dtype: torch.dtype,
) -> attention_configs.Problem:
    heads = config.global_heads if spec.window is None else config.local_heads
    return attention_configs.Problem(
        num_tokens=num_tokens,
        num_rows=num_rows,
        num_columns=spec.columns,
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_width=heads.head_width,
        page_rows=spec.page_rows,
        window=spec.window,
        num_features=config.d_rel,
        dtype=dtype,
        page_dtype=page_dtype,
    )


def _routing_bytes(config: ModelConfig, num_tokens: int) -> int:
    """Of a `Routing.empty` on a GPU, where it has a schedule and scratch, as it has not here."""
    e = config.experts
    sizes = (num_tokens, e.top_k, e.num_shared, e.num_experts)
    routing = Routing.empty(*sizes, META, late_norm=True)
    blocking = choose_blocking(num_tokens, e.top_k, e.num_experts)
    assert routing.inv_rms_T is not None
    parts = [
        routing.expert_T_K, routing.weight_T_K, routing.shared_weight_T_Z, routing.inv_rms_T,
        new_scratch(*sizes, META, width=config.width),
    ]  # fmt: skip
    if blocking.scheduled:
        schedule = Schedule.empty(blocking, num_tokens, e.top_k, e.num_experts, META)
        parts.append(schedule.buffer)
    return _bytes_of(*parts)


def allowance_bytes(config: ModelConfig, num_slots: int, *, drafts: bool = False) -> AllowanceBytes:
    """For what is not counted: graphs of `num_slots` rows, what their ops make on the way, and what
    is there before and beside."""
    buckets = buckets_of(config.layout, num_slots)
    drawn = 1 + config.num_drafts if drafts else 1
    saved = _saved_taps(config, num_slots) if drafts else 0
    return AllowanceBytes(
        activations=saved + max(_activations(config, bucket, drawn) for bucket in buckets),
        graphs=GRAPH * len(buckets) * (2 if drafts else 1),
        context=CONTEXT,
        margin=MARGIN,
    )


def _activations(config: ModelConfig, bucket: Bucket, drawn: int) -> int:
    """Roughly: a few rows of the stream for each token, the widest matrices' outputs, pixels in
    float32 before and after the first fold, and logits of `drawn` steps in one pass twice."""
    experts, patch = config.experts, config.patch
    heads = (config.local_heads, config.global_heads)
    assigned = (experts.top_k + experts.num_shared) * (experts.width + config.width)
    projected = max(h.qkvr_width(config.d_rel) + h.num_heads * h.head_width for h in heads)
    token = DTYPE.itemsize * (8 * config.width + projected + max(config.dense_width, assigned))
    pixels = 4 * 2 * patch.frames * patch.patch**2 * 3
    logits = bucket.rows * drawn * 4 * 2 * config.vocab.size
    return bucket.tokens * token + bucket.patches * pixels + logits


def _saved_taps(config: ModelConfig, num_slots: int) -> int:
    """A tick that drafts copies all taps of convolutions; while it puts the largest of them back,
    these are there twice more."""
    drafts, longest = config.num_drafts, config.layout.max_tokens_per_tick
    specs = cache_groups(config.with_drafts(drafts), num_slots, KvBudget(), longest)
    slots = slot_tensors(config, specs, num_slots, device=META, dtype=DTYPE, num_drafts=drafts)
    taps = [x.tensor.nbytes for name, x in slots.items() if "conv" in name]
    return sum(taps) + 2 * max(taps)
