"""`python -m bench tune OP --vary FIELD=A,B,...`: an op's cases under other configurations.

Every combination of the varied fields replaces those of the shipped configuration, is compared with
it bit by bit and timed beside it with a cold L2. Prints a table, the shipped one first; what does
not compile or fit is named with the reason. Changes nothing.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tml_kernels._configs import changed

from . import ceilings, harness
from .harness import Variant
from .machine import clocks, describe, machine
from .paths import benched_ops
from .report import text_table, write_json
from .timing import CudaTimer, l2_bytes
from .turns import turn

SHIPPED = "ours"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", choices=benched_ops(), metavar="OP")
    parser.add_argument("--case", action="append", metavar="TEXT", help="cases whose name has it")
    parser.add_argument(
        "--vary", action="append", default=[], metavar="FIELD=A,B", help="may be repeated"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a constant of configs.py"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result")
    parser.add_argument("--seconds", type=float, default=120.0, help="time no case after this")
    parser.add_argument("--ceilings", type=Path, metavar="FILE", help="measured just before")
    parser.add_argument("--turns", type=Path, metavar="DIR", help="as of the ops")
    parser.add_argument("--of", type=int, default=1, metavar="N", help="how many take turns")


@torch.no_grad()
def main(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("no GPU: there is nothing to tune")
        return 2
    op = harness.load(args.op)
    for setting in args.set:
        _set(args.op, *_parse(setting))
    if args.vary:
        try:
            with changed(args.op):
                pass
        except ValueError as error:
            raise SystemExit(f"--vary: {error}") from None
    cases = harness.named(op, op.bench, args.case)
    variants = dict(_variants(args.op, op.variants[SHIPPED], [_parse(v) for v in args.vary]))
    same_bits = _compile(cases, variants)
    result: dict[str, Any] = {
        "kind": "tune",
        "op": args.op,
        "set": args.set,
        "machine": machine(),
        "clocks": {},
        "results": [],
        "out_of_time": list(map(str, cases)),
    }
    name = args.out.stem if args.out else args.op
    with turn(args.turns, name, args.of):
        for row in _time(args, op, cases, variants):
            result["results"].append(row | {"same_bits": same_bits[row["case"]]})
            result["clocks"] = clocks()
            result["out_of_time"].remove(row["case"])
            if args.out:
                write_json(args.out, result)
    print(describe(result["machine"], result["clocks"]))
    print(show(result))
    return 0


def _parse(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        raise SystemExit(f"{text!r}: expected NAME=VALUE or NAME=A,B") from None


def _set(op: str, name: str, value: Any) -> None:
    """A constant of the op's configs.py. SystemExit where it has none of that name."""
    module = f"tml_kernels.ops.{op}.configs"
    try:
        configs = importlib.import_module(module)
    except ModuleNotFoundError:
        raise SystemExit(f"--set {name}: {op} has no configurations") from None
    known = [constant for constant in vars(configs) if constant.isupper()]
    if name not in known:
        raise SystemExit(f"--set {name}: {module} has {', '.join(known)}")
    setattr(configs, name, value)


def _variants(op: str, ours: Variant, vary: list[tuple[str, Any]]) -> Iterator[tuple[str, Variant]]:
    """The shipped configuration, then every combination."""
    yield SHIPPED, ours
    names = [name for name, _ in vary]
    values = [value if isinstance(value, tuple) else (value,) for _, value in vary]
    for combination in itertools.product(*values) if vary else ():
        fields = dict(zip(names, combination, strict=True))
        label = " ".join(f"{name}={value}" for name, value in fields.items())
        yield (
            label,
            replace(
                ours, prepare=_under(op, fields, ours.prepare), run=_under(op, fields, ours.run)
            ),
        )


def _under(op: str, fields: dict[str, Any], function: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        with changed(op, **fields):
            return function(*args, **kwargs)

    return run


def _compile(cases: list, variants: dict[str, Variant]) -> dict[str, list[str]]:
    """A first call of each, so that nothing compiles once others wait for their turn; for each case
    which variants give the shipped one's bits."""
    same: dict[str, list[str]] = {}
    for case in cases:
        torch.manual_seed(0)
        inputs, results = case.make_inputs("cuda"), {}
        for name, variant in variants.items():
            with contextlib.suppress(Exception):  # told when it is timed
                given = variant.prepare(harness.clone(inputs))
                results[name] = [t.clone() for t in harness.tensors(variant.run(**given))]
        ours = results.get(SHIPPED, [])
        same[str(case)] = [
            name
            for name, found in results.items()
            if len(found) == len(ours) and all(map(torch.equal, found, ours))
        ]
        torch.cuda.empty_cache()
    return same


def _time(
    args: argparse.Namespace, op: harness.OpBench, cases: list, variants: dict[str, Variant]
) -> Iterator[dict[str, Any]]:
    timer, started = CudaTimer(), time.monotonic()
    known = ceilings.known(args.ceilings, timer)
    for case in cases:
        if time.monotonic() - started > args.seconds:
            break
        torch.cuda.empty_cache()
        timed = harness.time_case(
            variants,
            case,
            timer,
            known,
            l2_bytes=l2_bytes(),
            repeats=20,
            graph_calls=op.graph_calls,
        )
        yield timed.to_json()


def show(result: dict[str, Any]) -> str:
    """Fastest first, after the shipped one."""
    parts = []
    for case in result["results"]:
        rows = [
            (
                name,
                f"{row['cold_us']['median']:.2f}",
                f"{100 * row['fraction']:.1f} %",
                "same" if name in case["same_bits"] else "other",
            )
            for name, row in case["variants"].items()
        ]
        rows[1:] = sorted(rows[1:], key=lambda row: float(row[1]))
        parts.append(f"{case['case']}  floor {case['floor_us']:.2f} us, noise {case['noise']}")
        parts.append(text_table(("configuration", "us", "of ceiling", "bits"), rows))
        parts += [f"not timed: {name}: {why}" for name, why in case["skipped"].items()]
    parts += [f"no time left for {case}" for case in result["out_of_time"]]
    return "\n".join(parts)
