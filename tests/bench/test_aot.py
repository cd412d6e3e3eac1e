"""Kernels are really compiled here, in processes where Triton's interpreter is off."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.paths import ROOT, child_env

SPECS = """
import triton
import triton.language as tl
from tml_kernels._aot import AotSpec


@triton.jit
def copy_kernel(x_ptr, y_ptr, D, BLOCK: tl.constexpr = 128):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < D, other=0.0), mask=offs < D)


@triton.jit
def product_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tl.dot(x, x))


@triton.jit
def loop_kernel(x_ptr, y_ptr, D, M: tl.constexpr, N: tl.constexpr):
    offs_m, offs_n = tl.arange(0, M), tl.arange(0, N)
    acc = tl.zeros([M, N], tl.float32)
    for d in range(0, D, 64):
        offs_d = d + tl.arange(0, 64)
        w = tl.load(x_ptr + offs_m[:, None] * D + offs_d[None, :])
        acc += tl.dot(w, tl.load(x_ptr + offs_n[None, :] * D + offs_d[:, None]))
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc)


@triton.jit
def spilling_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tl.dot(x, x) + tl.dot(x + 1, x).trans())


def spec(kernel, constexprs={}, **options):
    pointers = {"x_ptr": "*bf16", "y_ptr": "*fp32"}
    sizes = {"D": "i32"} if "D" in kernel.arg_names else {}
    return AotSpec(kernel, "x", pointers | sizes, constexprs, **options)
"""

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import specs
from dataclasses import asdict
from bench import aot
print(json.dumps({
    "copy": asdict(aot.compile_spec(specs.spec(specs.copy_kernel), 80)),
    "product": asdict(aot.compile_spec(specs.spec(specs.product_kernel, {"N": 64}), 90)),
    "spilling": asdict(aot.compile_spec(
        specs.spec(specs.spilling_kernel, {"N": 128}, num_warps=2), 90)),
    "loops": [asdict(aot.compile_spec(specs.spec(
        specs.loop_kernel, {"M": m, "N": 16}, weights_per_step=(64 * m,)), arch))
        for m, arch in [(64, 90), (128, 90), (64, 80)]],
    "uncounted": aot.digest(specs.spec(specs.copy_kernel), 90) == aot.digest(
        specs.spec(specs.copy_kernel, weights_per_step=(128,)), 90),
    "digests": [aot.digest(specs.spec(specs.copy_kernel, c, num_warps=w), a)
        for c, w, a in [
            ({}, 4, 90), ({}, 4, 90), ({}, 8, 90), ({"BLOCK": 64}, 4, 90), ({}, 4, 80)]],
}))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("aot")
    (folder / "specs.py").write_text(SPECS)
    env = child_env(interpret=False) | {"TRITON_CACHE_DIR": str(folder / "cache")}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_copy_has_no_local_memory(compiled: dict) -> None:
    row = compiled["copy"]
    assert 8 <= row["registers"] <= 64
    assert (row["stack"], row["local"], row["mma"]) == (0, 0, "")


def test_product_uses_the_tensor_cores_of_its_chip(compiled: dict) -> None:
    assert compiled["product"]["mma"] == "HGMMA"
    assert compiled["product"]["shared_dynamic"] >= 64 * 64 * 2


def test_spills_are_seen(compiled: dict) -> None:
    """Two 128 x 128 accumulators for 64 threads: 512 values a thread, of at most 255."""
    row = compiled["spilling"]
    assert row["stack"] + row["local"] > 0
    assert row["spill_loads"] > 0


def test_main_loop_is_counted(compiled: dict) -> None:
    """A bf16 weight takes one instruction or so: fewer with more rows for the same tokens."""
    assert compiled["product"]["loop"] is None
    narrow, wide, elsewhere = (row["loop"] for row in compiled["loops"])
    assert 0.5 < wide < narrow < 5.0
    assert elsewhere is None  # counted on sm_90 alone


def test_digest_is_of_all_that_decides_the_code(compiled: dict) -> None:
    first, same, *others = compiled["digests"]
    assert first == same
    assert len({first, *others}) == 4
    assert not compiled["uncounted"]  # the row holds the count


def bench_compile(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench", "compile", "--op", "rms_norm", "--arch", "90"]
    env = child_env()  # with TRITON_INTERPRET as pytest has it: the command must clear it itself
    return subprocess.run(
        [*command, *options], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )


def test_command_compiles_and_compares(tmp_path: Path) -> None:
    report = tmp_path / "compile.json"
    good = bench_compile("--json", str(report))
    content = json.loads(report.read_text())
    assert content["checked"] == len(content["rows"]) > 0
    assert [f for f in content["failures"] if f.startswith("rms_norm/")] == [], good.stdout

    empty = tmp_path / "table.json"
    bad = bench_compile("--table", str(empty))
    assert bad.returncode == 1
    assert "not in the table" in bad.stdout
    assert not empty.exists()
