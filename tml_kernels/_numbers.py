"""Checks of the numbers and flags that public functions take. Each raises TypeError for what is
none, bools among numbers, and ValueError for one out of range; messages name argument and value.

torch.compile traces these, and a number may be a symbol then, which only comparisons can ask.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

MAX_INT = 2**63 - 1  # the schema of an op holds no larger one

_INTEGERS = (int, np.integer, torch.SymInt)
_NUMBERS = (*_INTEGERS, float, np.floating, torch.SymFloat)


def check_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, _INTEGERS):
        raise TypeError(f"{name}: expected an integer, got {value!r}")


def check_count(name: str, value: Any, low: int = 1, high: int | None = None, why: str = "") -> int:
    """The value. why: what follows the range in the message."""
    check_int(name, value)
    if not low <= value <= (MAX_INT if high is None else high):
        unbounded = high is None and value < low
        wanted = f"at least {low}" if unbounded else f"{low}..{MAX_INT if high is None else high}"
        raise ValueError(f"{name}: expected {wanted}{why}, got {value}")
    return value


def check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def check_finite(name: str, value: Any) -> None:
    check_number(name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_positive(name: str, value: Any, why: str = "") -> None:
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive number{why}, got {value}")


def check_eps(value: Any) -> None:
    """Of a norm, as `eps`: what is added under a root."""
    check_number("eps", value)
    if not 0 <= value < math.inf:
        raise ValueError(f"eps: expected a finite number of at least 0, got {value}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
