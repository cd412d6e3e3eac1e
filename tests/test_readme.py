"""README is the truth: its Python runs, its commands exist, its files are there."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as bench
from tml_runtime import cli

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
def test_command_is_one(command: str) -> None:
    """Programs take it as it stands; make has the target, whose program takes its ARGS."""
    program, *words = shlex.split(command)
    if program == "make":
        target, *options = words
        assert target in re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        words = shlex.split(" ".join(option.removeprefix("ARGS=") for option in options))
        if target == "demo":
            program, words = "tml-runtime", ["demo", *words]
        elif target == "bench":
            program, words = "python", ["-m", "bench", *words]
    if program == "tml-runtime":
        parse(cli.build_parser(), words)
    elif program == "python":
        assert words[:2] == ["-m", "bench"]
        parse(bench.build_parser(), words[2:])
    else:
        assert program in ("git", "make")


def parse(parser: argparse.ArgumentParser, words: list[str]) -> None:
    try:
        parser.parse_args(words)
    except SystemExit as end:  # argparse has said why
        assert end.code == 0 and "--help" in words, shlex.join(words)


@pytest.mark.parametrize("path", re.findall(r"\]\(((?!https?://|#)[^)]+)\)", README))
def test_linked_file_is_there(path: str) -> None:
    assert (ROOT / path.split("#")[0]).exists()
