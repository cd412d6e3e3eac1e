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


@triton.jit
def load_tile(row, run_n, V, RUN: tl.constexpr):
    """(logits, columns) of runs; +inf counts as the largest float32, columns from V on as -inf.

    row: pointer to its logits [V]; pointers to its bias ids and values [J], and J; pointer to its
    words of seen ids [W], and its penalty. Edited as `reference.edit_ref` does.
    """
    v_n_v = run_n[:, None] * RUN + tl.arange(0, RUN)[None, :]
    mask_n_v = v_n_v < V
    logits_ptr, biased, seen = row
    x_n_v = tl.load(logits_ptr + v_n_v, mask=mask_n_v, other=float("-inf"))
    x_n_v = tl.where(x_n_v > LARGEST, LARGEST, x_n_v)
    if len(biased) > 0:
        for i in range(biased[2]):
            biased_n_v = x_n_v + tl.load(biased[1] + i)
            x_n_v = tl.where(v_n_v == tl.load(biased[0] + i), biased_n_v, x_n_v)
    if len(seen) > 0:
        word_n_v = tl.load(seen[0] + v_n_v // 32, mask=mask_n_v, other=0)
        seen_n_v = ((word_n_v >> (v_n_v % 32)) & 1) > 0
        penalised_n_v = tl.where(x_n_v > 0.0, tl.div_rn(x_n_v, seen[1]), x_n_v * seen[1])
        x_n_v = tl.where(seen_n_v, penalised_n_v, x_n_v)
    return tl.where(x_n_v > LARGEST, LARGEST, x_n_v), v_n_v


@triton.jit
def gumbel_tile(seed, counter, run_n, RUN: tl.constexpr):
    """-ln(-ln(1 - u)) of the row's Philox words, as `_philox.gumbel`."""
    block_n_w = run_n[:, None] * (RUN // 4) + tl.arange(0, RUN // 4)[None, :]
    zero_n_w = tl.zeros_like(block_n_w)
    low = ((counter & 0xFFFFFFFF).to(tl.uint32) + zero_n_w).to(tl.uint32)
    high = (((counter >> 32) & 0xFFFFFFFF).to(tl.uint32) + zero_n_w).to(tl.uint32)
    stream = (zero_n_w + STREAM).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, block_n_w.to(tl.uint32), low, high, stream)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last axes, flattened: w0, w1, w2, w3
    bits_n_v = tl.reshape(words, [run_n.shape[0], RUN])
    u_n_v = tl.minimum(bits_n_v.to(tl.float32) * 2.0**-32 + 2.0**-33, 1.0 - 2.0**-24)
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
