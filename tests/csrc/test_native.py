"""csrc/tick compiled as plain C++ and run under the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ["tests/csrc/tick_main.cpp", "csrc/tick/tick_thread.cpp"]


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_tick(sanitizers: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    program = tmp_path / "tick_main"
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Icsrc", "-pthread"]
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *flags, *sanitize, *SOURCES, "-o", program], cwd=ROOT, check=True)
    # A kernel with more address randomisation than the sanitizer knows makes it refuse to start.
    setarch = shutil.which("setarch")
    command = [setarch, "-R", program] if setarch else [program]
    env = os.environ | {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
