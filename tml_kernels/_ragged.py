"""The ragged descriptor of a call, for the plain paths: checks of its values, which a kernel trusts
its caller with, and where a convolution's taps lie."""

# Dimension key: T tokens, S session rows, A of them that are not idle.

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

ANY_SLOT = 2**31 - 1  # number of slots where there is no state to have rows for


class Taps(NamedTuple):
    """Rows of `source`, which is three state rows of every session row and then the tokens."""

    live_T: Tensor  # bool: the token belongs to a session row that is not idle
    tap_T_4: Tensor  # the three inputs before each token, and itself; of tokens not live: itself
    active_A: Tensor  # the session rows that are not idle
    tail_A_3: Tensor  # the last three inputs of each of them, its next state


def taps_of(start_S1: Tensor, slot_S: Tensor, num_tokens: int) -> Taps:
    """Of convolutions of four taps. On the CPU remembered: do not write to what it returns.

    start = [0, 2, 2, 3], slot = [5, 0, -1]: source rows 0..8 are states, 9, 10 and 11 the tokens;
    tap = [[0, 1, 2, 9], [1, 2, 9, 10], [11, 11, 11, 11]], active = [0, 1],
    tail = [[2, 9, 10], [3, 4, 5]].
    """
    if start_S1.is_cuda:  # reading the values would synchronise
        return _taps(start_S1.long(), slot_S, num_tokens)
    return _remembered_taps(tuple(start_S1.tolist()), tuple(slot_S.tolist()), num_tokens)


@functools.lru_cache(maxsize=256)
def _remembered_taps(start: tuple[int, ...], slot: tuple[int, ...], num_tokens: int) -> Taps:
    with torch.inference_mode(False):  # else these tensors could not be used outside of it
        return _taps(torch.tensor(start), torch.tensor(slot, dtype=torch.int64), num_tokens)


def _taps(start_S1: Tensor, slot_S: Tensor, num_tokens: int) -> Taps:
    num_rows, device = slot_S.shape[0], slot_S.device
    t_T = torch.arange(num_tokens, device=device)
    back_4 = torch.arange(-3, 1, device=device)
    row_T = torch.searchsorted(start_S1[1:].contiguous(), t_T, right=True)  # S for padding
    live_T = torch.cat([slot_S, slot_S.new_full((1,), -1)])[row_T] >= 0

    def rows(row: Tensor, place: Tensor) -> Tensor:
        """Source row of the input at `place` in its session; negative places are the state."""
        in_call = 3 * num_rows + start_S1[row] + place
        return torch.where(place < 0, 3 * row + 3 + place, in_call)

    tap_T_4 = rows(row_T[:, None], (t_T - start_S1[row_T])[:, None] + back_4)
    tap_T_4 = torch.where(live_T[:, None], tap_T_4, 3 * num_rows + t_T[:, None])
    active_A = (slot_S >= 0).nonzero().squeeze(1)
    size_A = start_S1[active_A + 1] - start_S1[active_A]
    return Taps(live_T, tap_T_4, active_A, rows(active_A[:, None], size_A[:, None] + back_4[:3]))


def states_of(state_N: Tensor, slot_S: Tensor) -> Tensor:
    """The state of every session row; of an idle one anything, as no tap of a live token is in it.
    There may be no slot at all while every row is idle."""
    if state_N.shape[0] == 0:
        return state_N.new_zeros(slot_S.shape[0], *state_N.shape[1:])
    return state_N[slot_S.long().clamp(min=0)]


def check_start(start_S1: Tensor, num_tokens: int) -> None:
    """Raise ValueError unless start_S1 ascends from 0 to at most num_tokens. Synchronises."""
    start = start_S1.tolist()
    if start[0] != 0 or start != sorted(start) or start[-1] > num_tokens:
        raise ValueError(
            f"start_S1: expected ascending values from 0 to at most {num_tokens}, got {start}"
        )


def check_slots(slot_S: Tensor, num_slots: int) -> None:
    """Raise ValueError unless each is idle (-1) or a slot that no other names. Synchronises."""
    slot = slot_S.tolist()
    if any(not -1 <= n < num_slots for n in slot):
        raise ValueError(f"slot_S: expected -1 (idle) or 0..{num_slots - 1}, got {slot}")
    live = [n for n in slot if n >= 0]
    if len(set(live)) != len(live):
        raise ValueError(f"slot_S: a slot is named twice in {slot}")


def check_below(limit: int, **named: Tensor) -> None:
    """Raise ValueError where an index tensor holds a value >= limit. Synchronises."""
    for name, index in named.items():
        if index.numel() > 0 and (highest := int(index.max())) >= limit:
            raise ValueError(f"{name}: expected values below {limit}, got {highest}")


def check_distinct(**named: Tensor) -> None:
    """Raise ValueError where an index tensor holds a value twice, -1 excepted. Synchronises."""
    for name, index in named.items():
        value, count = index[index >= 0].unique(return_counts=True)
        if (count > 1).any():
            raise ValueError(f"{name}: {int(value[count > 1][0])} is named twice")
