"""tml-runtime plan: arguments, a table of what takes which memory, and what would fit instead."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .errors import InputValueError
from .model_options import EXPERTS, REST, add_memory, budget_of, frame_of, packing_of

if TYPE_CHECKING:
    from .plan import Plan

MAX_SESSIONS = 1024
_TEXT = """\
What a model and its sessions take of a GPU's memory, counted from shapes before anything is
allocated, and how much of a conversation a session remembers in it. Ends with status 1 where it
does not fit, and says what does.

Nothing here is measured: weights, state and buffers are the sizes of the tensors that there will
be; graphs, activations and the CUDA context are allowances.
"""
_EXAMPLES = """\
examples:
  tml-runtime plan --preset inkling-small --gpu-memory 143771MiB --sessions 16
  tml-runtime plan --gpu-memory 141GB --sessions 8 --experts mxfp4 --rest fp8 --page-dtype fp8
  tml-runtime plan --gpu-memory 192GB --sessions 32 --keep 60 --keep-video 5 --video 80x80 --json

A GPU's size is what `nvidia-smi` shows. It is not always the one it is sold by: an H200 of 141 GB
has 143771MiB, which is 150.8 GB.
"""
_NAMES = {
    "mtp_layers": "multi-token prediction",
    "norms_convs_router": "norms, convolutions, router",
    "taps": "convolution taps",
    "context": "driver, CUDA context",
}


def add_plan(commands: Any) -> None:
    """`plan`, to argparse's subcommands."""
    plan = commands.add_parser(
        "plan",
        help="what a model and its sessions take of a GPU's memory, before anything is allocated",
        description=_TEXT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument(
        "--preset",
        default="inkling-small",
        help="model: tiny, slice or inkling-small (default: %(default)s)",
    )
    plan.add_argument(
        "--gpu-memory",
        required=True,
        metavar="SIZE",
        help="of the GPU, with its unit: 141GB is 141 * 10^9 bytes, 131GiB is 131 * 2^30",
    )
    plan.add_argument(
        "--sessions",
        type=int,
        default=1,
        metavar="N",
        help="at once, and one more for each snapshot of a hand-off (default: %(default)s)",
    )
    plan.add_argument(
        "--experts", choices=EXPERTS, default="int4", help="routed ones (default: %(default)s)"
    )
    plan.add_argument(
        "--rest",
        choices=REST,
        default="fp8",
        help="shared experts, attention, dense layers and unembedding (default: %(default)s)",
    )
    plan.add_argument(
        "--page-dtype",
        choices=("bf16", "fp8"),
        default="bf16",
        help="of keys and values, as `tml-runtime serve` and `Runtime` take it (default: "
        "%(default)s)",
    )
    plan.add_argument(
        "--drafts",
        action="store_true",
        help="with the multi-token-prediction layers that a tick drafts with, and what they keep",
    )
    add_memory(plan)
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan.set_defaults(run=_plan)


def _plan(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .model import ModelConfig
    from .model.config import MTP_LAYERS
    from .plan import PAGE_DTYPES, as_dict, nearest, parse_bytes, plan

    try:
        config, frame = ModelConfig.preset(args.preset), frame_of(args.video)
        packing = packing_of(args)
        if args.drafts:
            config = replace(config, mtp_layers=MTP_LAYERS[: config.layout.num_steps - 2])
        wanted = plan(
            config,
            experts=packing.experts,
            rest=packing.rest,
            sessions=_sessions(args.sessions),
            budget=budget_of(args, config),
            page_dtype=PAGE_DTYPES[args.page_dtype],
            gpu_bytes=parse_bytes(args.gpu_memory),
            frame=frame,
            drafts=args.drafts,
        )
    except ValueError as error:
        print(f"error: {error}; see `tml-runtime plan --help`", file=sys.stderr)
        return 2
    others = [] if wanted.fits else nearest(wanted)
    if args.json:
        found = [{"options": options(other, wanted), **as_dict(other)} for other in others]
        print(json.dumps({**as_dict(wanted), "nearest": found}, indent=2))
    else:
        print("\n".join(_lines(wanted, others, args.gpu_memory)))
    return 0 if wanted.fits else 1


def _sessions(sessions: int) -> int:
    if not 1 <= sessions <= MAX_SESSIONS:
        raise InputValueError(f"--sessions {sessions} is not in 1..{MAX_SESSIONS}")
    return sessions


def options(other: Plan, wanted: Plan) -> list[str]:
    """The arguments that make `other` where they stand for `wanted`'s."""
    from .plan import as_dict

    old, new = as_dict(wanted), as_dict(other)
    found: list[str] = []
    for name in ("experts", "rest", "sessions", "page_dtype"):
        if new[name] != old[name]:
            found += [f"--{name.replace('_', '-')}", str(new[name])]
    if other.budget != wanted.budget:
        for flag, name in (("--keep", "audio"), ("--keep-video", "video")):
            seconds = new["context"][name]["seconds"]
            if seconds is not None:
                found += [flag, f"{seconds:.10g}"]
    return found


def _lines(wanted: Plan, others: list[Plan], gpu_memory: str) -> list[str]:
    from .plan import as_dict

    about = as_dict(wanted)
    lines = [
        f"{about['model']}: experts {about['experts']}, rest {about['rest']}, "
        f"{wanted.sessions} sessions, pages {about['page_dtype']}",
        "",
        f"{'':34}{'MiB':>10}",
        *_part("weights", about["weights"]),
        *_part(f"state of {wanted.sessions} sessions", about["state"]),
        *_part("allowances, not measured", about["allowance"]),
        _line("all of it", wanted.total_bytes),
        _line("the GPU", wanted.gpu_bytes),
        _line("free" if wanted.fits else "missing", abs(wanted.free_bytes)),
        "",
        f"{'a session remembers at least':34}{'tokens':>10}{'seconds':>10}",
        *_context(wanted),
    ]
    if wanted.fits:
        return lines
    lines += ["", "It does not fit." + (" These do:" if others else " Nothing near it does.")]
    for other in others:
        free = f"{other.free_bytes / 2**20:,.0f} MiB free"
        lines.append(f"  {' '.join(options(other, wanted)):46}{free:>18}")
    if gpu_memory.strip().endswith("GB"):
        lines.append(
            f"{gpu_memory} is {wanted.gpu_bytes / 2**20:,.0f} MiB. `nvidia-smi` shows what the GPU "
            "has: an H200 of 141 GB, 143771MiB."
        )
    return lines


def _part(name: str, sizes: Mapping[str, int]) -> list[str]:
    return [
        _line(name, sum(sizes.values())),
        *(_line("  " + _NAMES.get(part, part.replace("_", " ")), n) for part, n in sizes.items()),
    ]


def _line(name: str, size: int) -> str:
    return f"{name:34}{size / 2**20:>10,.0f}"


def _context(wanted: Plan) -> list[str]:
    lines = []
    for name, (tokens, seconds) in wanted.context().items():
        shown = name
        if name == "video" and wanted.frame is not None:
            shown += f", {wanted.frame[1]}x{wanted.frame[0]} in every tick"
        lines.append(f"{'  ' + shown:34}{tokens:>10,}" + (f"{seconds:>10,.1f}" if seconds else ""))
    return lines
