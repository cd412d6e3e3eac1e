"""Device functions of moe_route: partial logits, scores, and the choice of experts."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# Triton's types know neither static_range nor launch options.

# Dimension key: T tokens, D model width, A gate rows, K experts chosen per token, Z shared experts;
# G groups of J experts each, and I = G * J, all padded to powers of two.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_partial(
    x_ptr,                    # in   [T, D]
    gate_ptr,                 # in   [A, D]
    partial_ptr,              # out  [splits, T, PITCH]
    tile, row_tile, split, T, D,
    A: tl.constexpr, PITCH: tl.constexpr, SPLIT_D: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits of a tile of gate rows and tokens over one split of D. The rows are the instruction's
    M side, 16 or 32: the same one, with one order of summation, for every number of tokens."""
    offs_a = row_tile * BLOCK_A + tl.arange(0, BLOCK_A)
    t = tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_a, mask_t = offs_a < A, t < T
    acc_a_t = tl.zeros([BLOCK_A, BLOCK_T], tl.float32)
    for start in range(0, SPLIT_D, BLOCK_D):
        offs_d = split * SPLIT_D + start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        gate_ptr_a_d = gate_ptr + offs_a[:, None] * D + offs_d[None, :]
        gate_a_d = tl.load(gate_ptr_a_d, mask=mask_a[:, None] & mask_d[None, :], other=0.0)
        x_ptr_d_t = x_ptr + t[None, :] * D + offs_d[:, None]
        x_d_t = tl.load(x_ptr_d_t, mask=mask_d[:, None] & mask_t[None, :], other=0.0)
        acc_a_t = tl.dot(gate_a_d, x_d_t.to(gate_a_d.dtype), acc_a_t, input_precision="tf32x3")
    out_ptr_a_t = partial_ptr + (split * T + t)[None, :] * PITCH + offs_a[:, None]
    tl.store(out_ptr_a_t, acc_a_t, mask=mask_a[:, None] & mask_t[None, :])


@triton.jit
def store_squares(
    residual_ptr,             # in   [T, D]
    partial_ptr,              # out  [splits, T, PITCH]  column A
    group, split, T, D,
    A: tl.constexpr, PITCH: tl.constexpr, SPLIT_D: tl.constexpr, GROUP_T: tl.constexpr,
):  # fmt: skip
    """Sums of squares of GROUP_T tokens over one split of D. Of one tile for every number of
    tokens, and so with one order of summation."""
    t = group.to(tl.int64) * GROUP_T + tl.arange(0, GROUP_T)
    offs_d = split * SPLIT_D + tl.arange(0, SPLIT_D)
    ptr_t_d = residual_ptr + t[:, None] * D + offs_d[None, :]
    mask_t_d = (t < T)[:, None] & (offs_d < D)[None, :]
    residual_t_d = tl.load(ptr_t_d, mask=mask_t_d, other=0.0).to(tl.float32)
    square_t = tl.sum(residual_t_d * residual_t_d, axis=1)
    tl.store(partial_ptr + (split * T + t) * PITCH + A, square_t, mask=t < T)


@triton.jit
def load_inv_rms(
    partial_ptr,              # in   [splits, T, PITCH]
    t, mask_t, T, D, eps,
    A: tl.constexpr, PITCH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """1 / sqrt(mean of squares + eps) of some tokens, splits added in order."""
    square_t = tl.zeros([t.shape[0]], tl.float32)
    for split in tl.static_range(SPLITS):
        ptr_t = partial_ptr + (split * T + t) * PITCH + A
        square_t += tl.load(ptr_t, mask=mask_t, other=0.0, cache_modifier=".cg")
    return 1.0 / tl.sqrt(square_t / D + eps)


@triton.jit
def load_logits(
    logits_ptr,               # in   [splits, T, PITCH]
    logit_bias_ptr,           # in   [A], or None
    inv_rms_t,                # in   [T] of these tokens, or None
    t, mask_t, offs_a, mask_a, T,
    PITCH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Logits of some tokens and gate rows, splits added in order; zero where masked."""
    mask_t_a = mask_t[:, None] & mask_a[None, :]
    logit_t_a = tl.zeros([t.shape[0], offs_a.shape[0]], tl.float32)
    for split in tl.static_range(SPLITS):
        ptr_t_a = logits_ptr + (split * T + t)[:, None] * PITCH + offs_a[None, :]
        part_t_a = tl.load(ptr_t_a, mask=mask_t_a, other=0.0, cache_modifier=".cg")
        logit_t_a += part_t_a.to(tl.float32)
    bias_a = tl.zeros([offs_a.shape[0]], tl.float32)
    if logit_bias_ptr is not None:
        bias_a = tl.load(logit_bias_ptr + offs_a, mask=mask_a, other=0.0)
    if inv_rms_t is not None:
        # One fma, so that no compiler makes one with a later sum in one kernel only.
        bias_t_a = tl.broadcast_to(bias_a[None, :], logit_t_a.shape)
        return tl.fma(logit_t_a, tl.broadcast_to(inv_rms_t[:, None], logit_t_a.shape), bias_t_a)
    elif logit_bias_ptr is not None:
        return logit_t_a + bias_a[None, :]
    else:
        return logit_t_a


@triton.jit
def _log1p(y):
    """log(1 + y), y >= 0, to the last digits of small y too: the rounding of 1 + y divides out.

    Source: Goldberg, "What every computer scientist should know about floating-point arithmetic",
    1991, theorem 4.
    """
    u = 1.0 + y
    d = u - 1.0
    return tl.where(d == 0.0, y, tl.log(u) * (y / tl.where(d == 0.0, 1.0, d)))


@triton.jit
def _log_sigmoid(x):
    return tl.where(x < 0.0, x, 0.0) - _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def score(logit_t_i, mask_i, SCORING: tl.constexpr):
    """Each expert's score; meaningless where masked."""
    if SCORING == "softmax":
        logit_t_i = tl.where(mask_i[None, :], logit_t_i, float("-inf"))
        exp_t_i = tl.exp(logit_t_i - tl.max(logit_t_i, axis=1)[:, None])
        return exp_t_i / tl.sum(exp_t_i, axis=1)[:, None]
    elif SCORING == "sqrtsoftplus":
        return tl.sqrt_rn(
            tl.where(logit_t_i < 0.0, 0.0, logit_t_i) + _log1p(tl.exp(-tl.abs(logit_t_i)))
        )
    else:
        return 1.0 / (1.0 + tl.exp(-logit_t_i))


@triton.jit
def keep_best_groups(
    choice_t_i, TOP_GROUPS: tl.constexpr, PAIRS: tl.constexpr, G: tl.constexpr, J: tl.constexpr
):
    """-inf outside each token's best groups; a group is as good as its best one or two."""
    BLOCK_T: tl.constexpr = choice_t_i.shape[0]
    choice_t_g_j = tl.reshape(choice_t_i, [BLOCK_T, G, J])
    best_t_g = tl.max(choice_t_g_j, axis=2)
    if PAIRS:
        offs_j = tl.arange(0, J)[None, None, :]
        first_t_g = tl.min(tl.where(choice_t_g_j == best_t_g[:, :, None], offs_j, J), axis=2)
        rest_t_g_j = tl.where(offs_j == first_t_g[:, :, None], float("-inf"), choice_t_g_j)
        best_t_g += tl.max(rest_t_g_j, axis=2)
    offs_g = tl.arange(0, G)
    lower_g_h = offs_g[None, None, :] < offs_g[None, :, None]
    mine_t_g_h, other_t_g_h = best_t_g[:, :, None], best_t_g[:, None, :]
    beaten_t_g_h = (other_t_g_h > mine_t_g_h) | ((other_t_g_h == mine_t_g_h) & lower_g_h)
    kept_t_g = tl.sum(beaten_t_g_h.to(tl.int32), axis=2) < TOP_GROUPS
    choice_t_g_j = tl.where(kept_t_g[:, :, None], choice_t_g_j, float("-inf"))
    return tl.reshape(choice_t_g_j, [BLOCK_T, G * J])


@triton.jit
def choose(choice_t_i, value_t_i, expert_i, mask_i, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Ids and values of the K largest choices, ties to the lowest id, in order; beyond K, -1 and 0.

    Compared as integers: order and equality are those of the floats, NaN counts as the largest, and
    what is chosen already or padding is below everything, so that ids are valid and distinct.
    """
    key_t_i = choice_t_i.to(tl.int32, bitcast=True)
    key_t_i = tl.where(key_t_i < 0, key_t_i ^ 0x7FFFFFFF, key_t_i)
    key_t_i = tl.where(choice_t_i != choice_t_i, 0x7FFFFFFF, key_t_i)
    key_t_i = tl.where(mask_i[None, :], key_t_i, -0x80000000)
    offs_k = tl.arange(0, BLOCK_K)
    expert_t_k = tl.full([choice_t_i.shape[0], BLOCK_K], -1, tl.int32)
    value_t_k = tl.zeros([choice_t_i.shape[0], BLOCK_K], tl.float32)
    for k in range(K):
        best_t = tl.max(key_t_i, axis=1)
        expert_t = tl.min(
            tl.where(key_t_i == best_t[:, None], expert_i[None, :], 0x7FFFFFFF), axis=1
        )
        chosen_t_i = expert_i[None, :] == expert_t[:, None]
        value_t = tl.sum(tl.where(chosen_t_i & mask_i[None, :], value_t_i, 0.0), axis=1)
        key_t_i = tl.where(chosen_t_i, -0x80000000, key_t_i)
        expert_t_k = tl.where(offs_k[None, :] == k, expert_t[:, None], expert_t_k)
        value_t_k = tl.where(offs_k[None, :] == k, value_t[:, None], value_t_k)
    return expert_t_k, value_t_k


@triton.jit
def sink_weights(value_t_k, mask_k, shared_t_z, mask_z):
    """Softmax over log-sigmoids of the chosen logits and the shared ones together."""
    log_t_k = tl.where(mask_k[None, :], _log_sigmoid(value_t_k), float("-inf"))
    log_t_z = tl.where(mask_z[None, :], _log_sigmoid(shared_t_z), float("-inf"))
    top_t = tl.maximum(tl.max(log_t_k, axis=1), tl.max(log_t_z, axis=1))
    exp_t_k, exp_t_z = tl.exp(log_t_k - top_t[:, None]), tl.exp(log_t_z - top_t[:, None])
    sum_t = tl.sum(exp_t_k, axis=1) + tl.sum(exp_t_z, axis=1)
    return exp_t_k / sum_t[:, None], exp_t_z / sum_t[:, None]
