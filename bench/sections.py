"""The sections of `bench accept`: which commands, for how long, and who reads what they leave.

Phases follow one another, what needs a GPU first. Sections of one phase run side by side; so what
is timed has a phase of its own, but for the ops, which start together and then take turns.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import checks
from .checks import Check
from .paths import ROOT, bench_names
from .process import Finished

_OP = "op "  # begins the names of their sections
BENCH = (sys.executable, "-m", "bench")
INFO = "import json, tml_kernels; print(json.dumps(tml_kernels.backend_info()))"
# Not in the quick run of the tests: what builds, installs or runs all of this again.
LEFT_OUT = ("tests/bench", "tests/demo", "tests/test_build.py", "tests/test_readme.py")
SHARES = {  # of the time for the times of all ops; 1 for the others
    "expert_mlp": 5.0,
    "layer": 3.0,
    "moe": 3.0,
    "paged_attention": 4.0,
    **dict.fromkeys(("apply_deltas", "move_pages", "plan_pages", "shift_keys"), 0.5),
}


@dataclass(frozen=True)
class Section:
    """why_not: the section is skipped for this reason. read: makes checks of a finished run."""

    name: str
    command: tuple[str, ...]
    read: Callable[[Finished], list[Check]]
    limit_s: float
    why_not: str = ""
    env: dict[str, str] = field(default_factory=dict)


def plan(
    scratch: Path,
    *,
    smoke: bool,
    gpu: bool,
    ops_seconds: float = 180.0,
    only: Sequence[str] | None = None,
) -> list[list[Section]]:
    """Phases of sections; what commands write goes under `scratch`.

    ops_seconds: for the times of all ops. only: names of sections; SystemExit if there is no such.
    """
    no_gpu = "" if gpu else "no GPU"
    ops = [_OP + op for op in (["rms_norm"] if smoke else bench_names())]
    ops = [name for name in ops if only is None or name in only]
    shares = {name: SHARES.get(name.removeprefix(_OP), 1.0) for name in ops}
    seconds = {name: ops_seconds * n / sum(shares.values()) for name, n in shares.items()}
    phases = [
        [_build(smoke)],
        [_backends()],
        [_tests("gpu tests", scratch / "gpu.xml", gpu=True, why_not=no_gpu)],
        [_ceilings(scratch / "ceilings.json", no_gpu)],
        [_op(name, scratch, seconds, smoke, gpu) for name in ops],
        [_tick(scratch / "tick.json", smoke)],
        [_host(scratch / "host.json", smoke)],
        [
            _compile(scratch / "compile.json", smoke),
            _tests("tests", scratch / "tests.xml", smoke=smoke),
        ],
    ]
    names = [section.name for phase in phases for section in phase]
    unknown = sorted(set(only or ()) - set(names))
    if unknown:
        raise SystemExit(f"no section {unknown}; sections: {names}")
    return [[s for s in phase if only is None or s.name in only] for phase in phases]


def _build(smoke: bool) -> Section:
    why_not = "left out by --smoke" if smoke else _why_no_build()
    return Section(
        "build",
        (sys.executable, "setup.py", "build_ext", "--inplace"),
        lambda done: checks.from_build("build", done),
        limit_s=120,
        why_not=why_not,
    )


def _why_no_build() -> str:
    if not (ROOT / "setup.py").exists():
        return "the checkout has no setup.py"
    missing = [m for m in ("setuptools", "pybind11") if importlib.util.find_spec(m) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "no C++ compiler"
    return ""


def _backends() -> Section:
    return Section(
        "backends",
        (sys.executable, "-c", INFO),
        lambda done: checks.from_backends("backends", done),
        limit_s=30,
    )


def _compile(report: Path, smoke: bool) -> Section:
    scope = ("--op", "rms_norm", "--arch", "90") if smoke else ()
    return Section(
        "kernels",
        (*BENCH, "compile", "--json", str(report), "--jobs", str(max(1, _cores() // 4)), *scope),
        lambda done: checks.from_compile("kernels", done, report),
        limit_s=150,
    )


def _tests(
    name: str, report: Path, *, gpu: bool = False, smoke: bool = False, why_not: str = ""
) -> Section:
    """The tests marked gpu, or the others that are quick."""
    kind = "gpu" if gpu else "not gpu and not slow"
    left_out = [path for path in LEFT_OUT if not (gpu and path == "tests/bench")]
    which = ["tests/test_dims.py"] if smoke else ["tests", *(f"--ignore={p}" for p in left_out)]
    workers = max(1, _cores() - 2 if gpu else _cores() // 2)
    parallel = workers > 1 and not smoke and importlib.util.find_spec("xdist") is not None
    timeout = ("--timeout", "90", "--timeout-method", "thread")  # a hung kernel takes no signal
    return Section(
        name,
        (
            sys.executable, "-m", "pytest", *which, "-m", kind, "-q", "-ra", "--strict-markers",
            "-o", "addopts=", "-p", "no:cacheprovider", f"--junitxml={report}",
            *(("-n", str(workers)) if parallel else ()),
            *(timeout if importlib.util.find_spec("pytest_timeout") else ()),
        ),
        lambda done: checks.from_pytest(name, done, report, all_needed=gpu),
        limit_s=300 if gpu else 180,  # kernels are compiled in every process
        why_not=why_not or ("" if importlib.util.find_spec("pytest") else "not installed: pytest"),
        env={"OMP_NUM_THREADS": "1"} if parallel else {},
    )  # fmt: skip


def _ceilings(report: Path, why_not: str) -> Section:
    return Section(
        "ceilings",
        (*BENCH, "ceilings", "--json", str(report)),
        lambda done: checks.from_ceilings("ceilings", done, report),
        limit_s=45,
        why_not=why_not,
    )


def _op(name: str, scratch: Path, seconds: Mapping[str, float], smoke: bool, gpu: bool) -> Section:
    """seconds: for the times alone, by op, from when it is its turn."""
    op = name.removeprefix(_OP)
    report = scratch / "ops" / f"{op}.json"
    options = ["--out", str(report.parent), "--seconds", f"{seconds[name]:.0f}"]
    if gpu:
        options += ["--quick", "--ceilings", str(scratch / "ceilings.json")]
        options += ["--turns", str(scratch / "turns"), "--of", str(len(seconds))]
    return Section(
        name,
        (*BENCH, op, *options, *(["--smoke"] if smoke else [])),
        lambda done: checks.from_op(name, done, report),
        # all of them, to start, to check, and for cases begun in time
        limit_s=sum(seconds.values()) + 120,
    )


def _tick(report: Path, smoke: bool) -> Section:
    # Under --smoke on the virtual clock: a check of the loop, not of this machine's speed.
    scope = ("--ticks", "2") if smoke else ("--seconds", "10", "--sessions", "1")
    return Section(
        "tick",
        (*BENCH, "tick", "--json", str(report), *scope),
        lambda done: checks.from_tick("tick", done, report),
        limit_s=45,
    )


def _host(report: Path, smoke: bool) -> Section:
    sizes = "none" if smoke else "none,640x480"
    sessions, ticks = ("1", "2") if smoke else ("1,32", "100")
    scope = ("--sessions", sessions, "--video", sizes, "--ticks", ticks)
    return Section(
        "host",
        (*BENCH, "host", "--json", str(report), *scope),
        lambda done: checks.from_host("host", done, report),
        limit_s=60,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0))
