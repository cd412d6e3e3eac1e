"""Device functions of sample: a tile of a row's logits, its noise, and the order of its columns.

Columns are ordered by descending logit, equal ones by ascending id. What top-k and top-p keep is a
prefix of that order, named by its last column: (x, id).
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportIndexIssue=false
# Triton's types know neither static_range nor tuples.

# Dimension key: V vocabulary, N runs of RUN columns; n and v of a tile.

from __future__ import annotations

import triton
import triton.language as tl

from ..._philox import SAMPLE_STREAM

STREAM = tl.constexpr(SAMPLE_STREAM)
LARGEST = tl.constexpr(3.4028234663852886e38)
NO_ID = tl.constexpr(2**31 - 1)
MIN_T, MAX_T = tl.constexpr(1e-30), tl.constexpr(1e30)  # temperatures that bounds are made for


@triton.jit
def load_tile(row, run_n, V, RUN: tl.constexpr):
    """(logits, columns) of runs; +inf counts as the largest float32, columns from V on as -inf, and
    a NaN, which no draw may come near, as +inf.

    row: pointer to its logits [V]; pointers to its bias ids and values [J], and J; pointer to its
    words of seen ids [W], and its penalty. Edited as `reference.edit_ref` does.
    """
    v_n_v = run_n[:, None] * RUN + tl.arange(0, RUN)[None, :]
    mask_n_v = v_n_v < V
    logits_ptr, biased, seen = row
    x_n_v = tl.load(logits_ptr + v_n_v, mask=mask_n_v, other=float("-inf"))
    if len(biased) + len(seen) > 0:
        x_n_v = tl.where(x_n_v > LARGEST, LARGEST, x_n_v)
    if len(biased) > 0:
        for i in range(biased[2]):
            biased_n_v = x_n_v + tl.load(biased[1] + i)
            token = tl.load(biased[0] + i)
            x_n_v = tl.where(v_n_v == tl.where(token < V, token, -1), biased_n_v, x_n_v)
    if len(seen) > 0:
        word_n_v = tl.load(seen[0] + v_n_v // 32, mask=mask_n_v, other=0)
        seen_n_v = ((word_n_v >> (v_n_v % 32)) & 1) > 0
        penalised_n_v = tl.where(x_n_v > 0.0, tl.div_rn(x_n_v, seen[1]), x_n_v * seen[1])
        x_n_v = tl.where(seen_n_v, penalised_n_v, x_n_v)
    return tl.where(x_n_v != x_n_v, float("inf"), tl.minimum(x_n_v, LARGEST)), v_n_v


@triton.jit
def first_column(row, run, x, V, RUN: tl.constexpr):
    """The first column of a run with the logit x."""
    x_1_v, v_1_v = load_tile(row, run + tl.zeros([1], tl.int32), V, RUN)
    return tl.min(tl.where(x_1_v == x, v_1_v, NO_ID))


@triton.jit
def uniform_tile(seed, counter, run_n, RUN: tl.constexpr):
    """u of the row's Philox words, as `_philox.gumbel` has it but for its upper limit."""
    block_n_w = run_n[:, None] * (RUN // 4) + tl.arange(0, RUN // 4)[None, :]
    zero_n_w = tl.zeros_like(block_n_w)
    low = ((counter & 0xFFFFFFFF).to(tl.uint32) + zero_n_w).to(tl.uint32)
    high = (((counter >> 32) & 0xFFFFFFFF).to(tl.uint32) + zero_n_w).to(tl.uint32)
    stream = (zero_n_w + STREAM).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, block_n_w.to(tl.uint32), low, high, stream)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last axes, flattened: w0, w1, w2, w3
    bits_n_v = tl.reshape(words, [run_n.shape[0], RUN])
    return bits_n_v.to(tl.float32) * 2.0**-32 + 2.0**-33


@triton.jit
def gumbel_tile(seed, counter, run_n, RUN: tl.constexpr):
    """-ln(-ln(1 - u)) of the row's Philox words, as `_philox.gumbel`."""
    u_n_v = tl.minimum(uniform_tile(seed, counter, run_n, RUN), 1.0 - 2.0**-24)
    # log1p by the rounding of 1 - u: what the logarithm errs by, the ratio takes back.
    # Source: Goldberg, "What every computer scientist should know about floating-point", theorem 4.
    rest_n_v = 1.0 - u_n_v
    safe_n_v = tl.where(rest_n_v == 1.0, 0.5, rest_n_v)
    decay_n_v = u_n_v * (tl.log(safe_n_v) / (safe_n_v - 1.0))
    return -tl.log(tl.where(rest_n_v == 1.0, u_n_v, decay_n_v))


@triton.jit
def scale_logit(x, x_max, temperature):
    return tl.div_rn(x - x_max, temperature)


@triton.jit
def slope_of(temperature):
    """log2(e) / temperature, where that is in float32's range."""
    return 1.4426950408889634 / tl.maximum(tl.minimum(temperature, MAX_T), MIN_T)


@triton.jit
def has_slope(temperature):
    """Whether exp2(d * slope_of) is exp(d / temperature)."""
    return (temperature >= MIN_T) & (temperature <= MAX_T)


@triton.jit
def may_win(race_n, max_n, x_max, temperature):
    """Which runs may have the row's best draw, without a logarithm of any column.

    The best draw has the least ln(1 / (1 - u)) / p, where p = exp((x - x_max) / temperature): the
    race of exponentials. u / p bounds that from below; from above it is 1 / (1 - u) times as much,
    and u is at most u / p, since p <= 1; or 34 times, as u ends at 1 - 2**-24. A run's race is its
    least u / p with its own maximum for x_max. Rounding of both ways to the score is under 2e-5,
    relative, for whatever comes near to winning; 1e-4 is allowed.
    """
    upper_n = race_n * tl.where(race_n < 0.5, 1.0 / (1.0 - race_n), 34.0)
    rest_n = tl.exp2((x_max - max_n) * slope_of(temperature))
    may_n = race_n * rest_n <= 1.0001 * tl.min(upper_n * rest_n, axis=0)
    return tl.where(has_slope(temperature), may_n, max_n > float("-inf"))


@triton.jit
def in_prefix(x, v, last_x, last_id):
    return (x > last_x) | ((x == last_x) & (v <= last_id))


@triton.jit
def order_key(x):
    """uint32 in the order of the floats; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def key_value(key):
    bits = (key ^ 0x80000000).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
