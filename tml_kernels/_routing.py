"""What the router decides and the expert kernels obey: ids, weights, and the order of the work."""

# Dimension key: T tokens, E routed experts, Z shared experts, K experts chosen per token,
# A = T * K assignments, B most blocks a step can have.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Up to this many tokens every assignment is a block of its own: an expert that two of them share is
# read twice (1.00 to 1.04 times the least bytes at the model's sizes), and nothing is sorted.
TOKEN_CENTRIC = 4

# The router's own cuts, the same for every number of tokens: each of its sums has one order.
SPLIT_D = 512  # columns of one partial product of the gate
GROUP_T = 8  # tokens that are scored, and whose experts are counted, together


@dataclass(frozen=True)
class Blocking:
    """How the assignments of a step are cut: in blocks of at most `size` tokens of one expert.

    scheduled: blocks are listed in a `Schedule`; otherwise assignment a is block a.
    """

    size: int
    scheduled: bool

    def max_blocks(self, num_tokens: int, top_k: int, num_experts: int) -> int:
        """The most blocks any routing of so many tokens needs: one for each expert touched, and
        one more for every `size` assignments."""
        num_assignments = num_tokens * top_k
        if not self.scheduled:
            return num_assignments
        touched = min(num_assignments, num_experts)
        return touched + (num_assignments - touched) // self.size


def choose_blocking(num_tokens: int, top_k: int, num_experts: int) -> Blocking:
    """Pure. A block is a product's narrow side: the smallest that holds twice the mean load, so
    that few experts need two; at most 64, where a program's sums fill its registers."""
    if num_tokens <= TOKEN_CENTRIC:
        return Blocking(16, scheduled=False)
    twice_mean = 2 * num_tokens * top_k / num_experts
    size = next((n for n in (16, 32) if twice_mean <= n), 64)
    return Blocking(size, scheduled=True)


@dataclass(frozen=True)
class Schedule:
    """Assignments sorted by expert and cut in blocks, in one int32 buffer on the device.

    Assignment a = t * K + k. Two blocks at most of 2 tokens; T = 3, K = 2, expert_T_K =
    [[5, 0], [2, 5], [5, 9]] with 8 experts, so that id 9 is skipped:

        order_A     = [1, 2, 0, 3, 4, .]   by expert, and by assignment within one
        num_blocks_1 = [4]
        expert_B    = [0, 2, 5, 5, ...]    of each block
        begin_B1    = [0, 1, 2, 4, 5, ...] block b is order_A[begin_B1[b] : begin_B1[b + 1]]

    What lies past the last block, and past the last valid assignment of the order, is undefined.
    """

    buffer: Tensor  # int32, [1 + (B + 1) + B + A]
    blocking: Blocking
    max_blocks: int  # B

    @classmethod
    def empty(
        cls,
        blocking: Blocking,
        num_tokens: int,
        top_k: int,
        num_experts: int,
        device: torch.device | str,
    ) -> Schedule:
        max_blocks = blocking.max_blocks(num_tokens, top_k, num_experts)
        size = 2 + 2 * max_blocks + num_tokens * top_k
        buffer = torch.empty(size, dtype=torch.int32, device=device)
        return cls(buffer, blocking, max_blocks)

    @property
    def num_blocks_1(self) -> Tensor:
        return self.buffer[:1]

    @property
    def begin_B1(self) -> Tensor:
        return self.buffer[1 : 2 + self.max_blocks]

    @property
    def expert_B(self) -> Tensor:
        return self.buffer[2 + self.max_blocks : 2 + 2 * self.max_blocks]

    @property
    def order_A(self) -> Tensor:
        return self.buffer[2 + 2 * self.max_blocks :]


@dataclass(frozen=True)
class Routing:
    """Who works on each token, and with which weight.

    Two tokens, K = 2, one shared expert: expert_T_K = [[5, 0], [2, 5]], weight_T_K =
    [[3.1, 2.7], [4.0, 0.5]], shared_weight_T_Z = [[2.2], [3.5]]. Here each row of weights, shared
    ones included, sums to scale * global_scale = 8. An id that is not in 0..num_experts - 1 is
    skipped: nothing is read for it, whatever its weight holds.

    schedule: on CUDA, and there only above a handful of tokens (`choose_blocking`). It is that of
    these very ids: one of another size is refused (of some of a routing's tokens, make a new one),
    one of the right size but of other ids cannot be detected and gives wrong results. scratch: what
    `moe_route` needs between its parts; None where the routing was not made by its kernel.
    inv_rms_T: where tokens come without the division of their norm, what makes up for it: token t
    stands for x[t] * inv_rms[t], in the router and in the experts.
    """

    expert_T_K: Tensor  # int32
    weight_T_K: Tensor  # float32
    shared_weight_T_Z: Tensor  # float32
    num_experts: int
    schedule: Schedule | None = None
    scratch: Tensor | None = None
    inv_rms_T: Tensor | None = None  # float32

    @classmethod
    def empty(
        cls,
        num_tokens: int,
        top_k: int,
        num_shared: int,
        num_experts: int,
        device: torch.device | str,
        *,
        width: int = 0,
        late_norm: bool = False,
    ) -> Routing:
        """A routing to be written by `moe_route(..., out=routing)`, as often as one likes.

        width: D of the tokens, 0 when logits or ids come ready. late_norm: with `inv_rms_T`.
        Schedule and scratch are those of `choose_blocking` on CUDA and None elsewhere.
        """
        shape = (num_tokens, top_k)
        return cls(
            torch.empty(shape, dtype=torch.int32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(num_tokens, num_shared, dtype=torch.float32, device=device),
            num_experts,
            *new_parts(num_tokens, top_k, num_shared, num_experts, device, width=width),
            torch.empty(num_tokens, dtype=torch.float32, device=device) if late_norm else None,
        )


def new_parts(
    num_tokens: int,
    top_k: int,
    num_shared: int,
    num_experts: int,
    device: torch.device | str,
    *,
    width: int = 0,
) -> tuple[Schedule | None, Tensor | None]:
    """Schedule and scratch of a routing on this device."""
    if torch.device(device).type != "cuda":
        return None, None
    blocking = choose_blocking(num_tokens, top_k, num_experts)
    schedule = None
    if blocking.scheduled:
        schedule = Schedule.empty(blocking, num_tokens, top_k, num_experts, device)
    scratch = new_scratch(num_tokens, top_k, num_shared, num_experts, device, width=width)
    return schedule, scratch


def scratch_sizes(
    num_tokens: int, top_k: int, num_logits: int, num_experts: int, width: int
) -> list[int]:
    """Words of the scratch's parts, each a multiple of 16 bytes: arrival counters; assignments of
    each group to each expert, and those of the groups before it; where each expert begins; each
    assignment's place among its group's to the same expert; partial logits; partial sums of squares
    (both float32)."""
    groups, splits = -(-num_tokens // GROUP_T), -(-width // SPLIT_D)
    counts = groups * num_experts
    partials = splits * num_tokens * round_up(num_logits)
    placed, squares = num_tokens * top_k, splits * num_tokens
    sizes = (groups + 1, counts, counts, num_experts, placed, partials, squares)
    return [round_up(size) for size in sizes]


def round_up(words: int) -> int:
    """To 16 bytes, the widest load."""
    return -(-words // 4) * 4


def new_scratch(
    num_tokens: int,
    top_k: int,
    num_shared: int,
    num_experts: int,
    device: torch.device | str,
    *,
    width: int = 0,
) -> Tensor:
    """int32; its counters are zero, as every launch finds and leaves them."""
    sizes = scratch_sizes(num_tokens, top_k, num_experts + num_shared, num_experts, width)
    scratch = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    scratch[: sizes[0]].zero_()
    return scratch


def check_schedule(
    name: str,
    schedule: Schedule | None,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    device: torch.device,
) -> None:
    """TypeError or ValueError unless a schedule has the size that routings of these sizes need:
    the kernels trust it. Whether it is of their ids would take a look at its values."""
    if schedule is None:
        return
    blocks = schedule.blocking.max_blocks(num_tokens, top_k, num_experts)
    words = 2 + 2 * blocks + num_tokens * top_k
    if schedule.max_blocks != blocks or schedule.buffer.shape != (words,):
        raise ValueError(
            f"{name}: expected {blocks} blocks in {words} words, got "
            f"{schedule.max_blocks} in {tuple(schedule.buffer.shape)}"
        )
    check_words(f"{name}.buffer", schedule.buffer, words, device)


def check_words(name: str, tensor: Tensor, words: int, device: torch.device) -> None:
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name}: expected torch.int32, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
    if tensor.numel() < words or not tensor.is_contiguous():
        raise ValueError(f"{name}: expected {words} words in a row, got {tuple(tensor.shape)}")
