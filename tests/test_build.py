"""setup.py's promises: what it builds, what it says when it cannot, and what the result holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())
ARCHS = ["80", "90a", "100a"]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def build(tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=300
    )


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("tml-kernels: ")]


def fake_nvcc(tmp_path: Path, script: str) -> str:
    """A CUDA_HOME whose nvcc does what `script` does."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return str(tmp_path)


def test_required_nvcc_that_is_missing(tmp_path: Path) -> None:
    done = build(tmp_path, TML_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert said(done) == [f"tml-kernels: TML_CUDA=1, but no nvcc in CUDA_HOME={tmp_path}"]


def test_required_nvcc_that_is_broken(tmp_path: Path) -> None:
    home = fake_nvcc(tmp_path, "echo 'nvcc fatal   : Unsupported gpu architecture' >&2; exit 1")
    done = build(tmp_path, TML_CUDA="1", CUDA_HOME=home)
    assert done.returncode != 0
    reason = "failed: nvcc fatal   : Unsupported gpu architecture"
    assert said(done) == [f"tml-kernels: TML_CUDA=1, but {home}/bin/nvcc {reason}"]


def test_nothing_to_build_with(tmp_path: Path) -> None:
    """The install goes on, and says in one line each what is missing and what still works."""
    home = fake_nvcc(tmp_path, "echo 'gcc: fatal error: cannot execute cc1plus' >&2; exit 1")
    done = build(tmp_path, TML_CUDA="auto", CUDA_HOME=home, CXX="/nowhere/c++")
    assert done.returncode == 0
    cuda, core = said(done)
    assert "cannot execute cc1plus: tml_kernels._cuda is not built. Everything works on" in cuda
    assert "no C++ compiler: '/nowhere/c++' not found" in core
    assert "tml_kernels._core and tml_runtime._tick are not built. The ops still work" in core
    assert not list((tmp_path / "lib").rglob("*.so"))


@pytest.mark.parametrize(
    ("name", "value"), [("TML_CUDA", "yes"), ("TML_CUDA_ARCHS", "sm_90"), ("TML_CUDA_ARCHS", "")]
)
def test_bad_variable(name: str, value: str, tmp_path: Path) -> None:
    done = build(tmp_path, **{name: value})
    assert done.returncode != 0
    (line,) = said(done)
    assert line.startswith(f"tml-kernels: {name}")
    assert repr(value) in line


def test_what_is_installed() -> None:
    from tml_kernels import _core

    info = _core.build_info()
    assert info["cxx_standard"] >= 201703
    assert info["build_type"] == "release"
    assert "-O3" in info["flags"]
    assert info["compiler"]
    if info["cuda_archs"] is not None:
        from tml_kernels import _cuda

        assert _cuda.device_info()["runtime_version"] >= 12000


def extensions() -> list[Path]:
    from tml_kernels import _core
    from tml_runtime import _tick

    found = [Path(_core.__file__), Path(_tick.__file__)]
    return found + list(found[0].parent.glob("_cuda.*.so"))


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
@pytest.mark.parametrize("path", extensions(), ids=lambda path: path.name.partition(".")[0])
def test_needs_no_torch_no_driver_and_shows_one_symbol(path: Path) -> None:
    def readelf(*flags: str) -> str:
        command = ["readelf", "-W", *flags, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", readelf("-d"))
    assert needed
    assert not [name for name in needed if re.search("torch|c10|cuda|python", name)]
    symbols = [line.split() for line in readelf("--dyn-syms").splitlines()]
    names = [s[7] for s in symbols if len(s) > 7 and s[6] == "UND"]
    assert [name for name in names if name.startswith("Py")]
    assert not [
        name for name in names if re.match(r"cu[A-Z]|cuda[A-Z]|_ZNK?(2at|3c10|5torch)", name)
    ]
    shown = [s[7] for s in symbols if len(s) > 7 and s[4] == "GLOBAL" and s[6].isdigit()]
    assert shown == [f"PyInit_{path.name.partition('.')[0]}"]


@pytest.mark.parametrize("path", CSRC, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_source_includes(path: Path) -> None:
    """No torch anywhere; Python only in the bindings; CUDA not in what is always built."""
    includes = re.findall(r'#\s*include\s*[<"](.+)[>"]', path.read_text())
    assert not [name for name in includes if re.match("torch|ATen|c10|THC", name)]
    python = [name for name in includes if re.match("Python.h|pybind11", name)]
    assert bool(python) == path.name.startswith("bind_")
    if path.name in ("bind_core.cpp", "bind_tick.cpp"):
        assert not [name for name in includes if "cuda" in name or name.endswith(".cuh")]


def test_tick_is_built_without_cuda_headers() -> None:
    tick = [p for p in CSRC if p.parent.name == "tick" and not p.name.startswith("graph_launch")]
    assert not [p for p in tick if "cuda" in re.sub("//.*", "", p.read_text())]


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("path", [p for p in CSRC if p.suffix == ".cu"], ids=lambda path: path.name)
def test_kernel_compiles_without_spills(path: Path, arch: str, tmp_path: Path) -> None:
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    flags = ["-std=c++17", "-O3", "-Xptxas=-v", "-cubin", "-I", str(ROOT / "csrc")]
    command = [str(NVCC), *flags, code, str(path), "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills
    assert set(spills) == {("0", "0")}


READS_ONLY = """#!/bin/sh
# Compiling reads every file that the real compiler reads, and gives an object with nothing in it.
for arg; do
  shift
  case $arg in -c) compile=1 ;; *) set -- "$@" "$arg" ;; esac
  if [ "$last" = -o ]; then object=$arg; fi
  last=$arg
done
if [ -z "$compile" ]; then exec {real} "$@"; fi
{real} "$@" -E && : >"$object.cpp" && exec {real} -c "$object.cpp" -o "$object"
"""


def compilers_that_read(tmp_path: Path) -> dict[str, str]:
    """Whether the code compiles is known from the build that these tests import."""
    cxx = os.environ.get("CXX", "c++")
    for name, real in {"c++": cxx, "nvcc": NVCC}.items():
        if real is not None:
            program = tmp_path / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(READS_ONLY.format(real=real))
            program.chmod(0o755)
    env = {"CXX": str(tmp_path / "bin" / "c++")}
    return env if NVCC is None else env | {"CUDA_HOME": str(tmp_path)}


def test_sdist_and_wheel(tmp_path: Path) -> None:
    """A wheel that is built from the source distribution alone has every module in its package."""
    compilers = compilers_that_read(tmp_path)
    tree, out = tmp_path / "tree", tmp_path / "out"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("csrc", "tml_kernels", "runtime"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)

    def run_hook(hook: str, folder: Path) -> Path:
        code = f"from setuptools import build_meta as b; b.{hook}({str(out)!r})"
        env = os.environ | {"TML_CUDA": "auto", "TML_CUDA_ARCHS": "90a", **compilers}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        (built,) = out.glob("*.tar.gz" if hook == "build_sdist" else "*.whl")
        return built

    out.mkdir()
    with tarfile.open(run_hook("build_sdist", tree)) as sdist:
        sdist.extractall(tmp_path / "sdist", filter="data")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    with zipfile.ZipFile(run_hook("build_wheel", unpacked)) as wheel:
        names = wheel.namelist()
    modules = ["tml_kernels/_core", "tml_runtime/_tick"] + ["tml_kernels/_cuda"] * (
        NVCC is not None
    )
    for module in modules:
        assert [name for name in names if re.fullmatch(rf"{module}\.[^/]+\.so", name)]
        assert f"{module}.pyi" in names
    for package in ("tml_kernels", "tml_runtime"):
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= set(names)
    checkpoint = "tml_runtime/demo/cue/checkpoint"
    assert {f"{checkpoint}/model.safetensors", f"{checkpoint}/report.json"} <= set(names)
    page = (ROOT / "runtime" / "tml_runtime" / "serve" / "web").iterdir()
    assert {f"tml_runtime/serve/web/{file.name}" for file in page} <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tml_kernels", "tml_runtime"}
