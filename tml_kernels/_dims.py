"""Shape checks that read the axes from a tensor's own name: `dims.check(weight_T_K=weight_T_K)`.

Every trailing capital in the name is one axis. A letter is bound by the first tensor that has it
and compared afterwards. `SH` is one axis of S * H rows, `S1` one of S + 1 rows, `4` exactly 4 rows.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

_AXIS = re.compile(r"[A-Z]+1?|[0-9]+")


@functools.cache
def _axes(name: str) -> tuple[tuple[str, int], ...]:
    """(letters, extra rows) of every axis; no letters means exactly that many rows."""
    axes: list[tuple[str, int]] = []
    for token in reversed(name.split("_")):
        if not _AXIS.fullmatch(token):
            break
        if token.isdigit():
            axes.append(("", int(token)))
        else:
            axes.append((token.removesuffix("1"), int(token.endswith("1"))))
    assert axes, f"{name!r} has no axis letters"
    return tuple(reversed(axes))


class Dims(Mapping[str, int]):
    """Axis sizes of one call, by letter."""

    def __init__(self, **bound: int) -> None:
        self._size: dict[str, int] = dict(bound)

    def __getitem__(self, letter: str) -> int:
        return self._size[letter]

    def __iter__(self):
        return iter(self._size)

    def __len__(self) -> int:
        return len(self._size)

    def check(
        self,
        *,
        dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
        device: torch.device | None = None,
        contiguous: bool = True,
        **named: Tensor,
    ) -> None:
        """Check rank, sizes, dtype, device and contiguity of each named tensor.

        Raises TypeError for something that is not a tensor or has another dtype, ValueError for a
        shape, device or layout that does not fit. The message names the argument and the value.
        """
        for name, tensor in named.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
            self._check_shape(name, tensor.shape)
            if dtype is not None and tensor.dtype is not dtype:
                allowed = dtype if isinstance(dtype, tuple) else (dtype,)
                if tensor.dtype not in allowed:
                    wanted = " or ".join(str(d) for d in dict.fromkeys(allowed))
                    raise TypeError(f"{name}: expected {wanted}, got {tensor.dtype}")
            if device is not None and tensor.device != device:
                raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
            if contiguous and not tensor.is_contiguous():
                raise ValueError(
                    f"{name}: must be contiguous, strides are {tensor.stride()} for shape "
                    f"{tuple(tensor.shape)}; call .contiguous()"
                )

    def _check_shape(self, name: str, shape: torch.Size) -> None:
        """On the path of every call of every op: only a failure takes time."""
        axes, bound = _axes(name), self._size
        if len(axes) != len(shape):
            wanted = ", ".join(_spell(*axis) for axis in axes)
            raise ValueError(f"{name}: expected {len(axes)} axes ({wanted}), got {tuple(shape)}")
        for (letters, extra), size in zip(axes, shape):  # noqa: B905  of one length
            if len(letters) == 1:
                known = bound.get(letters)
                if known is None:
                    if size < extra:
                        raise ValueError(
                            f"{name}: {letters}1 needs at least one row; shape {tuple(shape)}"
                        )
                    bound[letters] = size - extra
                    continue
                expected = known + extra
            elif letters:
                expected = math.prod([bound[letter] for letter in letters]) + extra
            else:
                expected = extra
            if size != expected:
                axis = _spell(letters, extra)
                raise ValueError(
                    f"{name}: {axis}={size}, but {axis}={expected} was bound earlier; "
                    f"shape {tuple(shape)}"
                )


def _spell(letters: str, extra: int) -> str:
    return letters + "1" * extra if letters else str(extra)
