"""Types of arguments that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def whole(least: int, most: int) -> Callable[[str], int]:
    """What argparse takes as a type: whole numbers of a range, both ends included."""

    def value(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number in {least}..{most}")
        return int(text)

    return value


count = whole(1, 4096)
seed = whole(0, 2**32 - 1)
