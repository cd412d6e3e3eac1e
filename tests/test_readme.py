"""README is the truth: its Python runs, its commands exist, its files are there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def commands() -> list[str]:
    lines = [line.strip() for block in blocks("bash") for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[0][:40])
def test_python_example_runs(code: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_there_are_examples_to_run() -> None:
    assert blocks("python")
    assert any(command.startswith("make demo") for command in commands())
    assert any(command.startswith("make test") for command in commands())


@pytest.mark.parametrize("command", commands())
def test_command_exists(command: str) -> None:
    """make targets are in the Makefile; programs and subcommands answer --help."""
    words = shlex.split(command)
    if words[0] == "git":
        return
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert words[1] in targets
        return
    program = {"tml-runtime": ["-m", "tml_runtime.cli"], "python": []}[words[0]]
    head = [word for word in words[1:4] if not word.startswith("--")][:3]
    result = subprocess.run(
        [sys.executable, *program, *(words[1:3] if words[0] == "python" else []),
         *([w for w in words[3:4] if not w.startswith("-")] if words[0] == "python" else head[:1]),
         "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for option in [word for word in words if word.startswith("--")]:
        assert option.split("=")[0] in result.stdout


@pytest.mark.parametrize("path", re.findall(r"\]\(((?!https?://|#)[^)]+)\)", README))
def test_linked_file_is_there(path: str) -> None:
    assert (ROOT / path.split("#")[0]).exists()
