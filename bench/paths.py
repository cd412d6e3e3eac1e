"""Where the checkout is, and the environment in which its Python runs uninstalled."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = (ROOT, ROOT / "runtime")
OPS = ROOT / "tml_kernels" / "ops"
TABLE = ROOT / "bench" / "kernel_table.json"
CACHE = ROOT / ".cache"


def add_source_roots() -> None:
    """Make tml_kernels and tml_runtime importable without an installation."""
    for root in reversed(SOURCE_ROOTS):
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))


def child_env(*, interpret: bool | None = None) -> dict[str, str]:
    """Environment of a child process: both source roots first on PYTHONPATH, unbuffered output.

    interpret: False removes TRITON_INTERPRET, without which nothing is compiled; None leaves it.
    """
    env = dict(os.environ, PYTHONUNBUFFERED="1")
    inherited = env.get("PYTHONPATH", "").split(os.pathsep)
    roots = [str(root) for root in SOURCE_ROOTS]
    env["PYTHONPATH"] = os.pathsep.join(roots + [p for p in inherited if p and p not in roots])
    if interpret is False:
        env.pop("TRITON_INTERPRET", None)
    return env


def op_names(*, with_kernel: bool = False) -> list[str]:
    """Ops of the tree by folder name; with_kernel: only those that have a kernel.py."""
    needed = "kernel.py" if with_kernel else "api.py"
    return sorted(path.parent.name for path in OPS.glob(f"*/{needed}"))


def bench_names() -> list[str]:
    """Of every bench_<name>.py: the ops, and blocks that are made of several."""
    files = (ROOT / "bench").glob("bench_*.py")
    return sorted(path.stem.removeprefix("bench_") for path in files)


def benched_ops() -> list[str]:
    """Ops that have a bench_<op>.py."""
    return [name for name in bench_names() if name in op_names()]
