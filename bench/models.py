"""The random model that `tick` and `sessions` run: what it is, from the command line."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tml_runtime import InteractionModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="tiny", help="of the model (default %(default)s)")
    parser.add_argument("--layout", default="ms200", help="of the tick (default %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument(
        "--experts",
        metavar="PRECISION",
        help="pack the routed experts: fp8, fp8_channel, int4, int4_f16, mxfp4 or nvfp4",
    )
    parser.add_argument(
        "--rest",
        metavar="PRECISION",
        help="pack the other matrices: fp8, fp8_channel, int4 or int4_f16",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and input")


@torch.no_grad()
def make_model(args: argparse.Namespace) -> tuple[InteractionModel, dict[str, Any]]:
    """The model, and what names it in a result."""
    from tml_runtime import InteractionModel, ModelConfig, TurnLayout

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    config = ModelConfig.preset(args.preset, layout=TurnLayout.preset(args.layout))
    model = InteractionModel.random(
        config,
        seed=args.seed,
        device=device,
        dtype=DTYPES[dtype],
        experts=args.experts,
        rest=args.rest,
    )
    about = {"preset": args.preset, "layout": args.layout, "device": device, "dtype": dtype}
    return model, {**about, "experts": args.experts, "rest": args.rest}


def describe_model(about: dict[str, Any]) -> str:
    """ "tiny, float32, experts int4 on cpu"."""
    packed = "".join(f", {part} {about[part]}" for part in ("experts", "rest") if about[part])
    return f"{about['preset']}, {about['dtype']}{packed} on {about['device']}"
