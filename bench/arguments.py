"""Types of arguments that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def whole(least: int, most: int) -> Callable[[str], int]:
    """What argparse takes as a type: whole numbers of a range, both ends included."""

    def value(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number in {least}..{most}")
        return int(text)

    return value


count = whole(1, 4096)
seed = whole(0, 2**32 - 1)


def list_of(one: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """What argparse takes as a type: values between commas."""

    def values(text: str) -> list[Value]:
        return [one(part.strip()) for part in text.split(",")]

    return values


def frame_size(text: str) -> tuple[int, int] | None:
    """Width and height; None for none."""
    if text == "none":
        return None
    width, by, height = text.partition("x")
    if not by:
        raise argparse.ArgumentTypeError(f"{text!r} is neither none nor a size such as 320x240")
    return count(width), count(height)
