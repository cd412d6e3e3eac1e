"""Builds the extension modules. Everything else about the package is in pyproject.toml.

TML_CUDA=auto|0|1   build tml_kernels._cuda when nvcc is found (auto), never, or else fail
TML_CUDA_ARCHS      "80;90a;100a" unless given
CUDA_HOME           where nvcc is; otherwise PATH, then /usr/local/cuda

torch is not imported, and no torch header is included: one build serves every torch version.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
HOST_FLAGS = ["-fPIC", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
DEFAULT_ARCHS = "80;90a;100a"
HEADERS = sorted(str(p) for p in Path("csrc").rglob("*") if p.suffix in (".h", ".cuh"))
CORE = "tml_kernels._core"
CUDA = "tml_kernels._cuda"
TICK = "tml_runtime._tick"


class CudaBuildError(Exception):
    """nvcc is missing or does not work."""


def say(text: str) -> None:
    print(f"tml-kernels: {text}", file=sys.stderr, flush=True)


def extension(name: str, *sources: str) -> Extension:
    return Extension(
        name,
        list(sources),
        include_dirs=["csrc", pybind11.get_include()],
        extra_compile_args=CXX_FLAGS,
        extra_link_args=["-pthread"],
        depends=HEADERS,
        language="c++",
    )


def cuda_mode() -> str:
    mode = os.environ.get("TML_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"tml-kernels: TML_CUDA={mode!r}: expected auto, 0 or 1")
    return mode


def cuda_archs() -> list[str]:
    archs = os.environ.get("TML_CUDA_ARCHS", DEFAULT_ARCHS).split(";")
    for arch in archs:
        if not re.fullmatch(r"[1-9][0-9]{1,2}[af]?", arch):
            raise SystemExit(f"tml-kernels: TML_CUDA_ARCHS: {arch!r} is not like 80 or 90a")
    return archs


def find_nvcc() -> str:
    """CUDA_HOME alone decides when it is set, so that a wrong one is not papered over."""
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc = shutil.which("nvcc", path=os.path.join(home, "bin"))
        where = f"CUDA_HOME={home}"
    else:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        where = "PATH and /usr/local/cuda; set CUDA_HOME"
    if nvcc is None:
        raise CudaBuildError(f"no nvcc in {where}")
    return nvcc


def gencode(arch: str) -> str:
    """Machine code; for an architecture without a letter also PTX, which newer chips can run."""
    ptx = f",compute_{arch}" if arch.isdigit() else ""
    return f"-gencode=arch=compute_{arch},code=[sm_{arch}{ptx}]"


def run(command: list[str]) -> None:
    """Raises CudaBuildError with the compiler's first error line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CudaBuildError(f"{command[0]}: {error.strerror}") from error
    if done.returncode == 0:
        return
    lines = (done.stdout + done.stderr).strip().splitlines()
    errors = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()]
    reason = (errors or lines or [f"exit status {done.returncode}"])[0]
    raise CudaBuildError(f"{command[0]} failed: {reason.strip()}")


class Build(build_ext):
    """Compiles _cuda with nvcc alone, which knows its own headers and libraries."""

    def build_extensions(self) -> None:
        self.parallel = self.parallel or os.cpu_count()
        cuda = next(e for e in self.extensions if e.name == CUDA)
        self.extensions.remove(cuda)
        archs = self.try_cuda(cuda)
        cxx = self.compiler.compiler_cxx[0]
        if shutil.which(cxx) is None:
            say(
                f"no C++ compiler: {cxx!r} not found (install g++ or set CXX), so {CORE} and "
                f"{TICK} are not built. The ops still work through torch and Triton; the "
                "KV cache and the runtime do not."
            )
            self.extensions.clear()
        else:
            self.describe_build(cxx, archs)
            super().build_extensions()
        if archs is not None:
            self.extensions.append(cuda)

    def try_cuda(self, cuda: Extension) -> list[str] | None:
        """The architectures that were built for; None where there is no CUDA build."""
        mode, archs = cuda_mode(), cuda_archs()
        if mode == "0":
            return None
        try:
            self.build_cuda(cuda, find_nvcc(), archs)
        except CudaBuildError as error:
            if mode == "1":
                raise SystemExit(f"tml-kernels: TML_CUDA=1, but {error}") from None
            say(
                f"{error}: {CUDA} is not built. Everything works on the CPU, and the Triton "
                "kernels on a GPU; there torch moves the cache's pages and launches ticks, and a "
                "benchmark does not measure the read bandwidth."
            )
            return None
        return archs

    def build_cuda(self, cuda: Extension, nvcc: str, archs: list[str]) -> None:
        flags = ["-std=c++17", "-O3", f"-Xcompiler={','.join(HOST_FLAGS)}", "--threads=0"]
        flags += [f"-I{path}" for path in [*cuda.include_dirs, sysconfig.get_path("include")]]
        temp = Path(self.build_temp) / "cuda"
        temp.mkdir(parents=True, exist_ok=True)
        objects = [str(temp / f"{Path(source).name}.o") for source in cuda.sources]
        jobs = []
        for source, target in zip(cuda.sources, objects, strict=True):
            device = [gencode(arch) for arch in archs] if source.endswith(".cu") else []
            jobs.append([nvcc, *flags, *device, "-c", source, "-o", target])
        with ThreadPoolExecutor(self.parallel) as pool:
            list(pool.map(run, jobs))
        library = Path(self.get_ext_fullpath(cuda.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        # Our copy of the runtime stays ours: torch's may be another version in the same process.
        hide = ["-Xlinker=--exclude-libs=ALL", "-Xlinker=-s"]
        link = ["-shared", "-cudart=static", *hide]
        run([nvcc, *link, gencode(archs[0]), *objects, "-o", str(library)])

    def describe_build(self, cxx: str, archs: list[str] | None) -> None:
        """What _core.build_info() tells."""
        version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=False)
        core = next(e for e in self.extensions if e.name == CORE)
        core.define_macros = [
            ("TML_COMPILER", quoted((version.stdout.splitlines() or [cxx])[0])),
            ("TML_FLAGS", quoted(" ".join(CXX_FLAGS))),
        ]
        if archs is not None:
            core.define_macros.append(("TML_CUDA_ARCHS", quoted(";".join(archs))))


def quoted(text: str) -> str:
    return '"' + text.replace('"', "'") + '"'


setup(
    ext_modules=[
        extension(
            CORE,
            "csrc/bind_core.cpp",
            "csrc/kv/page_image.cpp",
            "csrc/kv/page_stats.cpp",
            "csrc/kv/page_table.cpp",
            "csrc/kv/page_transaction.cpp",
        ),
        extension(TICK, "csrc/bind_tick.cpp", "csrc/tick/tick_thread.cpp"),
        extension(
            CUDA,
            "csrc/bind_cuda.cpp",
            "csrc/common/stream_read.cu",
            "csrc/kv/apply_deltas.cu",
            "csrc/kv/move_pages.cu",
            "csrc/tick/graph_launch.cpp",
        ),
    ],
    cmdclass={"build_ext": Build},
)
