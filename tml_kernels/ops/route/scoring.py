"""Device functions of moe_route: partial logits, scores, and the choice of experts."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportAssignmentType=false
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
    squares_ptr,              # out  [T, splits]
    group, split, T, D,
    SPLITS: tl.constexpr, SPLIT_D: tl.constexpr, GROUP_T: tl.constexpr,
):  # fmt: skip
    """Sums of squares of GROUP_T tokens over one split of D. Of one tile for every number of
    tokens, and so with one order of summation."""
    t = group.to(tl.int64) * GROUP_T + tl.arange(0, GROUP_T)
    offs_d = split * SPLIT_D + tl.arange(0, SPLIT_D)
    ptr_t_d = residual_ptr + t[:, None] * D + offs_d[None, :]
    mask_t_d = (t < T)[:, None] & (offs_d < D)[None, :]
    residual_t_d = tl.load(ptr_t_d, mask=mask_t_d, other=0.0).to(tl.float32)
    square_t = tl.sum(residual_t_d * residual_t_d, axis=1)
    tl.store(squares_ptr + t * SPLITS + split, square_t, mask=t < T)


@triton.jit
def load_squares(
    squares_ptr,              # in   [T, splits]
    t,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    offs_s = tl.arange(0, BLOCK_S)
    ptr_t_s = squares_ptr + t[:, None] * SPLITS + offs_s[None, :]
    return tl.load(ptr_t_s, mask=(offs_s < SPLITS)[None, :], other=0.0, cache_modifier=".cg")


@triton.jit
def expert_ids(offs_i, E: tl.constexpr, NUM_GROUPS: tl.constexpr, BLOCK_J: tl.constexpr):
    """Ids of padded places, and which places are nobody's padding."""
    J: tl.constexpr = E // NUM_GROUPS
    if NUM_GROUPS == 1 or J == BLOCK_J:
        return offs_i, offs_i < E
    else:
        mask_i = (offs_i % BLOCK_J < J) & (offs_i // BLOCK_J < NUM_GROUPS)
        return offs_i // BLOCK_J * J + offs_i % BLOCK_J, mask_i


@triton.jit
def load_splits(
    logits_ptr,               # in   [splits, T, PITCH]
    t, offs, mask, T,
    PITCH: tl.constexpr, SPLITS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Parts of the logits of tokens `t` at columns `offs`, zero where masked. Not added up yet: a
    sum among the loads makes some wait for others."""
    parts = ()
    for split in tl.static_range(SPLITS):
        ptr = logits_ptr + (split * T + t) * PITCH + offs
        if MASKED:
            parts += (tl.load(ptr, mask=mask, other=0.0, cache_modifier=".cg"),)
        else:
            parts += (tl.load(ptr, cache_modifier=".cg"),)
    return parts


@triton.jit
def add_splits(parts):
    """In order."""
    logit = parts[0].to(tl.float32)
    for split in tl.static_range(1, len(parts)):
        logit += parts[split].to(tl.float32)
    return logit


@triton.jit
def expert_tile(
    GROUP_T: tl.constexpr, E: tl.constexpr, NUM_GROUPS: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Ids of the experts of each token, and which are any, [T, I / 128, 128].

    Through pointers of this shape Triton gives a token to one warp, and whatever is done over the
    experts of a token needs no barrier.
    """
    ROW: tl.constexpr = min(128, BLOCK_I)
    offs_r_l = tl.arange(0, BLOCK_I // ROW)[:, None] * ROW + tl.arange(0, ROW)[None, :]
    expert_r_l, mask_r_l = expert_ids(offs_r_l, E, NUM_GROUPS, BLOCK_J)
    shape: tl.constexpr = (GROUP_T, BLOCK_I // ROW, ROW)
    expert = tl.broadcast_to(expert_r_l[None, :, :], shape)
    return expert, tl.broadcast_to(mask_r_l[None, :, :], shape)


@triton.jit
def finish_logits(logit, logit_bias, inv_rms_t):
    """With the norm's factor and the bias, where there are any."""
    if inv_rms_t is not None:
        if logit_bias is None:
            logit_bias = tl.zeros(logit.shape, tl.float32)
        # One fma, so that no compiler makes one with a later sum in one kernel only.
        return tl.fma(logit, tl.broadcast_to(inv_rms_t[:, None], logit.shape), logit_bias)
    elif logit_bias is not None:
        return logit + logit_bias
    else:
        return logit


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
def choose(choice_t_i, value_t_i, mask_i, K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Places and values of the K largest choices, ties to the first, in order; beyond K, 0 and 0.
    And whether each place was chosen.

    Compared as integers: order and equality are those of the floats, NaN counts as the largest, and
    what is chosen already or padding is below everything, so that places are valid and distinct.
    Integers are also what one instruction reduces over a warp.
    """
    key_t_i = choice_t_i.to(tl.int32, bitcast=True)
    key_t_i = tl.where(key_t_i < 0, key_t_i ^ 0x7FFFFFFF, key_t_i)
    key_t_i = tl.where(choice_t_i != choice_t_i, 0x7FFFFFFF, key_t_i)
    key_t_i = tl.where(mask_i[None, :], key_t_i, -0x80000000)
    bits_t_i = value_t_i.to(tl.int32, bitcast=True)
    offs_i, offs_n = tl.arange(0, choice_t_i.shape[1]), tl.arange(0, BLOCK_N)
    place_t_n = tl.zeros([choice_t_i.shape[0], BLOCK_N], tl.int32)
    bits_t_n = tl.zeros([choice_t_i.shape[0], BLOCK_N], tl.int32)
    for k in range(K):
        best_t = tl.max(key_t_i, axis=1)
        place_t = tl.min(tl.where(key_t_i == best_t[:, None], offs_i[None, :], 0x7FFFFFFF), axis=1)
        chosen_t_i = offs_i[None, :] == place_t[:, None]
        bits_t = tl.sum(tl.where(chosen_t_i, bits_t_i, 0), axis=1)
        key_t_i = tl.where(chosen_t_i, -0x80000000, key_t_i)
        place_t_n = tl.where(offs_n[None, :] == k, place_t[:, None], place_t_n)
        bits_t_n = tl.where(offs_n[None, :] == k, bits_t[:, None], bits_t_n)
    chosen_t_i = (key_t_i == -0x80000000) & mask_i[None, :]
    return place_t_n, bits_t_n.to(tl.float32, bitcast=True), chosen_t_i


@triton.jit
def sink_weights(value_t_n, mask_n):
    """Softmax over log-sigmoids of the chosen logits and the shared ones together."""
    log_t_n = tl.where(mask_n[None, :], _log_sigmoid(value_t_n), float("-inf"))
    exp_t_n = tl.exp(log_t_n - tl.max(log_t_n, axis=1)[:, None])
    return exp_t_n / tl.sum(exp_t_n, axis=1)[:, None]
