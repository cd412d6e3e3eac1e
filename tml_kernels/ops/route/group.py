"""Device functions of moe_route: a group of tokens, from partial logits to its routing."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false
# Triton's types know no tuples of tensors; what has no pointer is not loaded and not used.

# Dimension key: T tokens, D model width, E routed experts, Z shared experts, K experts chosen per
# token, N = K + Z padded; G groups of J experts each, both padded to powers of two, I = G * J.

from __future__ import annotations

import triton
import triton.language as tl

from .reference import RENORM_EPS
from .scheduling import count_chosen
from .scoring import (
    add_splits,
    choose,
    expert_ids,
    expert_tile,
    finish_logits,
    keep_best_groups,
    load_splits,
    load_squares,
    score,
    sink_weights,
)

EPS = tl.constexpr(RENORM_EPS)


@triton.jit
def store_routing(
    expert_ptr, weight_ptr,   # out  [T, K]
    shared_weight_ptr,        # out  [T, Z]
    expert_t_n, weight_t_n,   # of the chosen, then of the shared
    t, mask_t, offs_n, mask_k, mask_z,
    K: tl.constexpr, Z: tl.constexpr,
):  # fmt: skip
    offs_t_k = t[:, None] * K + offs_n[None, :]
    mask_t_k = mask_t[:, None] & mask_k[None, :]
    tl.store(expert_ptr + offs_t_k, expert_t_n, mask=mask_t_k)
    tl.store(weight_ptr + offs_t_k, weight_t_n, mask=mask_t_k)
    shared_ptr_t_n = shared_weight_ptr + t[:, None] * Z + offs_n[None, :] - K
    tl.store(shared_ptr_t_n, weight_t_n, mask=mask_t[:, None] & mask_z[None, :])


@triton.jit
def choice_of(
    score_t_i, bias_t_i, mask_i,
    E: tl.constexpr, NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """What experts are chosen by, as of `choice_ref`."""
    choice_t_i = score_t_i
    if bias_t_i is not None:
        choice_t_i += bias_t_i
    if NUM_GROUPS > 1:
        choice_t_i = tl.where(mask_i[None, :], choice_t_i, float("-inf"))
        PAIRS: tl.constexpr = (bias_t_i is not None) and (E > NUM_GROUPS)
        choice_t_i = keep_best_groups(choice_t_i, TOP_GROUPS, PAIRS, BLOCK_G, BLOCK_J)
    return choice_t_i


@triton.jit
def route_group(
    logits_ptr, squares_ptr, logit_bias_ptr,
    bias_t_i,                 # of the experts, for each token, or None
    expert_ptr, weight_ptr, shared_weight_ptr, inv_rms_ptr, place_ptr, count_ptr,
    group, T, D, scale, eps,
    SCORING: tl.constexpr, RENORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, Z: tl.constexpr, PITCH: tl.constexpr,
    SPLITS: tl.constexpr, GROUP_T: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Route GROUP_T tokens, and count their experts if there is where to. All that is loaded comes
    first, at once."""
    BLOCK_I: tl.constexpr = BLOCK_G * BLOCK_J
    SHAPE: tl.constexpr = (GROUP_T, BLOCK_I)
    t = group.to(tl.int64) * GROUP_T + tl.arange(0, GROUP_T)
    mask_t = t < T
    expert_i, mask_i = expert_ids(tl.arange(0, BLOCK_I), E, NUM_GROUPS, BLOCK_J)
    # A token's weights: those of the chosen, then those of the shared.
    offs_n = tl.arange(0, BLOCK_N)
    mask_k, mask_z = offs_n < K, (offs_n >= K) & (offs_n < K + Z)

    tile, mask_tile = expert_tile(GROUP_T, E, NUM_GROUPS, BLOCK_I, BLOCK_J)
    row_t = tl.minimum(t, T - 1)  # beyond T the last one again, which is not stored
    part_tiles = load_splits(
        logits_ptr, row_t[:, None, None], tile, mask_tile, T, PITCH, SPLITS, E != BLOCK_I
    )
    if SCORING == "sink_sigmoid":
        offs_z = E + offs_n[None, :] - K
        mask_t_z = tl.broadcast_to(mask_z[None, :], [GROUP_T, BLOCK_N])
        shared_parts = load_splits(
            logits_ptr, row_t[:, None], offs_z, mask_t_z, T, PITCH, SPLITS, True
        )
    if inv_rms_ptr is not None:
        square_t_s = load_squares(squares_ptr, row_t, SPLITS, BLOCK_S)
    if logit_bias_ptr is not None:
        logit_bias_tile = tl.load(logit_bias_ptr + tile, mask=mask_tile, other=0.0)
        if SCORING == "sink_sigmoid":
            shared_bias_ptr = logit_bias_ptr + tl.broadcast_to(offs_z, mask_t_z.shape)
            shared_bias_t_n = tl.load(shared_bias_ptr, mask=mask_t_z, other=0.0)

    inv_rms_t = None
    if inv_rms_ptr is not None:
        inv_rms_t = 1.0 / tl.sqrt(tl.sum(square_t_s, axis=1) / D + eps)
        tl.store(inv_rms_ptr + t, inv_rms_t, mask=mask_t)
    logit_bias_t_i = None
    shared_bias = None
    if logit_bias_ptr is not None:
        logit_bias_t_i = tl.reshape(logit_bias_tile, SHAPE)
        if SCORING == "sink_sigmoid":
            shared_bias = shared_bias_t_n
    logit_t_i = tl.reshape(add_splits(part_tiles), SHAPE)
    logit_t_i = finish_logits(logit_t_i, logit_bias_t_i, inv_rms_t)
    score_t_i = score(logit_t_i, mask_i, SCORING)
    choice_t_i = choice_of(score_t_i, bias_t_i, mask_i, E, NUM_GROUPS, TOP_GROUPS, BLOCK_G, BLOCK_J)
    nan_t = tl.max((logit_t_i != logit_t_i).to(tl.int32), axis=1)
    if SCORING == "sink_sigmoid":
        place_t_n, value_t_n, chosen_t_i = choose(choice_t_i, logit_t_i, mask_i, K, BLOCK_N)
        shared_t_n = finish_logits(add_splits(shared_parts), shared_bias, inv_rms_t)
        value_t_n = tl.where(mask_k[None, :], value_t_n, shared_t_n)
        weight_t_n = sink_weights(value_t_n, mask_k | mask_z)
    else:
        place_t_n, weight_t_n, chosen_t_i = choose(choice_t_i, score_t_i, mask_i, K, BLOCK_N)
        if RENORMALIZE:
            weight_t_n = weight_t_n / (tl.sum(weight_t_n, axis=1) + EPS)[:, None]
    weight_t_n = tl.where(nan_t[:, None] > 0, float("nan"), weight_t_n * scale)
    if SCORING != "sink_sigmoid":
        weight_t_n = tl.where(mask_k[None, :], weight_t_n, 1.0)

    expert_t_n, _ = expert_ids(place_t_n, E, NUM_GROUPS, BLOCK_J)
    store_routing(
        expert_ptr, weight_ptr, shared_weight_ptr, expert_t_n, weight_t_n,
        t, mask_t, offs_n, mask_k, mask_z, K, Z,
    )  # fmt: skip
    if place_ptr is not None:
        count_chosen(
            chosen_t_i, place_t_n, mask_t[:, None] & mask_k[None, :], expert_i, mask_i,
            place_ptr, count_ptr, group, T,
            K, E, GROUP_T,
        )  # fmt: skip
