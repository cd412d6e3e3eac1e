"""tml-runtime convert: arguments, and how far it has got."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TEXT = """\
Pack a checkpoint once, into a folder that a model is loaded from without packing anything again:

    model = InteractionModel.load("OUT", device="cuda")

CHECKPOINT is a safetensors file, or a folder with one or with an index of shards, in the published
layout: bf16, fp16 or fp32 values, routed experts in nvfp4 too. These keep their bits with --experts
nvfp4; anything else is made of their exact values. A tokenizer.json beside the weights comes along.
At most one layer is in memory at a time, packed (and a few of its experts in plain form). Run it
again with the same arguments to go on after an interruption, or to check every file: those with the
right checksum are kept, others are made again.
"""
_EXAMPLES = """\
examples:
  tml-runtime convert weights/ out/ --preset inkling-small --experts int4 --rest fp8
  tml-runtime convert weights/ out/ --preset inkling-small --experts mxfp4 --device cuda
  tml-runtime convert weights/ out/ --preset inkling-small --experts int4 --search
  tml-runtime convert out/ --preset slice --experts int4 --random-weights 7
                                             no checkpoint, for benchmarks
  tml-runtime serve --checkpoint out/ --preset inkling-small
"""
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

Report = Callable[[str, int, int, bool], None]


def add_convert(commands: Any) -> None:
    """`convert`, to argparse's subcommands."""
    convert = commands.add_parser(
        "convert",
        help="pack a checkpoint once, so that later starts only map it",
        description=_TEXT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT", help="what to read, if anything"
    )
    convert.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    convert.add_argument("--preset", required=True, help="its shape: tiny, slice or inkling-small")
    convert.add_argument(
        "--experts",
        metavar="PRECISION",
        help="of the routed experts: fp8, fp8_channel, int4, int4_f16, mxfp4 or nvfp4 "
        "(default: --dtype)",
    )
    convert.add_argument(
        "--rest",
        metavar="PRECISION",
        help="of the other large matrices: fp8, fp8_channel, int4 or int4_f16 (default: --dtype)",
    )
    convert.add_argument(
        "--search",
        action="store_true",
        help="int4 scales with the least error in each group: packing takes longer, the packed "
        "form is the same",
    )
    convert.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="bf16",
        help="of everything else and of activations (default: %(default)s)",
    )
    convert.add_argument(
        "--random-weights",
        type=int,
        metavar="SEED",
        help="of what CHECKPOINT lacks (default: 0); needed where there is none, and everything is "
        "random",
    )
    convert.add_argument(
        "--device", default="cpu", help="where layers are packed: cpu or cuda (default: cpu)"
    )
    convert.set_defaults(run=_convert)


def _convert(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    import torch

    from .model import ModelConfig
    from .model.convert import convert_checkpoint
    from .model.packing import Packing

    dtype = getattr(torch, _DTYPES[args.dtype])
    try:
        config = ModelConfig.preset(args.preset)
        Packing(args.experts, args.rest, args.search).check(dtype)
        device = torch.device(args.device)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"--device {args.device} is not cpu or cuda")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {args.device}: there is no GPU that torch can use here")
        if args.checkpoint is None and args.random_weights is None:
            raise ValueError(f"{args.out} alone: give CHECKPOINT too, or --random-weights SEED")
    except (ValueError, RuntimeError) as error:  # RuntimeError: torch's, of a device
        print(f"error: {error}; see `tml-runtime convert --help`", file=sys.stderr)
        return 2
    checkpoint = None if args.checkpoint is None else Path(args.checkpoint)
    try:
        with _progress() as report:
            manifest = convert_checkpoint(
                checkpoint, args.out, config, experts=args.experts, rest=args.rest,
                search=args.search, dtype=dtype, seed=args.random_weights or 0, device=device,
                progress=report,
            )  # fmt: skip
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    total = sum(facts.size for facts in manifest.files.values())
    print(f"{manifest.report}; {args.out}: {len(manifest.files)} files, {total / 1e9:.2f} GB")
    return 0


@contextmanager
def _progress() -> Iterator[Report]:
    """A bar on a terminal where rich is installed, else one line a file; both on stderr."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield _print_line
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _print_line
        return
    with Progress(console=console) as bar:
        task = bar.add_task("converting", total=None)

        def report(name: str, number: int, total: int, made: bool) -> None:
            bar.update(task, completed=number, total=total, description=name)

        yield report


def _print_line(name: str, number: int, total: int, made: bool) -> None:
    words = "written" if made else "was there"
    print(f"{number} of {total}: {name} {words}", file=sys.stderr, flush=True)
