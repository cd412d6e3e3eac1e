"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import ast
import importlib
import sys

from .paths import ROOT, add_source_roots, bench_names

COMMANDS = {
    "compile": "compile every Triton kernel, no GPU needed; registers and spills against the table",
    "accept": "build, test, measure: everything in one run, with a report",
    "tick": "the runtime's tick: histogram and misses",
    "sessions": "how many sessions hold the period, over bad lines; or one combination for an hour",
    "interaction": "how a model interacts, over bad lines: synthetic twins of published benchmarks",
    "host": "what a tick takes of the host, with the device's half left out",
    "kv": "a simulated day of the rolling cache's host side: pages, work and time a tick",
    "quant": "what packing a model's matrices costs in accuracy",
    "ceilings": "bandwidth, matrix rate and launch cost of this GPU",
    "tune": "an op's cases under other configurations than the shipped one",
    "trend": "results of `sessions`, night by night: what became slower and stayed so",
    "compare": "two result files: what became slower, what fails now",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"bench.{name}")
        about = commands.add_parser(
            name,
            help=text,
            description=module.__doc__,
            epilog=getattr(module, "EXAMPLES", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(about)
    from . import op

    for name in bench_names():
        text = f"check and time {name} beside its peers"
        about = commands.add_parser(name, help=text, description=op.__doc__, epilog=_about(name))
        op.add_arguments(about)
    return parser


def _about(name: str) -> str | None:
    """What bench_<name>.py says of itself, without importing it."""
    source = (ROOT / "bench" / f"bench_{name}.py").read_text()
    return ast.get_docstring(ast.parse(source))


def main(argv: list[str] | None = None) -> int:
    add_source_roots()
    args = build_parser().parse_args(argv)
    name = args.command if args.command in COMMANDS else "op"
    return importlib.import_module(f"bench.{name}").main(args)


if __name__ == "__main__":
    sys.exit(main())
