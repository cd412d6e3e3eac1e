"""Device functions of moe_route: a stable counting sort of assignments by expert, and its blocks.

Each group of GROUP_T tokens counts its experts by itself; the last to finish adds the counts up and
puts every assignment in its place.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# Triton's types know neither static_range nor launch options.

# Dimension key: T tokens, K experts chosen per token, A = T * K assignments, E experts,
# G groups of GROUP_T tokens, B blocks.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_group(
    expert_t_k,
    place_ptr,                # out  [A]     how many in the group before it have the same expert
    count_ptr,                # out  [G, E]
    group, T,
    K: tl.constexpr, E: tl.constexpr, GROUP_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Ids outside 0..E-1 count nowhere; an expert may come more than once in a token's row."""
    t = group.to(tl.int64) * GROUP_T + tl.arange(0, GROUP_T)
    offs_e, offs_k = tl.arange(0, BLOCK_E), tl.arange(0, expert_t_k.shape[1])
    expert_t_k = tl.where(expert_t_k < E, expert_t_k, -1)
    count_t_e = tl.zeros([GROUP_T, BLOCK_E], tl.int32)
    for k in range(K):
        expert_t = tl.sum(tl.where(offs_k[None, :] == k, expert_t_k, 0), axis=1)
        count_t_e += (expert_t[:, None] == offs_e[None, :]).to(tl.int32)
    count_ptr += group.to(tl.int64) * E
    tl.store(count_ptr + offs_e, tl.sum(count_t_e, axis=0), mask=offs_e < E)
    before_t_e = tl.cumsum(count_t_e, axis=0) - count_t_e
    for k in range(K):
        expert_t = tl.sum(tl.where(offs_k[None, :] == k, expert_t_k, 0), axis=1)
        same_t_e = expert_t[:, None] == offs_e[None, :]
        place_t = tl.sum(tl.where(same_t_e, before_t_e, 0), axis=1)
        tl.store(place_ptr + t * K + k, place_t, mask=t < T)
        before_t_e += same_t_e.to(tl.int32)


@triton.jit
def count_chosen(
    chosen_t_i,               # whether the token chose what has place i
    place_t_n, mask_t_n,      # places of what it chose, all different, and which are any
    expert_i, mask_i,
    place_ptr,                # out  [A]     as of `count_group`
    count_ptr,                # out  [G, E]
    group, T,
    K: tl.constexpr, E: tl.constexpr, GROUP_T: tl.constexpr,
):  # fmt: skip
    """`count_group` for tokens in warps of their own: one sum over the group, of four bits for each
    token and expert."""
    tl.static_assert(GROUP_T == 8, "counts of up to 8 tokens in 8 fields of 4 bits")
    BLOCK_N: tl.constexpr = place_t_n.shape[1]
    offs_t = tl.arange(0, GROUP_T)
    t = group.to(tl.int64) * GROUP_T + offs_t
    # Field s counts the choices of the tokens 0..s.
    field_t = tl.full([GROUP_T], 0x11111111, tl.int32) << (4 * offs_t)
    chosen_t_i = chosen_t_i & (t < T)[:, None]
    fields_i = tl.sum(tl.where(chosen_t_i, field_t[:, None], 0), axis=0)
    count_ptr += group.to(tl.int64) * E
    tl.store(count_ptr + expert_i, (fields_i >> 28) & 15, mask=mask_i)
    fields_tn = tl.gather(fields_i, tl.reshape(place_t_n, [GROUP_T * BLOCK_N]), axis=0)
    fields_t_n = tl.reshape(fields_tn, [GROUP_T, BLOCK_N])
    before_t_n = ((fields_t_n >> (4 * offs_t)[:, None]) & 15) - 1
    place_ptr_t_n = place_ptr + t[:, None] * K + tl.arange(0, BLOCK_N)[None, :]
    tl.store(place_ptr_t_n, before_t_n, mask=mask_t_n)


@triton.jit
def _store_blocks(schedule_ptr, total_e, first_e, block_e, blocks_e, offs_e, MAX_BLOCKS, SIZE):
    """Begin and expert of the blocks, as `Schedule` says."""
    begin_ptr, expert_ptr = schedule_ptr + 1, schedule_ptr + 2 + MAX_BLOCKS
    for i in range(tl.max(blocks_e, axis=0)):
        mask_e = i < blocks_e
        tl.store(expert_ptr + block_e + i, offs_e, mask=mask_e)
        tl.store(begin_ptr + block_e + i, first_e + i * SIZE, mask=mask_e)
    # What follows the last expert's.
    mask_e = offs_e == offs_e.shape[0] - 1
    tl.store(schedule_ptr + 0 * offs_e, block_e + blocks_e, mask=mask_e)
    tl.store(begin_ptr + block_e + blocks_e, first_e + total_e, mask=mask_e)


@triton.jit
def _load_assignments(expert_ptr, place_ptr, a, num_assignments):
    mask_a = a < num_assignments
    expert_a = tl.load(expert_ptr + a, mask=mask_a, other=-1, cache_modifier=".cg")
    return expert_a, tl.load(place_ptr + a, mask=mask_a, other=0, cache_modifier=".cg")


@triton.jit
def build_schedule(
    expert_ptr, place_ptr,    # in   [A]
    count_ptr,                # in   [G, E]
    before_ptr,               # work [G, E]  assignments of earlier groups to the expert
    first_ptr,                # work [E]     where the expert's assignments begin
    schedule_ptr,             # out          see Schedule
    T, MAX_BLOCKS, BLOCK_SIZE,
    K: tl.constexpr, E: tl.constexpr, GROUP_T: tl.constexpr,
    BLOCK_E: tl.constexpr, SUM_G: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    offs_e, offs_a = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_A)
    mask_e = offs_e < E
    # The first assignments arrive with the first counts.
    expert_a, place_a = _load_assignments(expert_ptr, place_ptr, offs_a, T * K)
    total_e = tl.zeros([BLOCK_E], tl.int32)
    num_groups = tl.cdiv(T, GROUP_T)
    count_g_ptr, before_g_ptr = count_ptr, before_ptr
    for start in range(0, num_groups, SUM_G):
        # All loads before the first store, which might be to where they read.
        counts = ()
        for i in tl.static_range(SUM_G):
            mask_g_e = mask_e & (start + i < num_groups)
            ptr_e = count_g_ptr + i * E + offs_e
            counts += (tl.load(ptr_e, mask=mask_g_e, other=0, cache_modifier=".cg"),)
        for i in tl.static_range(SUM_G):
            mask_g_e = mask_e & (start + i < num_groups)
            tl.store(before_g_ptr + i * E + offs_e, total_e, mask=mask_g_e)
            total_e += counts[i]
        count_g_ptr += SUM_G * E
        before_g_ptr += SUM_G * E
    # Two prefix sums in one: of assignments in the low half, of blocks in the high one.
    blocks_e = (total_e + BLOCK_SIZE - 1) // BLOCK_SIZE
    both_e = (blocks_e.to(tl.int64) << 32) + total_e
    sums_e = tl.cumsum(both_e, axis=0) - both_e
    first_e, block_e = sums_e.to(tl.int32), (sums_e >> 32).to(tl.int32)
    tl.store(first_ptr + offs_e, first_e, mask=mask_e)
    _store_blocks(schedule_ptr, total_e, first_e, block_e, blocks_e, offs_e, MAX_BLOCKS, BLOCK_SIZE)
    tl.debug_barrier()  # what was just stored is read by other threads

    order_ptr = schedule_ptr + 2 + 2 * MAX_BLOCKS
    for start in range(0, T * K, BLOCK_A):
        a = start + offs_a
        valid_a = (expert_a >= 0) & (expert_a < E)
        before_ptr_a = before_ptr + (a // (GROUP_T * K)).to(tl.int64) * E + expert_a
        place_a += tl.load(before_ptr_a, mask=valid_a, other=0, cache_modifier=".cg")
        place_a += tl.load(first_ptr + expert_a, mask=valid_a, other=0, cache_modifier=".cg")
        tl.store(order_ptr + place_a, a, mask=valid_a)
        expert_a, place_a = _load_assignments(expert_ptr, place_ptr, a + BLOCK_A, T * K)
