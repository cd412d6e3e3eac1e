"""csrc/tick, csrc/kv and bodies of its kernels as plain C++, run under the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KV = ("page_image", "page_stats", "page_table", "page_transaction")
SOURCES = {
    "tick": ["tests/csrc/tick_main.cpp", "csrc/tick/tick_thread.cpp"],
    "kv": ["tests/csrc/kv_main.cpp", *(f"csrc/kv/{name}.cpp" for name in KV)],
    "pages": ["tests/csrc/pages_main.cpp"],
}


# What takes the shortest in all: checks of addresses compile slowly, those of threads run slowly.
@pytest.mark.parametrize(
    ("sanitizers", "optimise"), [("thread", "-O1"), ("address,undefined", "-O0")]
)
@pytest.mark.parametrize("part", SOURCES)
def test_native(part: str, sanitizers: str, optimise: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    program = tmp_path / f"{part}_main"
    flags = ["-std=c++17", optimise, "-g", "-Wall", "-Wextra", "-Icsrc", "-pthread"]
    flags += ["-D_GLIBCXX_ASSERTIONS"]
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    command = [compiler, *flags, *sanitize, *SOURCES[part], "-o", str(program)]
    subprocess.run(command, cwd=ROOT, check=True)
    # A kernel with more address randomisation than the sanitizer knows makes it refuse to start.
    setarch = shutil.which("setarch")
    command = [setarch, "-R", str(program)] if setarch else [str(program)]
    env = os.environ | {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
