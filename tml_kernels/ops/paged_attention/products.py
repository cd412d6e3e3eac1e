"""Device functions of paged_attention: the softmax over one split, and how splits are added up."""

# Dimension key: H query heads, G KV heads, C head width, P pages, R rows in a page, B features,
# X extent; q rows of a tile, r rows of a page, w distances between the two.

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _pages_of(
    sorted_base_ptr, count, split, span, pq, num_tokens, R: tl.constexpr, X: tl.constexpr,
    WINDOW: tl.constexpr, SPLIT_PAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Places lo..near..hi in the sorted list: the pages of a split that the tile sees, from `near`
    on with a bias. With a window the split begins at position span * SPAN."""
    begin, end = 0, count
    if WINDOW is None:
        begin = split * SPLIT_PAGES
        end = tl.minimum(begin + SPLIT_PAGES, count)
    lo, near, hi = begin, begin, begin
    for place in range(begin, end, BLOCK):
        offs = place + tl.arange(0, BLOCK)
        base = tl.load(sorted_base_ptr + offs, mask=offs < end, other=1 << 62)
        until = base < pq + num_tokens
        before = offs < begin
        if WINDOW is not None:
            SPAN: tl.constexpr = SPLIT_PAGES * R
            before = (base < span * SPAN) | (base + R + WINDOW <= pq + 1)
            until = until & (base < (span + 1) * SPAN)
        lo += tl.sum(before.to(tl.int32), axis=0)
        hi += tl.sum(until.to(tl.int32), axis=0)
        near += tl.sum((before | (until & (base + R + X <= pq + 1))).to(tl.int32), axis=0)
    hi = tl.maximum(lo, hi)
    near = tl.minimum(near, hi) if X > 0 else hi
    return lo, near, hi


@triton.jit
def _profile(rel_q_b, table_ptr, x_w, B, X: tl.constexpr):
    """rel times the table's columns x_w, zero outside of it. A table of float32 goes as two terms
    of rel's dtype."""
    offs_b = tl.arange(0, rel_q_b.shape[1])
    mask_b_w = (offs_b < B)[:, None] & ((x_w >= 0) & (x_w < X))[None, :]
    table_b_w = tl.load(table_ptr + offs_b[:, None] * X + x_w[None, :], mask=mask_b_w, other=0.0)
    high_b_w = table_b_w.to(rel_q_b.dtype)
    profile_q_w = tl.dot(rel_q_b, high_b_w, input_precision="ieee")
    if table_b_w.dtype != rel_q_b.dtype:
        low_b_w = (table_b_w - high_b_w.to(tl.float32)).to(rel_q_b.dtype)
        profile_q_w = tl.dot(rel_q_b, low_b_w, profile_q_w, input_precision="ieee")
    return profile_q_w


@triton.jit
def _bias(
    rel_q_b, table_ptr, i_q, delta, B, X: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The profile over the tile's distances, least first, read along its diagonals: the distances
    of one query to the page's rows, then those that further queries add."""
    x_r = tl.arange(0, BLOCK_R) - (delta + BLOCK_R - 1)
    x_w = tl.arange(0, BLOCK_W) - (delta - 1)
    w_q_r = i_q[:, None] + (BLOCK_R - 1 - tl.arange(0, BLOCK_R))[None, :]
    near_q_w = _profile(rel_q_b, table_ptr, x_r, B, X)
    near_q_r = tl.gather(near_q_w, tl.minimum(w_q_r, BLOCK_R - 1), axis=1)
    far_q_w = _profile(rel_q_b, table_ptr, x_w, B, X)
    over_q_r = tl.maximum(tl.minimum(w_q_r - BLOCK_R, BLOCK_W - 1), 0)
    far_q_r = tl.gather(far_q_w, over_q_r, axis=1)
    return tl.where(w_q_r < BLOCK_R, near_q_r, far_q_r)


@triton.jit
def _attend(
    m_q, l_q_16, acc_q_c, q_q_c, rel_q_b, tau_q, i_q, num_tokens, pq, lo, hi, g,
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, sorted_page_ptr, sorted_base_ptr, table_ptr,
    scale, softcap, B, G: tl.constexpr, C: tl.constexpr, R: tl.constexpr, X: tl.constexpr,
    WINDOW: tl.constexpr, BIAS: tl.constexpr, TAU: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The online softmax over pages lo..hi. Sums are written as fma where a compiler might choose,
    and the exponent takes the maximum in natural units, so that nothing before it is contracted."""
    offs_c = tl.arange(0, q_q_c.shape[1])
    offs_r = tl.arange(0, BLOCK_R)
    offs_r_c = offs_r[:, None] * C + offs_c[None, :]
    for place in range(lo, hi):
        page = tl.load(sorted_page_ptr + place).to(tl.int64)
        base = tl.load(sorted_base_ptr + place)
        delta = tl.maximum(base - pq, -(1 << 30)).to(tl.int32)  # of the first query to row 0
        key_r = delta + offs_r
        seen_r = (offs_r < R) & (key_r < num_tokens)
        if WINDOW is not None:
            seen_r = seen_r & (key_r + WINDOW > 0)
        row = (page * G + g) * R
        mask_r_c = seen_r[:, None] & (offs_c < C)[None, :]
        k_r_c = tl.load(k_ptr + row * C + offs_r_c, mask=mask_r_c, other=0.0).to(q_q_c.dtype)
        qk_q_r = tl.dot(q_q_c, k_r_c.T, input_precision="ieee")
        if k_scale_ptr is not None:
            qk_q_r *= tl.load(k_scale_ptr + row + offs_r, mask=seen_r, other=0.0)[None, :]
        if BIAS:
            bias_q_r = _bias(rel_q_b, table_ptr, i_q, delta, B, X, BLOCK_R, BLOCK_W)
            s_q_r = tl.fma(qk_q_r, tl.full(qk_q_r.shape, scale, tl.float32), bias_q_r)
        else:
            s_q_r = qk_q_r * scale
        if TAU:
            s_q_r *= tau_q[:, None]
        if SOFTCAP:
            s_q_r = softcap - 2.0 * softcap / (1.0 + tl.exp(s_q_r * (2.0 / softcap)))
        distance_q_r = i_q[:, None] - key_r[None, :]
        visible_q_r = (distance_q_r >= 0) & (offs_r < R)[None, :]
        if WINDOW is not None:
            visible_q_r = visible_q_r & (distance_q_r < WINDOW)
        s_q_r = tl.where(visible_q_r, s_q_r, float("-inf"))
        new_q = tl.maximum(m_q, tl.max(s_q_r, axis=1))
        safe_q = tl.where(new_q == float("-inf"), 0.0, new_q)
        shift_q_r = tl.broadcast_to(-(safe_q * LOG2E)[:, None], s_q_r.shape)
        p_q_r = tl.exp2(tl.fma(s_q_r, tl.full(s_q_r.shape, LOG2E, tl.float32), shift_q_r))
        p_q_r = tl.where(visible_q_r, p_q_r, 0.0)
        decay_q = tl.exp2((m_q - safe_q) * LOG2E)
        ones_r_16 = tl.full([BLOCK_R, 16], 1.0, q_q_c.dtype)
        l_q_16 = tl.dot(p_q_r.to(q_q_c.dtype), ones_r_16, l_q_16 * decay_q[:, None],
                        input_precision="ieee")  # fmt: skip
        if v_scale_ptr is not None:
            p_q_r *= tl.load(v_scale_ptr + row + offs_r, mask=seen_r, other=0.0)[None, :]
        v_r_c = tl.load(v_ptr + row * C + offs_r_c, mask=mask_r_c, other=0.0).to(q_q_c.dtype)
        acc_q_c = tl.dot(p_q_r.to(q_q_c.dtype), v_r_c, acc_q_c * decay_q[:, None],
                         input_precision="ieee")  # fmt: skip
        m_q = new_q
    return m_q, l_q_16, acc_q_c


@triton.jit
def split_softmax(
    q_q_c, rel_q_b, tau_q, i_q, num_tokens, pq, split, first_span, count, g,
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, sorted_page_ptr, sorted_base_ptr, table_ptr,
    scale, softcap, B, G: tl.constexpr, C: tl.constexpr, R: tl.constexpr, X: tl.constexpr,
    WINDOW: tl.constexpr, TAU: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT_PAGES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """(maximum, sum sixteen times, weighted values) of one split."""
    lo, near, hi = _pages_of(sorted_base_ptr, count, split, first_span + split, pq, num_tokens,
                             R, X, WINDOW, SPLIT_PAGES, 64)  # fmt: skip
    m_q = tl.full([q_q_c.shape[0]], float("-inf"), tl.float32)
    l_q_16 = tl.zeros([q_q_c.shape[0], 16], tl.float32)
    acc_q_c = tl.zeros(q_q_c.shape, tl.float32)
    m_q, l_q_16, acc_q_c = _attend(
        m_q, l_q_16, acc_q_c, q_q_c, rel_q_b, tau_q, i_q, num_tokens, pq, lo, near, g,
        k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, sorted_page_ptr, sorted_base_ptr, table_ptr,
        scale, softcap, B, G, C, R, X, WINDOW, False, TAU, SOFTCAP, BLOCK_R, BLOCK_W,
    )  # fmt: skip
    if X > 0:
        m_q, l_q_16, acc_q_c = _attend(
            m_q, l_q_16, acc_q_c, q_q_c, rel_q_b, tau_q, i_q, num_tokens, pq, near, hi, g,
            k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, sorted_page_ptr, sorted_base_ptr, table_ptr,
            scale, softcap, B, G, C, R, X, WINDOW, True, TAU, SOFTCAP, BLOCK_R, BLOCK_W,
        )  # fmt: skip
    return m_q, l_q_16, acc_q_c


@triton.jit
def fold(m_q, l_q_n, acc_q_c, next_m_q, next_l_q_n, next_acc_q_c):
    """The next split after those before it."""
    new_q = tl.maximum(m_q, next_m_q)
    safe_q = tl.where(new_q == float("-inf"), 0.0, new_q)
    old_q = tl.exp2((m_q - safe_q) * LOG2E)[:, None]
    weight_q = tl.exp2((next_m_q - safe_q) * LOG2E)[:, None]
    weight_q_n = tl.broadcast_to(weight_q, l_q_n.shape)
    weight_q_c = tl.broadcast_to(weight_q, acc_q_c.shape)
    l_q_n = tl.fma(next_l_q_n, weight_q_n, l_q_n * old_q)
    return new_q, l_q_n, tl.fma(next_acc_q_c, weight_q_c, acc_q_c * old_q)
