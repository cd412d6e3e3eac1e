"""The public names, and that the promises in runtime/README.md are held by tests that exist."""

from __future__ import annotations

import builtins
import re
from pathlib import Path

import tml_runtime
from tml_runtime import errors

ROOT = Path(__file__).parents[2]


def test_public_names() -> None:
    assert tml_runtime.__all__ == [
        "InteractionModel",
        "ModelConfig",
        "Runtime",
        "Session",
        "TurnLayout",
        "errors",
    ]
    assert all(hasattr(tml_runtime, name) for name in tml_runtime.__all__)


def test_every_error_is_ours_and_a_builtin_one() -> None:
    ours = [e for e in vars(errors).values() if isinstance(e, type)]
    assert len(ours) == 16
    for error in ours:
        assert issubclass(error, errors.TmlRuntimeError)
        bases = [b for b in error.__mro__ if vars(builtins).get(b.__name__) is b]
        assert bases[0] is not Exception or error is errors.TmlRuntimeError


def test_the_readme_names_tests_that_exist() -> None:
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", (ROOT / "runtime/README.md").read_text())
    assert len(named) >= 20
    for module, function in named:
        (path,) = (ROOT / "tests").rglob(f"{module}.py")
        source = path.read_text()
        assert f"def {function}(" in source, f"{module}.py has no {function}"


def test_the_readme_example_runs() -> None:
    text = (ROOT / "runtime/README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "runtime/README.md", "exec"), {})
