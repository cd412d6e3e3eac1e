"""Imports point down: csrc -> tml_kernels -> tml_runtime -> demo, serve -> cli, bench."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Layers from the bottom; a module belongs to the longest name that it begins with, and may import
# its own layer and those below. Names that begin with nothing here are other people's.
LAYERS = {
    "tml_kernels": 0,
    "tml_runtime": 1,
    "tml_runtime.demo": 2,
    "tml_runtime.serve": 2,
    "tml_runtime.cli": 3,
    "bench": 3,
}
SOURCE_ROOTS = {"tml_kernels": "", "runtime/tml_runtime": "runtime", "bench": ""}
OP = re.compile(r"tml_kernels\.ops\.(\w+)")


def module_name(path: Path, source_root: Path) -> str:
    parts = path.relative_to(source_root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import at any depth, and of import_module("literal").

    `from x import y` yields x.y, since y may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else None
            name = node.func.id if isinstance(node.func, ast.Name) else name
            target = node.args[0]
            if name in ("import_module", "__import__") and isinstance(target, ast.Constant):
                yield node.lineno, str(target.value)


def top(name: str) -> str | None:
    """The longest of LAYERS' names that `name` begins with."""
    fitting = [known for known in LAYERS if f"{name}.".startswith(f"{known}.")]
    return max(fitting, key=len) if fitting else None


def layer(name: str) -> int | None:
    known = top(name)
    return None if known is None else LAYERS[known]


def why_not(module: str, target: str) -> str | None:
    """What is wrong with `module` importing `target`."""
    own, other = layer(module), layer(target)
    if own is None or other is None:
        return None
    if other > own:
        return "an upward import"
    if {top(module), top(target)} == {"tml_runtime.demo", "tml_runtime.serve"}:
        return "demo and service do not know each other"
    own_op, other_op = OP.match(module), OP.match(target)
    if own_op and other_op and own_op[1] != other_op[1]:
        return f"op {own_op[1]} imports op {other_op[1]}"
    return None


def violations(root: Path) -> list[str]:
    found = []
    for folder, source_root in SOURCE_ROOTS.items():
        for path in sorted((root / folder).rglob("*.py")):
            module = module_name(path, root / source_root)
            source = path.read_text()
            for line, target in imports(source, module, path.name == "__init__.py"):
                if (reason := why_not(module, target)) is not None:
                    found.append(f"{path.relative_to(root)}:{line}: {target}: {reason}")
    return found


def test_imports_point_down() -> None:
    assert violations(ROOT) == []


def test_the_walk_sees_the_tree() -> None:
    """Guards the test above against finding nothing because it looks at nothing."""
    path = ROOT / "tml_kernels/ops/rms_norm/kernel.py"
    targets = {
        name for _, name in imports(path.read_text(), "tml_kernels.ops.rms_norm.kernel", False)
    }
    assert {"triton", "tml_kernels._aot.AotSpec"} <= targets
    assert "tml_kernels.ops.rms_norm.configs.Config" in targets


@pytest.mark.parametrize(
    ("path", "line", "target"),
    [
        ("tml_kernels/moe.py", "import tml_runtime", "tml_runtime"),
        ("tml_kernels/moe.py", "from bench.harness import load", "bench.harness.load"),
        ("tml_kernels/ops/a/api.py", "def f():\n    import tml_runtime.loop", "tml_runtime.loop"),
        ("tml_kernels/ops/a/api.py", "from ..b import g", "tml_kernels.ops.b.g"),
        ("tml_kernels/ops/a/__init__.py", "from ..b.api import g", "tml_kernels.ops.b.api.g"),
        ("tml_kernels/ops/a/api.py", "from .. import b", "tml_kernels.ops.b"),
        ("tml_kernels/x.py", "import_module('tml_runtime.loop')", "tml_runtime.loop"),
        ("runtime/tml_runtime/loop.py", "from . import demo", "tml_runtime.demo"),
        ("runtime/tml_runtime/model/x.py", "from ..cli import main", "tml_runtime.cli.main"),
        ("runtime/tml_runtime/demo/x.py", "from ..cli import main", "tml_runtime.cli.main"),
        ("runtime/tml_runtime/serve/x.py", "from ..demo import run", "tml_runtime.demo.run"),
        ("runtime/tml_runtime/demo/x.py", "from ..serve import x", "tml_runtime.serve.x"),
        ("runtime/tml_runtime/serve/x.py", "from ..loop import Runtime\nfrom . import y", None),
        ("runtime/tml_runtime/cli.py", "x = __import__('os'); import numpy", None),
        ("runtime/tml_runtime/cli.py", "from .demo import run", None),
        ("runtime/tml_runtime/loop.py", "from tml_kernels.ops.a import f", None),
        ("tml_kernels/ops/__init__.py", "from .a import f\nfrom .b import g", None),
        ("tml_kernels/ops/a/api.py", "from ..._dims import Dims\nfrom .reference import r", None),
        ("tml_kernels/ops/a/api.py", "import benchmarks, tml_runtime_extras", None),
        ("bench/x.py", "import tml_runtime.demo\nfrom . import y", None),
    ],
)
def test_walk_of_a_made_up_tree(tmp_path: Path, path: str, line: str, target: str | None) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(f"from __future__ import annotations\n\n{line}\n")
    found = violations(tmp_path)
    assert [text.split(": ")[1] for text in found] == ([] if target is None else [target])
    assert all(text.startswith(path) for text in found)


INCLUDE = re.compile(r"^\s*#\s*include\s*[<\"]([^>\"]+)[>\"]", re.M)
FOREIGN = ("torch/", "ATen/", "c10/", "caffe2/")
PYTHON = ("Python.h", "pybind11/")


def bad_includes(csrc: Path) -> list[str]:
    """csrc knows no torch, and Python only in the bindings."""
    found = []
    for path in sorted(csrc.rglob("*")):
        if path.suffix not in (".h", ".cuh", ".cpp", ".cu", ".cc"):
            continue
        binding = path.parent == csrc and path.name.startswith("bind_")
        for header in INCLUDE.findall(path.read_text()):
            if header.startswith(FOREIGN) or (header.startswith(PYTHON) and not binding):
                found.append(f"{path.relative_to(csrc)}: {header}")
    return found


def test_csrc_knows_no_torch() -> None:
    assert list((ROOT / "csrc").glob("bind_*.cpp"))
    assert bad_includes(ROOT / "csrc") == []


def test_includes_of_a_made_up_tree(tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir()
    (tmp_path / "bind_core.cpp").write_text("#include <pybind11/pybind11.h>\n")
    (tmp_path / "kv" / "a.cu").write_text('#include "common/check.h"\n# include <Python.h>\n')
    (tmp_path / "kv" / "b.cuh").write_text("#include <torch/extension.h>\n")
    assert bad_includes(tmp_path) == ["kv/a.cu: Python.h", "kv/b.cuh: torch/extension.h"]
