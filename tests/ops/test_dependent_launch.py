"""Programmatic dependent launch: every kernel waits before all else, and says the same."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.paths import OPS, ROOT, child_env

# The PTX of a small kernel with the flag, for sm_90, behind the options of its launches.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench import aot
from tml_kernels._triton.dependent import LAUNCH

spec = aot.specs_of("embed_tokens")[0]
source = ASTSource(spec.kernel, aot._signature(spec), aot._constexprs(spec))
made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(LAUNCH, made.asm["ptx"])
"""

# What a small model says in 300 ticks of four sessions, replayed from graphs.
REPLAY = """
import hashlib
import numpy as np, torch
from tml_runtime import InteractionModel, ModelConfig, Runtime
from tml_runtime.session import SpeechOut

config = ModelConfig.preset("tiny")
model = InteractionModel.random(config, device="cuda", dtype=torch.bfloat16)
runtime = Runtime(model, num_slots=4, realtime=False)
assert runtime.report()["graphs"]["mode"] == "graph"
rng, said = np.random.default_rng(0), hashlib.sha256()
with runtime:
    sessions = [runtime.open_session(seed=n) for n in range(4)]
    for _ in range(300):
        for session in sessions:
            samples = rng.normal(0, 0.1, config.layout.samples_per_tick).astype(np.float32)
            frame = rng.integers(0, 256, (80, 80, 3), np.uint8)
            session.push_audio(samples, session.open_t)
            session.push_video(frame, session.open_t)
        runtime.run_ticks(1)
        for session in sessions:
            for out in session.poll():
                said.update(out.pcm.tobytes() if isinstance(out, SpeechOut) else repr(out).encode())
print(said.hexdigest())
"""


def run(script: str, flag: str) -> str:
    """What a fresh process prints: the flag is read when kernels are imported."""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, env=child_env(interpret=False) | {"TML_PDL": flag},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_kernel_waits_first_and_is_launched_so() -> None:
    waits: dict[str, bool] = {}
    launches: list[tuple[str, bool]] = []
    for path in OPS.glob("*/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                if any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list):
                    body = node.body[ast.get_docstring(node) is not None :]
                    key = f"{path.parent.name}/{node.name}"
                    waits[key] = ast.unparse(body[0]) == "wait_for_inputs()"
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                name = ast.unparse(node.func.value)
                options = [ast.unparse(kw.value) for kw in node.keywords if kw.arg is None]
                launches.append((f"{path.parent.name}/{name}", "LAUNCH" in options))
    assert len(waits) >= 20 and all(waits.values()), waits
    assert {key for key, _ in launches} == set(waits)
    assert all(with_option for _, with_option in launches), launches


def test_the_wait_comes_before_memory_is_touched() -> None:
    """Only with the flag: the instruction is Hopper's."""
    plain, early = run(COMPILE, "0"), run(COMPILE, "1")
    assert plain.startswith("{} ") and "griddepcontrol" not in plain
    assert early.startswith("{'launch_pdl': True} ")
    first = [
        early.index(found[0]) if (found := re.search(pattern, early)) else -1
        for pattern in (
            r"griddepcontrol\.wait;",
            r"griddepcontrol\.launch_dependents;",
            r"\b(ld|st|red|atom|cp\.async)\S*\.global",
        )
    ]
    assert 0 < first[0] < first[1] < first[2], first


@pytest.mark.gpu
@pytest.mark.timeout(600)  # two processes that compile every kernel
def test_gpu_a_model_says_the_same() -> None:
    """In 300 replays of a tick, most of whose launches then overlap."""
    with ThreadPoolExecutor(2) as pool:
        early, plain = pool.map(lambda flag: run(REPLAY, flag), ("1", "0"))
    assert early == plain
