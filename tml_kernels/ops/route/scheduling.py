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
def is_last(counter_ptr, num_arrivals):
    """Whether all other programs arrived before. Then it sees all they stored, through loads that
    pass by the L1 cache, and the counter is zero again."""
    tl.debug_barrier()  # one thread arrives for all: their stores come first
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_arrivals - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


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
def _store_blocks(schedule_ptr, total_e, first_e, offs_e, MAX_BLOCKS, BLOCK_SIZE):
    """Number, begin and expert of the blocks, as `Schedule` says."""
    begin_ptr, expert_ptr = schedule_ptr + 1, schedule_ptr + 2 + MAX_BLOCKS
    blocks_e = (total_e + BLOCK_SIZE - 1) // BLOCK_SIZE
    block_e = tl.cumsum(blocks_e, axis=0) - blocks_e
    for i in range(tl.max(blocks_e, axis=0)):
        mask_e = i < blocks_e
        tl.store(expert_ptr + block_e + i, offs_e, mask=mask_e)
        tl.store(begin_ptr + block_e + i, first_e + i * BLOCK_SIZE, mask=mask_e)
    num_blocks = tl.sum(blocks_e, axis=0)
    tl.store(schedule_ptr, num_blocks)
    tl.store(begin_ptr + num_blocks, tl.sum(total_e, axis=0))


@triton.jit
def build_schedule(
    expert_ptr, place_ptr,    # in   [A]
    count_ptr,                # in   [G, E]
    before_ptr,               # work [G, E]  assignments of earlier groups to the expert
    first_ptr,                # work [E]     where the expert's assignments begin
    schedule_ptr,             # out          see Schedule
    T, MAX_BLOCKS, BLOCK_SIZE,
    K: tl.constexpr, E: tl.constexpr, GROUP_T: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    total_e = tl.zeros([BLOCK_E], tl.int32)
    num_groups = tl.cdiv(T, GROUP_T)
    for start in range(0, num_groups, BLOCK_G):
        offs_g = (start + tl.arange(0, BLOCK_G)).to(tl.int64)
        offs_g_e = offs_g[:, None] * E + offs_e[None, :]
        mask_g_e = (offs_g < num_groups)[:, None] & mask_e[None, :]
        count_g_e = tl.load(count_ptr + offs_g_e, mask=mask_g_e, other=0, cache_modifier=".cg")
        before_g_e = total_e[None, :] + tl.cumsum(count_g_e, axis=0) - count_g_e
        tl.store(before_ptr + offs_g_e, before_g_e, mask=mask_g_e)
        total_e += tl.sum(count_g_e, axis=0)
    first_e = tl.cumsum(total_e, axis=0) - total_e
    tl.store(first_ptr + offs_e, first_e, mask=mask_e)
    _store_blocks(schedule_ptr, total_e, first_e, offs_e, MAX_BLOCKS, BLOCK_SIZE)
    tl.debug_barrier()  # what was just stored is read by other threads

    order_ptr = schedule_ptr + 2 + 2 * MAX_BLOCKS
    for start in range(0, T * K, BLOCK_A):
        a = start + tl.arange(0, BLOCK_A)
        expert_a = tl.load(expert_ptr + a, mask=a < T * K, other=-1, cache_modifier=".cg")
        place_a = tl.load(place_ptr + a, mask=a < T * K, other=0, cache_modifier=".cg")
        valid_a = (expert_a >= 0) & (expert_a < E)
        before_ptr_a = before_ptr + (a // (GROUP_T * K)).to(tl.int64) * E + expert_a
        place_a += tl.load(before_ptr_a, mask=valid_a, other=0, cache_modifier=".cg")
        place_a += tl.load(first_ptr + expert_a, mask=valid_a, other=0, cache_modifier=".cg")
        tl.store(order_ptr + place_a, a, mask=valid_a)
