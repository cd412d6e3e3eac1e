"""`python -m bench quant`: what packing a model's matrices costs in accuracy. Needs no GPU.

For weights that are Gaussian, heavy-tailed (Student's t, 4 degrees of freedom) and with outlier
channels (1 % of the input columns 20 times larger): the relative L2 error of packed matrices and of
their products, then a random model packed against itself unpacked, both in float32: the residual
stream after each layer, KL divergence and top-1 agreement of the logits. "int4+search" searches for
its scales. The figures rank the plans; a trained checkpoint's losses are its own.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tml_runtime.model import ModelConfig
from tml_runtime.model.packing import EXPERTS, REST

from .machine import machine
from .quant_errors import SEARCH, STATISTICS, Plan, compare_plans, matrix_errors
from .report import text_table, write_json

PRECISIONS = (*EXPERTS, "int4" + SEARCH)
PLANS = [
    *(Plan(name, None) for name in PRECISIONS),
    *(Plan(None, name) for name in REST),
    *(Plan(name, "fp8") for name in ("int4", "int4" + SEARCH, "mxfp4", "nvfp4")),
]
# Of one expert of inkling-small, w13 [4096, 4096] and w2 [4096, 2048], an eighth of the rows.
SHAPES = [(512, 4096), (512, 2048)]
NOTES = (
    "Routers and norms are never quantised, in no plan; nor are convolutions, embeddings, "
    "front ends and the speech head.",
    "Experts: the routed ones. Rest: shared experts, attention, dense layers, unembedding. "
    "-: as they are.",
    "Same experts: the share of routed (token, expert) pairs that the unpacked model chose too, "
    "in the last layer.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="small sizes, in a few seconds")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens (0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write DIR/quant.json")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def main(args: argparse.Namespace) -> int:
    result = {"kind": "quant", "machine": machine(), **measure(quick=args.quick, seed=args.seed)}
    if args.out:
        write_json(args.out / "quant.json", result)
    print(json.dumps(result, indent=1) if args.json else show(result))
    return 0


def make_config(quick: bool) -> ModelConfig:
    """Wide enough for four groups of int4 in a row; as deep as `tiny`."""
    tiny = ModelConfig.preset("tiny")
    if quick:
        return tiny
    experts = replace(tiny.experts, num_experts=16, top_k=4, width=256)
    vocab = replace(tiny.vocab, size=512, num_valid=512)
    heads = {"num_heads": 8, "num_kv_heads": 2}
    return replace(
        tiny,
        name="mid",
        width=512,
        dense_width=1024,
        experts=experts,
        vocab=vocab,
        local_heads=replace(tiny.local_heads, **heads),
        global_heads=replace(tiny.global_heads, **heads),
    )


def measure(*, quick: bool, seed: int) -> dict[str, Any]:
    config = make_config(quick)
    shapes = [(128, 512)] if quick else SHAPES
    num_tokens = 48 if quick else 384
    return {
        "seed": seed,
        "model": {
            "width": config.width,
            "layers": config.num_layers,
            "experts": config.experts.num_experts,
            "top_k": config.experts.top_k,
            "vocabulary": config.vocab.num_valid,
            "tokens": num_tokens,
        },
        "notes": list(NOTES),
        "matrices": [
            matrix_errors(precision, statistic, shape, num_tokens=64, seed=seed)
            for precision in PRECISIONS
            for statistic in STATISTICS
            for shape in shapes
        ],
        "models": [
            row
            for statistic in STATISTICS
            for row in compare_plans(config, statistic, PLANS, num_tokens=num_tokens, seed=seed)
        ],
    }


def show(result: dict[str, Any]) -> str:
    model = result["model"]
    about = (
        f"A model of width {model['width']}, {model['layers']} layers, {model['experts']} experts "
        f"of which {model['top_k']} a token, {model['vocabulary']} tokens of vocabulary, over "
        f"{model['tokens']} tokens."
    )
    parts = [
        "Relative L2 error of a matrix / of its product with rows that have outlier channels; the "
        "worst shape.",
        text_table(["precision", *STATISTICS], _matrix_rows(result["matrices"])),
    ]
    for statistic in STATISTICS:
        rows = [row for row in result["models"] if row["statistic"] == statistic]
        layers = [f"layer {i}" for i in range(model["layers"])]
        head = ["experts / rest", *layers, "same experts", "KL, nats", "top-1"]
        parts += [f"{about} Weights: {statistic}.", text_table(head, map(_model_row, rows))]
    return "\n\n".join([*parts, "\n".join(result["notes"])])


def _matrix_rows(matrices: list[dict[str, Any]]) -> list[list[str]]:
    def worst(precision: str, statistic: str, figure: str) -> float:
        return max(
            row[figure]
            for row in matrices
            if (row["precision"], row["statistic"]) == (precision, statistic)
        )

    return [
        [name, *(f"{worst(name, s, 'weights'):.3f} / {worst(name, s, 'product'):.3f}"
                 for s in STATISTICS)]
        for name in dict.fromkeys(row["precision"] for row in matrices)
    ]  # fmt: skip


def _model_row(row: dict[str, Any]) -> list[str]:
    return [
        str(Plan(row["experts"], row["rest"])),
        *(f"{error:.3f}" for error in row["layers"]),
        f"{row['same_experts'][-1]:.1%}",
        f"{row['kl']:.4f}",
        f"{row['top1']:.1%}",
    ]
