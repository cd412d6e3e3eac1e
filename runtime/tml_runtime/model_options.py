"""Options of commands that say how a model is packed and what its sessions remember.

Names are written down here, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from .errors import InputValueError

if TYPE_CHECKING:
    from .model import KvBudget, ModelConfig
    from .model.packing import Packing

EXPERTS = ("bf16", "fp8", "fp8_channel", "nvfp4", "mxfp4", "int4", "int4_f16")
REST = ("bf16", "fp8", "fp8_channel", "int4", "int4_f16")


def add_memory(parser: argparse.ArgumentParser) -> None:
    """--keep, --keep-video and --video, which `budget_of` reads."""
    parser.add_argument(
        "--keep",
        type=float,
        metavar="SECONDS",
        help="how long sound, pictures and replies stay in a session's memory, at least (default: "
        "as many tokens as a runtime keeps unless told)",
    )
    parser.add_argument(
        "--keep-video", type=float, metavar="SECONDS", help="the same for pictures alone"
    )
    parser.add_argument(
        "--video",
        default="320x240",
        metavar="WxH",
        help='size of the pictures that a session sees in every tick, or "none": what seconds of '
        "them are counted with (default: %(default)s)",
    )


def packing_of(args: argparse.Namespace) -> Packing:
    """Of --experts and --rest, which name one of EXPERTS and of REST, or None."""
    from .model.packing import Packing

    experts, rest = (None if name == "bf16" else name for name in (args.experts, args.rest))
    return Packing(experts, rest)


def budget_of(args: argparse.Namespace, config: ModelConfig) -> KvBudget:
    """Raises InputValueError, or ValueError for pictures that cannot be cut in patches."""
    from .budget import budget_for, kept_seconds

    return budget_for(config, kept_seconds(args.keep, args.keep_video), frame_of(args.video))


def frame_of(video: str) -> tuple[int, int] | None:
    """(height, width), None of "none". Raises InputValueError."""
    if video == "none":
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", video)
    if match is None:
        raise InputValueError(f'--video {video!r} is not a size such as 320x240, or "none"')
    return int(match[2]), int(match[1])
