"""`python -m bench <op>`: check the op, then time it beside torch and the peers found here.

No time is printed when a check fails, and none without a GPU: interpreted kernels and the plain
CPU path say nothing about a kernel's speed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tml_kernels import backend_info

from . import ceilings, harness
from .machine import clocks, describe, machine
from .peers import peer_versions
from .report import rate, text_table, write_json
from .timing import CudaTimer, l2_bytes
from .turns import turn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="write DIR/<op>.json")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--smoke", action="store_true", help="fewest cases and repetitions")
    parser.add_argument(
        "--case", action="append", metavar="TEXT", help="time cases whose name has it"
    )
    parser.add_argument("--variant", action="append", metavar="NAME", help="time ours and these")
    parser.add_argument("--quick", action="store_true", help="fewer cases of ops with slow ones")
    parser.add_argument("--seconds", type=float, default=120.0, help="time no case after this")
    parser.add_argument("--ceilings", type=Path, metavar="FILE", help="measured just before")
    parser.add_argument(
        "--turns", type=Path, metavar="DIR", help="take turns with the other ops started with DIR"
    )
    parser.add_argument("--of", type=int, default=1, metavar="N", help="how many ops take turns")


@torch.no_grad()
def main(args: argparse.Namespace) -> int:
    """Exit status 1 when the gate is red, nothing was checked or ours could not be timed."""
    result = run_op(args)
    print(json.dumps(result, indent=1) if args.json else show(result))
    failed = any("ours" in case["skipped"] for case in result["results"])
    gate = result["gate"]
    return 1 if failed or gate["failures"] or not gate["checked"] else 0


def run_op(args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one op as JSON: machine, gate, and with a green gate on a GPU the times.

    With --out it is written after the gate and after every case: a killed run leaves what it has.
    """
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    op = harness.load(args.command)
    cases = harness.named(op, op.timed(quick=args.quick), args.case)
    harness.check_variants(op, args.variant)
    checked = harness.gate(op, device, smoke=args.smoke, quick=args.quick)
    result: dict[str, Any] = {
        "kind": "op",
        "op": op.name,
        "backend": backend_info()["ops"].get(op.name, {}),
        "machine": machine(),
        "peers": peer_versions(),
        "gate": {"device": device, **asdict(checked)},
        "not_timed": _why_not_timed(checked, device),
        "results": [],
        "missing": {},
        "out_of_time": [],
    }

    def save() -> None:
        result["seconds"] = round(time.monotonic() - started, 1)
        if args.out:
            write_json(args.out / f"{args.command}.json", result)

    save()
    variants: dict[str, harness.Variant] = {}
    if not result["not_timed"]:
        torch.cuda.empty_cache()
        compile = not args.quick and (args.variant is None or "torch.compile" in args.variant)
        variants, result["missing"] = harness.resolve(
            op, "cuda", only=args.variant, compile=compile
        )
    with turn(args.turns, args.command, args.of):
        if not result["not_timed"]:
            _time(args, op, cases, variants, result, save)
            save()
    return result


def _why_not_timed(checked: harness.Gate, device: str) -> str:
    if not checked.checked:
        return "no case was checked"
    if not checked.green:
        return f"the gate is red: {len(checked.failures)} of {checked.checked} cases fail"
    return "" if device == "cuda" else "no GPU: kernels are timed on a GPU only"


def _time(
    args: argparse.Namespace,
    op: harness.OpBench,
    cases: Sequence[harness.Case],
    variants: dict[str, harness.Variant],
    result: dict[str, Any],
    save: Callable[[], None],
) -> None:
    started = time.monotonic()
    timer = CudaTimer()
    known = ceilings.known(args.ceilings, timer)
    result["ceilings"] = asdict(known)
    result["clocks"] = {"before": clocks()}
    for case in cases[:1] if args.smoke else cases:
        elapsed = time.monotonic() - started
        if elapsed > args.seconds:
            result["out_of_time"].append(str(case))
            continue
        if elapsed > args.seconds / 2 and "torch.compile" in variants:
            del variants["torch.compile"]  # compiling takes longer than all the rest
            result["missing"][f"torch.compile from {case} on"] = "no time left"
        if "torch.compile" in variants:
            torch._dynamo.reset()  # else it gives up, unsaid, after a few shapes
        torch.cuda.empty_cache()
        timed = harness.time_case(
            variants,
            case,
            timer,
            known,
            l2_bytes=l2_bytes(),
            repeats=10 if args.smoke else 60,
            sets=op.sets,
            graph_calls=op.graph_calls,
            launches=op.launches,
        )
        result["results"].append(timed.to_json())
        result["clocks"]["after"] = clocks()
        save()


def show(result: dict[str, Any]) -> str:
    checked = result["gate"]
    now = result.get("clocks", {}).get("after", {})
    lines = [describe(result["machine"], now), f"{result['op']}: {result['backend']}"]
    lines.append(
        f"gate on {checked['device']}: {checked['checked'] - len(checked['failures'])} of "
        f"{checked['checked']} cases match the float64 oracle"
    )
    lines += [f"FAILED {case}: {text}" for case, text in checked["failures"].items()]
    if result["not_timed"]:
        return "\n".join([*lines, f"not timed: {result['not_timed']}"])
    lines += [show_case(case) for case in result["results"]]
    lines += [f"not here: {name}: {why}" for name, why in result["missing"].items()]
    lines += [f"no time left for {case}" for case in result["out_of_time"]]
    return "\n".join(lines)


def show_case(case: dict[str, Any]) -> str:
    rows = []
    for name, row in case["variants"].items():
        cold, graph = row["cold_us"], row["graph_us"]
        rows.append((
            name,
            f"{cold['median']:.2f}",
            f"{cold['p10']:.2f}..{cold['p90']:.2f}",
            f"{graph['median']:.2f}" if graph else "-",
            rate(row["bytes_per_s"], "B/s"),
            rate(row["flops_per_s"], "flop/s"),
            f"{100 * row['fraction']:.1f} %",
        ))  # fmt: skip
    noise = "-" if case["noise"] is None else f"{100 * case['noise']:.1f} %"
    head = (
        case["case"], "cold us", "p10..p90", f"graph us ({case['graph_l2']})",
        "moved", "computed", "of ceiling",
    )  # fmt: skip
    skipped = [f"  {name}: {why}" for name, why in case["skipped"].items()]
    last = (
        f"  floor {case['floor_us']:.2f} us; same code timed twice: {noise} apart; "
        f"graph of {case['graph_calls']} calls round {case['graph_sets']} input sets"
    )
    if case["launches"] is not None:
        last += f"; {case['launches']} launches a call of ours"
    return "\n".join(["", text_table(head, rows), last, *skipped])
