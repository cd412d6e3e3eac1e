"""The random model that `tick` and `sessions` run: what it is, from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from . import arguments

if TYPE_CHECKING:
    from tml_runtime import InteractionModel, ModelConfig

DEVICES = ("auto", "cpu", "cuda")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="tiny", help="of the model (default %(default)s)")
    parser.add_argument("--layout", default="ms200", help="of the tick (default %(default)s)")
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="where (default %(default)s)"
    )
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
    parser.add_argument(
        "--distinct-experts",
        type=int,
        metavar="N",
        help="draw and pack so many experts of a layer and make the others of these: the largest "
        "models in seconds (default: all of them)",
    )
    parser.add_argument(
        "--page-dtype", choices=("bf16", "fp8"), help="of keys and values (default: the model's)"
    )
    parser.add_argument(
        "--keep", type=float, metavar="S", help="seconds of sound, pictures and replies remembered"
    )
    parser.add_argument("--keep-video", type=float, metavar="S", help="the same for pictures alone")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of weights and input")


def device_of(args: argparse.Namespace) -> str:
    """cpu or cuda. SystemExit where torch sees no GPU."""
    from tml_runtime.random_model import ModelChoiceError, device_for

    try:
        return device_for(args.device)
    except ModelChoiceError as error:
        raise SystemExit(str(error)) from None


@torch.no_grad()
def make_model(args: argparse.Namespace) -> tuple[InteractionModel, dict[str, Any]]:
    """The model, and what names it in a result. SystemExit for names and numbers that none has."""
    from tml_runtime import InteractionModel, ModelConfig, TurnLayout
    from tml_runtime.model.config import MTP_LAYERS

    device = device_of(args)
    dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    try:
        config = ModelConfig.preset(args.preset, layout=TurnLayout.preset(args.layout))
        if getattr(args, "drafts", False):
            config = replace(config, mtp_layers=MTP_LAYERS[: max(0, config.layout.num_steps - 2)])
        model = InteractionModel.random(
            config,
            seed=args.seed,
            device=device,
            dtype=DTYPES[dtype],
            experts=args.experts,
            rest=args.rest,
            distinct_experts=args.distinct_experts,
        )
    except ValueError as error:
        raise SystemExit(str(error)) from None
    about = {"preset": args.preset, "layout": args.layout, "device": device, "dtype": dtype}
    names = ("experts", "rest", "distinct_experts", "page_dtype", "keep", "keep_video")
    return model, {**about, **{name: getattr(args, name) for name in names}}


def memory_options(
    args: argparse.Namespace, config: ModelConfig, frames: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Arguments of a Runtime. frames: width and height of what sessions see; there is room for the
    one of the most tokens. SystemExit for seconds and frames that cannot be."""
    from tml_runtime.budget import budget_for, kept_seconds, tokens_per_tick
    from tml_runtime.plan import PAGE_DTYPES

    try:
        sizes = [(height, width) for width, height in frames]
        largest = max(sizes, key=lambda s: tokens_per_tick(config, s)["video"], default=None)
        budget = budget_for(config, kept_seconds(args.keep, args.keep_video), largest)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    page_dtype = None if args.page_dtype is None else PAGE_DTYPES[args.page_dtype]
    return {"budget": budget, "page_dtype": page_dtype}


def describe_model(about: dict[str, Any]) -> str:
    """ "tiny, float32, experts int4 on cpu"."""
    packed = "".join(f", {part} {about[part]}" for part in ("experts", "rest") if about[part])
    return f"{about['preset']}, {about['dtype']}{packed} on {about['device']}"
