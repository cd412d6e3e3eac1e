"""Triton kernels of expert_mlp: gate-up with its activation, then down with the weighted sum.

A program owns a tile of weight rows and the tokens of one block: those that one routed expert
has been given (or a part of them), or some of all tokens for a shared expert. Shared blocks come
first, as their number is known; programs past the last routed block end at once.

Combining needs no third launch and no atomics on values. Every (token, slot) writes its weighted
row apart, in float32; a counter for each (token, tile) says who wrote last, and that program adds
the slots in their order. The first launch clears the counters, so a workspace may hold anything.
"""

# Dimension key: T tokens, D model width, K experts chosen per token, Z shared experts, S = K + Z
# slots of a token, A = T * K assignments, B blocks, F expert width, J = 2 F gate and up rows;
# M weight rows of a tile, N tokens of a block.

# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .products import bias_of, either_bias, either_tile, expert_tile


@triton.jit
def _local_expert(id, E, map_ptr, num_local, mask):
    """The row of the weights that an id names, a negative number when it is skipped, as where a
    map names none of the num_local rows. Scalar or vector."""
    inside = mask & (id >= 0) & (id < E)
    if map_ptr is not None:
        local = tl.load(map_ptr + id, mask=inside, other=-1)
        inside = inside & (local < num_local)
    else:
        local = id
    return tl.where(inside, local, -1)


@triton.jit
def _find_block(
    block, expert_ptr, map_ptr, num_local, num_blocks_ptr, block_expert_ptr, E, shared_blocks,
    blocks_per_shared, SCHEDULED: tl.constexpr,
):  # fmt: skip
    """Whose weights a block takes, -1 for no work. Shared blocks come first. Past the last block
    the table holds anything."""
    is_shared = block < shared_blocks
    routed = tl.maximum(block - shared_blocks, 0)
    if SCHEDULED:
        num_blocks = tl.load(num_blocks_ptr)
        id = tl.load(block_expert_ptr + routed, mask=~is_shared, other=-1)
        id = tl.where(routed < num_blocks, id, -1)
    else:
        id = tl.load(expert_ptr + routed, mask=~is_shared, other=-1)
    expert = _local_expert(id, E, map_ptr, num_local, ~is_shared)
    return tl.where(is_shared, block // blocks_per_shared, expert)


@triton.jit
def _bounds_of(
    block, begin_ptr, T, shared_blocks, blocks_per_shared,
    SCHEDULED: tl.constexpr, BLOCK_N: tl.constexpr, AGAIN: tl.constexpr = False,
):  # fmt: skip
    """(begin, end): which of its list of tokens; anything past the last block. AGAIN: the same for
    the code after the product. All that follows from these would otherwise be kept in registers
    through its loop, in a copy for each layout: 50 of a thread's. The cache modifier is the
    default; that it is said makes this another load to the compiler."""
    is_shared = block < shared_blocks
    routed = tl.maximum(block - shared_blocks, 0)
    if SCHEDULED:
        cache: tl.constexpr = ".ca" if AGAIN else ""
        begin = tl.load(begin_ptr + routed, mask=~is_shared, other=0, cache_modifier=cache)
        end = tl.load(begin_ptr + routed + 1, mask=~is_shared, other=0, cache_modifier=cache)
    else:
        begin, end = routed, routed + 1
    begin = tl.where(is_shared, block % blocks_per_shared * BLOCK_N, begin)
    return begin, tl.where(is_shared, T, end)


@triton.jit
def _slots_of(
    begin, end, expert, is_shared, order_ptr,
    K: tl.constexpr, S: tl.constexpr, SCHEDULED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(slot_n, mask_n): the rows t * S + slot of a block's tokens."""
    offs_n = begin + tl.arange(0, BLOCK_N)
    mask_n = offs_n < end
    a_n = offs_n
    if SCHEDULED:
        a_n = tl.load(order_ptr + offs_n, mask=mask_n & ~is_shared, other=0)
    slot_n = tl.where(is_shared, offs_n * S + K + expert, a_n // K * S + a_n % K)
    return tl.where(mask_n, slot_n, 0), mask_n


@triton.jit
def _num_valid(t_n, mask_n, expert_ptr, map_ptr, num_local, E, K: tl.constexpr):
    """How many of each token's K ids are not skipped."""
    num_n = tl.zeros_like(t_n)
    for k in range(K):
        id_n = tl.load(expert_ptr + t_n.to(tl.int64) * K + k, mask=mask_n, other=-1)
        expert_n = _local_expert(id_n, E, map_ptr, num_local, mask_n)
        num_n += (expert_n >= 0).to(tl.int32)
    return num_n


@triton.jit
def _gated(acc_m_n, ACTIVATION: tl.constexpr):
    """h_f_n of a tile whose upper half of rows is gates and whose lower half is ups."""
    HALF: tl.constexpr = acc_m_n.shape[0] // 2
    pair_f_n_2 = tl.permute(tl.reshape(acc_m_n, [2, HALF, acc_m_n.shape[1]]), [1, 2, 0])
    gate_f_n, up_f_n = tl.split(pair_f_n_2)
    return _activate(gate_f_n, up_f_n, ACTIVATION)


@triton.jit
def _activate(gate_m_n, up_m_n, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return gate_m_n / (1.0 + tl.exp(-gate_m_n)) * up_m_n
    elif ACTIVATION == "gelu":
        return 0.5 * gate_m_n * (1.0 + tl.erf(gate_m_n * 0.7071067811865476)) * up_m_n
    elif ACTIVATION == "gelu_tanh":
        inner_m_n = 0.7978845608028654 * (gate_m_n + 0.044715 * gate_m_n * gate_m_n * gate_m_n)
        return gate_m_n / (1.0 + tl.exp(-2.0 * inner_m_n)) * up_m_n
    else:
        tl.static_assert(ACTIVATION == "swiglu_oai", "unknown activation")
        gate_m_n = tl.minimum(gate_m_n, 7.0)
        up_m_n = tl.clamp(up_m_n, -7.0, 7.0)
        return (up_m_n + 1.0) * gate_m_n / (1.0 + tl.exp(-1.702 * gate_m_n))


@triton.jit
def _prepare(
    program, num_programs, expert_ptr, map_ptr, num_local, counter_ptr, out_ptr,
    T, D, E, num_counters, K: tl.constexpr, Z: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Clear this program's share of the counters, and the rows that no expert will write."""
    offs = tl.arange(0, BLOCK)
    for begin in range(program * BLOCK, num_counters, num_programs * BLOCK):
        tl.store(counter_ptr + begin + offs, 0, mask=begin + offs < num_counters)
    if Z == 0:
        for t in range(program, T, num_programs):
            offs_t = t + tl.zeros([1], tl.int32)
            valid_t = _num_valid(offs_t, offs_t < T, expert_ptr, map_ptr, num_local, E, K)
            empty = tl.max(valid_t) == 0
            for begin in range(0, D, BLOCK):
                mask = (begin + offs < D) & empty
                zero = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
                tl.store(out_ptr + offs_t.to(tl.int64) * D + begin + offs, zero, mask=mask)


@triton.jit
def _rows_of(f_m, up_m, F, ORDER: tl.constexpr, EVEN_M: tl.constexpr):
    """Rows of w13 with gate (up_m = 0) or up (1) of hidden column f; 2 F where there is none."""
    if ORDER == "gate_up":
        row_m = f_m + up_m * F
    elif ORDER == "up_gate":
        row_m = f_m + (1 - up_m) * F
    else:
        tl.static_assert(ORDER == "interleaved", "unknown order")
        row_m = 2 * f_m + up_m
    # Where every column is there, a thread's rows are a constant apart: one address for all.
    return row_m if EVEN_M else tl.where(f_m < F, row_m, 2 * F)


# What changes from step to step: a kernel must not depend on whether it is 1 or a multiple of 16.
SIZES = ["T", "shared_blocks", "blocks_per_shared", "num_counters"]
TABLES = ["num_blocks_ptr", "begin_ptr", "block_expert_ptr", "order_ptr"]
GIVEN = ["expert_ptr", "weight_ptr", "shared_weight_ptr"]
INV_RMS = "inv_rms_ptr"


@triton.jit(do_not_specialize=[*SIZES, *TABLES, GIVEN[0], INV_RMS])
def gate_up_kernel(
    x_ptr, inv_rms_ptr,                               # in   [T, D]; [T], or None: x is normed
    w_ptr, scale_ptr, zero_ptr, outer_ptr, bias_ptr,  # in   [E, J, D] in its format; [E, J]
    shared_w_ptr, shared_scale_ptr, shared_zero_ptr, shared_outer_ptr, shared_bias_ptr,
    expert_ptr, map_ptr,                              # in   [T, K]; [E]
    num_blocks_ptr, begin_ptr, block_expert_ptr, order_ptr,  # in  [1], [B + 1], [B], [A]
    h_ptr,                                            # out  [T * S, H]  by token and slot
    counter_ptr, out_ptr,                             # out  [.] cleared; [T, D] rows without work
    T, D, E, num_local, F, SHARED_F, H, shared_blocks, blocks_per_shared, num_counters,
    K: tl.constexpr, Z: tl.constexpr, SCHEDULED: tl.constexpr, ACTIVATION: tl.constexpr,
    FORMAT: tl.constexpr, ORDER: tl.constexpr,
    SHARED_FORMAT: tl.constexpr, SHARED_ORDER: tl.constexpr, ALIKE: tl.constexpr,
    QUANTIZE_X: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_M // 2
    S: tl.constexpr = K + Z
    program = tl.program_id(0)
    _prepare(program, tl.num_programs(0), expert_ptr, map_ptr, num_local, counter_ptr, out_ptr,
             T, D, E, num_counters, K, Z, 1024)  # fmt: skip

    shared_tiles = tl.cdiv(SHARED_F, HALF)
    tiles = tl.cdiv(F, HALF)
    routed = program - shared_blocks * shared_tiles
    is_shared = routed < 0
    block = tl.where(is_shared, program // shared_tiles, shared_blocks + routed // tiles)
    tile = tl.where(is_shared, program % shared_tiles, routed % tiles)
    begin, end = _bounds_of(block, begin_ptr, T, shared_blocks, blocks_per_shared,
                            SCHEDULED, BLOCK_N)  # fmt: skip
    expert = _find_block(block, expert_ptr, map_ptr, num_local, num_blocks_ptr, block_expert_ptr,
                         E, shared_blocks, blocks_per_shared, SCHEDULED)  # fmt: skip
    if expert >= 0:
        slot_n, mask_n = _slots_of(begin, end, expert, is_shared, order_ptr,
                                   K, S, SCHEDULED, BLOCK_N)  # fmt: skip
        x_row_n = (slot_n // S).to(tl.int64) * D
        offs_m = tl.arange(0, BLOCK_M)
        f_m = tile * HALF + offs_m % HALF
        if Z > 0 and not ALIKE and is_shared:
            row_m = _rows_of(f_m, offs_m // HALF, SHARED_F, SHARED_ORDER, EVEN_M)
            acc_m_n = expert_tile(
                x_ptr, x_row_n, mask_n, shared_w_ptr, shared_scale_ptr, shared_zero_ptr,
                shared_outer_ptr, expert, row_m, 2 * SHARED_F, D,
                SHARED_FORMAT, QUANTIZE_X, EVEN_M, EVEN_W, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            bias_m = bias_of(shared_bias_ptr, expert, row_m, 2 * SHARED_F)
        else:
            row_m = _rows_of(f_m, offs_m // HALF, F, ORDER, EVEN_M)
            acc_m_n = either_tile(
                is_shared, x_ptr, x_row_n, mask_n, w_ptr, scale_ptr, zero_ptr, outer_ptr,
                shared_w_ptr, shared_scale_ptr, shared_zero_ptr, shared_outer_ptr,
                expert, row_m, 2 * F, D, ALIKE,
                FORMAT, QUANTIZE_X, EVEN_M, EVEN_W, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            bias_m = either_bias(is_shared, bias_ptr, shared_bias_ptr, expert, row_m, 2 * F, ALIKE)
        begin, end = _bounds_of(block, begin_ptr, T, shared_blocks, blocks_per_shared,
                                SCHEDULED, BLOCK_N, AGAIN=True)  # fmt: skip
        slot_n, mask_n = _slots_of(begin, end, expert, is_shared, order_ptr,
                                   K, S, SCHEDULED, BLOCK_N)  # fmt: skip
        if inv_rms_ptr is not None:
            inv_rms_n = tl.load(inv_rms_ptr + slot_n // S, mask=mask_n, other=0.0)
            acc_m_n *= inv_rms_n[None, :]
        if bias_ptr is not None or shared_bias_ptr is not None:
            acc_m_n += bias_m[:, None]
        h_f_n = _gated(acc_m_n, ACTIVATION)
        offs_f = tile * HALF + tl.arange(0, HALF)
        width = tl.where(is_shared, SHARED_F, F)
        h_ptrs = h_ptr + slot_n.to(tl.int64)[:, None] * H + offs_f[None, :]
        tl.store(h_ptrs, h_f_n.T, mask=mask_n[:, None] & (offs_f < width)[None, :])


@triton.jit(do_not_specialize=[*SIZES[:3], *TABLES, *GIVEN])
def down_kernel(
    h_ptr,                                            # in   [T * S, H]  by token and slot
    w_ptr, scale_ptr, zero_ptr, outer_ptr, bias_ptr,  # in   [E, D, F] in its format; [E, D]
    shared_w_ptr, shared_scale_ptr, shared_zero_ptr, shared_outer_ptr, shared_bias_ptr,
    expert_ptr, map_ptr,                              # in   [T, K]; [E]
    weight_ptr, shared_weight_ptr,                    # in   [T, K]; [T, Z]
    num_blocks_ptr, begin_ptr, block_expert_ptr, order_ptr,  # in  [1], [B + 1], [B], [A]
    part_ptr, counter_ptr,                            # work [T * S, D]; [T, tiles] all zero
    out_ptr,                                          # out  [T, D]
    T, D, E, num_local, F, SHARED_F, H, shared_blocks, blocks_per_shared,
    K: tl.constexpr, Z: tl.constexpr, SCHEDULED: tl.constexpr,
    FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr, ALIKE: tl.constexpr,
    QUANTIZE_X: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = K + Z
    program = tl.program_id(0)
    tiles = tl.cdiv(D, BLOCK_M)
    block = program // tiles
    tile = program % tiles
    is_shared = block < shared_blocks
    begin, end = _bounds_of(block, begin_ptr, T, shared_blocks, blocks_per_shared,
                            SCHEDULED, BLOCK_N)  # fmt: skip
    expert = _find_block(block, expert_ptr, map_ptr, num_local, num_blocks_ptr, block_expert_ptr,
                         E, shared_blocks, blocks_per_shared, SCHEDULED)  # fmt: skip
    if expert >= 0:
        slot_n, mask_n = _slots_of(begin, end, expert, is_shared, order_ptr,
                                   K, S, SCHEDULED, BLOCK_N)  # fmt: skip
        h_row_n = slot_n.to(tl.int64) * H
        row_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        if Z > 0 and not ALIKE and is_shared:
            acc_m_n = expert_tile(
                h_ptr, h_row_n, mask_n, shared_w_ptr, shared_scale_ptr, shared_zero_ptr,
                shared_outer_ptr, expert, row_m, D, SHARED_F,
                SHARED_FORMAT, QUANTIZE_X, EVEN_M, EVEN_W, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            bias_m = bias_of(shared_bias_ptr, expert, row_m, D)
        else:
            acc_m_n = either_tile(
                is_shared, h_ptr, h_row_n, mask_n, w_ptr, scale_ptr, zero_ptr, outer_ptr,
                shared_w_ptr, shared_scale_ptr, shared_zero_ptr, shared_outer_ptr,
                expert, row_m, D, F, ALIKE,
                FORMAT, QUANTIZE_X, EVEN_M, EVEN_W, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            bias_m = either_bias(is_shared, bias_ptr, shared_bias_ptr, expert, row_m, D, ALIKE)
        if bias_ptr is not None or shared_bias_ptr is not None:
            acc_m_n += bias_m[:, None]
        begin, end = _bounds_of(block, begin_ptr, T, shared_blocks, blocks_per_shared,
                                SCHEDULED, BLOCK_N, AGAIN=True)  # fmt: skip
        slot_n, mask_n = _slots_of(begin, end, expert, is_shared, order_ptr,
                                   K, S, SCHEDULED, BLOCK_N)  # fmt: skip
        t_n, k_n = slot_n // S, slot_n % S
        weight_n = tl.load(weight_ptr + t_n * K + k_n, mask=mask_n & (k_n < K), other=0.0)
        if Z > 0:
            given_n = mask_n & (k_n >= K)
            weight_n += tl.load(shared_weight_ptr + t_n * Z + k_n - K, mask=given_n, other=0.0)
        y_n_m = (acc_m_n * weight_n[None, :]).T
        part_ptrs = part_ptr + slot_n.to(tl.int64)[:, None] * D + row_m[None, :]
        tl.store(part_ptrs, y_n_m, mask=mask_n[:, None] & (row_m < D)[None, :])
        _combine(t_n, mask_n, row_m, tile, tiles, expert_ptr, map_ptr, num_local, part_ptr,
                 counter_ptr, out_ptr, D, E, K, Z, BLOCK_M, BLOCK_N)  # fmt: skip


@triton.jit
def _combine(
    t_n, mask_n, row_m, tile, tiles, expert_ptr, map_ptr, num_local, part_ptr, counter_ptr, out_ptr,
    D, E, K: tl.constexpr, Z: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add up the slots of the tokens whose last row has just been written, in slot order."""
    num_n = _num_valid(t_n, mask_n, expert_ptr, map_ptr, num_local, E, K) + Z
    tl.debug_barrier()  # every thread's rows are written before one thread counts them
    before_n = tl.atomic_add(counter_ptr + t_n * tiles + tile, 1, mask=mask_n, sem="acq_rel")
    last_n = mask_n & (before_n == num_n - 1)
    tl.debug_barrier()
    if tl.max(last_n.to(tl.int32), axis=0) > 0:
        y_n_m = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for slot in range(K + Z):
            mask_n_m = last_n[:, None] & (row_m < D)[None, :]
            if slot < K:
                id_n = tl.load(expert_ptr + t_n * K + slot, mask=mask_n, other=-1)
                mask_n_m &= (_local_expert(id_n, E, map_ptr, num_local, mask_n) >= 0)[:, None]
            offs_n = (t_n * (K + Z) + slot).to(tl.int64) * D
            part_ptrs = part_ptr + offs_n[:, None] + row_m[None, :]
            y_n_m += tl.load(part_ptrs, mask=mask_n_m, other=0.0, cache_modifier=".cg")
        out_ptrs = out_ptr + t_n.to(tl.int64)[:, None] * D + row_m[None, :]
        tl.store(out_ptrs, y_n_m, mask=last_n[:, None] & (row_m < D)[None, :])
