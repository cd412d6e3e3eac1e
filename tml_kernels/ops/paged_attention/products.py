"""Device functions of paged_attention: the softmax over one split, and how splits are added up."""

# Dimension key: H query heads, G KV heads, C head width, P pages, R rows in a page, B features,
# X extent; q rows of a tile, i its tokens, r rows of a page, k (token of the tile, feature).

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _pages_of(
    base_ptr, count, split, first_split, pq, num_tokens, span,
    R: tl.constexpr, X: tl.constexpr, WINDOW: tl.constexpr, SPLIT_PAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Places lo..near..hi in the plan: the pages of a split that the tile may see, and from `near`
    on those of which a row may be ahead of a query or have a bias. What is near follows from base
    and pq alone. With a window the split begins at position (first_split + split) * SPLIT_KEYS."""
    SPLIT_KEYS: tl.constexpr = SPLIT_PAGES * R
    begin, end = 0, count
    if WINDOW is None:
        begin = split * SPLIT_PAGES
        end = tl.minimum(begin + SPLIT_PAGES, count)
    lo, near, hi = begin, begin, begin
    for place in range(begin, end, BLOCK):
        offs = place + tl.arange(0, BLOCK)
        base = tl.load(base_ptr + offs, mask=offs < end, other=1 << 62)
        until = base < pq + num_tokens
        before = offs < begin
        if WINDOW is not None:
            first = (first_split + split) * SPLIT_KEYS
            # a page that begins before the first split and reaches into the window is the first's
            before = ((base < first) & (split > 0)) | (base + R + WINDOW <= pq + 1)
            until = until & (base < first + SPLIT_KEYS)
        lo += tl.sum(before.to(tl.int32), axis=0)
        hi += tl.sum(until.to(tl.int32), axis=0)
        near += tl.sum((before | (until & (base + span + X <= pq + 1))).to(tl.int32), axis=0)
    hi = tl.maximum(lo, hi)
    return lo, tl.minimum(near, hi), hi


@triton.jit
def _bias(
    rel_q_k, table_ptr, i_q, key_r, num_tokens, B, X: tl.constexpr, TILE: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """rel . table[:, distance], zero from X on. The products run over k, (token of the tile,
    feature): a row of the tile is multiplied by the profile at its own token's distances and by
    zeros elsewhere. A table of float32 goes as two terms of rel's dtype."""
    BLOCK_K: tl.constexpr = rel_q_k.shape[1]
    bias_q_r = tl.zeros([rel_q_k.shape[0], key_r.shape[0]], tl.float32)
    for first in tl.static_range(0, TILE, BLOCK_K // BLOCK_B):
        i_k = first + tl.arange(0, BLOCK_K) // BLOCK_B
        b_k = tl.arange(0, BLOCK_K) % BLOCK_B
        x_k_r = i_k[:, None] - key_r[None, :]
        mask_k_r = ((b_k < B) & (i_k < num_tokens))[:, None] & (x_k_r >= 0) & (x_k_r < X)
        table_k_r = tl.load(table_ptr + b_k[:, None] * X + x_k_r, mask=mask_k_r, other=0.0)
        own_q_k = tl.where(i_q[:, None] == i_k[None, :], rel_q_k, 0.0)
        high_k_r = table_k_r.to(rel_q_k.dtype)
        bias_q_r = tl.dot(own_q_k, high_k_r, bias_q_r, input_precision="ieee")
        if table_k_r.dtype != rel_q_k.dtype:
            low_k_r = (table_k_r - high_k_r.to(tl.float32)).to(rel_q_k.dtype)
            bias_q_r = tl.dot(own_q_k, low_k_r, bias_q_r, input_precision="ieee")
    return bias_q_r


@triton.jit
def _attend(
    m_q, l_q_16, acc_q_c, q_q_c, rel_q_k, tau_q, i_q, num_tokens, pq, lo, hi, g,
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, page_ptr, base_ptr, rows_ptr, position_ptr, table_ptr,
    scale, softcap, B, G: tl.constexpr, C: tl.constexpr, R: tl.constexpr, X: tl.constexpr,
    WINDOW: tl.constexpr, NEAR: tl.constexpr, TAU: tl.constexpr, SOFTCAP: tl.constexpr,
    TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The online softmax over pages lo..hi. Sums are written as fma where a compiler might choose,
    and the exponent takes the maximum in natural units, so that nothing before it is contracted."""
    offs_c = tl.arange(0, q_q_c.shape[1])
    offs_r = tl.arange(0, BLOCK_R)
    offs_r_c = offs_r[:, None] * C + offs_c[None, :]
    for place in range(lo, hi):
        page = tl.load(page_ptr + place).to(tl.int64)
        seen_r = offs_r < tl.minimum(tl.load(rows_ptr + place), R)
        visible_q_r = tl.broadcast_to(seen_r[None, :], [q_q_c.shape[0], BLOCK_R])
        if NEAR or WINDOW is not None:
            if position_ptr is None:
                delta = tl.maximum(tl.load(base_ptr + place) - pq, -(1 << 30))
                key_r = delta.to(tl.int32) + offs_r  # of the tile's first token to the key
            else:
                position_r = tl.load(position_ptr + page * R + offs_r, mask=seen_r, other=0)
                delta_r = tl.minimum(tl.maximum(position_r - pq, -(1 << 30)), 1 << 30)
                key_r = delta_r.to(tl.int32)
            distance_q_r = i_q[:, None] - key_r[None, :]
            seen_r = seen_r & (key_r < num_tokens)
            visible_q_r = (distance_q_r >= 0) & seen_r[None, :]
            if WINDOW is not None:
                seen_r = seen_r & (key_r + WINDOW > 0)
                visible_q_r = visible_q_r & (distance_q_r < WINDOW)
        row = (page * G + g) * R
        mask_r_c = seen_r[:, None] & (offs_c < C)[None, :]
        k_r_c = tl.load(k_ptr + row * C + offs_r_c, mask=mask_r_c, other=0.0).to(q_q_c.dtype)
        qk_q_r = tl.dot(q_q_c, k_r_c.T, input_precision="ieee")
        if k_scale_ptr is not None:
            qk_q_r *= tl.load(k_scale_ptr + row + offs_r, mask=seen_r, other=0.0)[None, :]
        if NEAR and X > 0:
            bias_q_r = _bias(rel_q_k, table_ptr, i_q, key_r, num_tokens, B, X, TILE, BLOCK_B)
            s_q_r = tl.fma(qk_q_r, tl.full(qk_q_r.shape, scale, tl.float32), bias_q_r)
        else:
            s_q_r = qk_q_r * scale
        if TAU:
            s_q_r *= tau_q[:, None]
        if SOFTCAP:
            s_q_r = softcap - 2.0 * softcap / (1.0 + tl.exp(s_q_r * (2.0 / softcap)))
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
    q_q_c, rel_q_k, tau_q, i_q, num_tokens, pq, split, first_split, count, g,
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, page_ptr, base_ptr, rows_ptr, position_ptr, table_ptr,
    span, scale, softcap, B, G: tl.constexpr, C: tl.constexpr, R: tl.constexpr, X: tl.constexpr,
    WINDOW: tl.constexpr, TAU: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT_PAGES: tl.constexpr,
    TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """(maximum, sum sixteen times, weighted values) of one split."""
    lo, near, hi = _pages_of(base_ptr, count, split, first_split, pq, num_tokens, span,
                             R, X, WINDOW, SPLIT_PAGES, 64)  # fmt: skip
    m_q = tl.full([q_q_c.shape[0]], float("-inf"), tl.float32)
    l_q_16 = tl.zeros([q_q_c.shape[0], 16], tl.float32)
    acc_q_c = tl.zeros(q_q_c.shape, tl.float32)
    m_q, l_q_16, acc_q_c = _attend(
        m_q, l_q_16, acc_q_c, q_q_c, rel_q_k, tau_q, i_q, num_tokens, pq, lo, near, g,
        k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, page_ptr, base_ptr, rows_ptr, position_ptr,
        table_ptr, scale, softcap, B, G, C, R, X, WINDOW, False, TAU, SOFTCAP, TILE,
        BLOCK_R, BLOCK_B,
    )  # fmt: skip
    return _attend(
        m_q, l_q_16, acc_q_c, q_q_c, rel_q_k, tau_q, i_q, num_tokens, pq, near, hi, g,
        k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, page_ptr, base_ptr, rows_ptr, position_ptr,
        table_ptr, scale, softcap, B, G, C, R, X, WINDOW, True, TAU, SOFTCAP, TILE,
        BLOCK_R, BLOCK_B,
    )  # fmt: skip


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
