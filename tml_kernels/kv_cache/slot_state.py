"""The other state of sessions: tensors with a row per slot, and what they held after past ticks."""

# Dimension key: N session slots, H snapshots.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .._core import CacheError

NUM_SNAPSHOTS = 16  # ticks that a session can be rewound by, unless told


class NoSnapshot(CacheError):
    """A rewind to a position after which no tick ended that is still remembered; `kept` are."""

    def __init__(self, position: int, kept: list[int]) -> None:
        super().__init__(f"no snapshot at {position=}: there is one at each of {kept}")
        self.position = position
        self.kept = kept


@dataclass(frozen=True)
class SlotTensor:
    """A tensor of which every session has the row `slot` along `axis`.

    reset: what the row of a new session holds. is_setting: it does not change with the tokens (a
    temperature, a seed), so a rewind leaves it alone.
    """

    tensor: Tensor
    axis: int = 0
    reset: float = 0
    is_setting: bool = False

    def row(self, slot: int) -> Tensor:
        return self.tensor.select(self.axis, slot)


class SlotState:
    """Rows of slots, with snapshots after each of the last `num_snapshots` ticks and at the mark.

    A snapshot is of all slots, in memory allocated once: one fused copy, whoever took part. What it
    holds of a slot is told by the slot's length then, -1 where it is not of the present session.
    """

    def __init__(
        self, tensors: Mapping[str, SlotTensor], *, max_sessions: int, num_snapshots: int
    ) -> None:
        for name, slot_tensor in tensors.items():
            size = slot_tensor.tensor.shape[slot_tensor.axis]
            if size != max_sessions:
                raise ValueError(
                    f"{name}: expected {max_sessions} slots on axis {slot_tensor.axis}, got {size}"
                )
        if num_snapshots < 1:
            raise ValueError(f"num_snapshots={num_snapshots}: expected at least 1")
        self.tensors = dict(tensors)
        self._moving = {name: x for name, x in tensors.items() if not x.is_setting}
        self._now = [x.tensor for x in self._moving.values()]
        self._mark = num_snapshots  # the last one is written by mark() alone
        self._past = [[x.clone() for x in self._now] for _ in range(num_snapshots + 1)]
        self._position = [[-1] * max_sessions for _ in range(num_snapshots + 1)]
        self._next = 0

    def reset(self, slot: int) -> None:
        for x in self.tensors.values():
            x.row(slot).fill_(x.reset)
        self.forget(slot)

    def forget(self, slot: int) -> None:
        """No snapshot is of this slot's session any more."""
        for positions in self._position:
            positions[slot] = -1

    def snapshot(self, lengths: list[int]) -> None:
        """Remember every slot as it is; lengths: of the sessions, -1 where there is none."""
        if self._now:
            fused_copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
            fused_copy(self._past[self._next], self._now)
        self._position[self._next][:] = lengths
        self._next = (self._next + 1) % self._mark

    def mark(self, slot: int, length: int) -> None:
        self._remember(self._mark, slot, length)

    def marked(self, slot: int) -> int:
        """Position of the slot's mark, -1 where there is none."""
        return self._position[self._mark][slot]

    def remember(self, slot: int, length: int, ago: int = 0) -> None:
        """Remember one slot as it is, as if the last tick had ended here, or one `ago` before."""
        ago = min(ago, self._mark - 1)
        self._remember((self._next - 1 - ago) % self._mark, slot, length)

    def remember_once(self, slot: int, length: int) -> None:
        """Remember one slot as it is until the next tick, unless a snapshot of that length is
        there: in the place of the oldest one, which that tick would take."""
        if all(p[slot] != length for p in self._position[: self._mark]):
            self._remember(self._next, slot, length)

    def _remember(self, index: int, slot: int, length: int) -> None:
        for kept, x in zip(self._past[index], self._moving.values(), strict=True):
            kept.select(x.axis, slot).copy_(x.row(slot))
        self._position[index][slot] = length

    def check_snapshot(self, slot: int, position: int) -> None:
        """Raises NoSnapshot unless `restore` can go to `position`."""
        kept = sorted({p[slot] for p in self._position if p[slot] >= 0} | {0})
        if self._now and position not in kept:
            raise NoSnapshot(position, kept)

    def restore(self, slot: int, position: int) -> None:
        """The rows as they were at `position`; what was remembered of later ones is forgotten."""
        newest_first = [(self._next - 1 - n) % self._mark for n in range(self._mark)]
        found = [i for i in (*newest_first, self._mark) if self._position[i][slot] == position]
        if not found:
            self.check_snapshot(slot, position)
        for n, x in enumerate(self._moving.values()):
            if found:
                x.row(slot).copy_(self._past[found[0]][n].select(x.axis, slot))
            else:  # the very beginning
                x.row(slot).fill_(x.reset)
        for positions in self._position:
            if positions[slot] > position:
                positions[slot] = -1

    def copy(self, source: int, target: int) -> None:
        """Another session that holds the same, and remembers the same but the mark."""
        for x in self.tensors.values():
            x.row(target).copy_(x.row(source))
        for i in range(self._mark):
            for kept, x in zip(self._past[i], self._moving.values(), strict=True):
                kept.select(x.axis, target).copy_(kept.select(x.axis, source))
            self._position[i][target] = self._position[i][source]
        self._position[self._mark][target] = -1

    def rows(self, slot: int) -> dict[str, Tensor]:
        """A slot's rows by name, as views."""
        return {name: x.row(slot) for name, x in self.tensors.items()}
