"""Compile one kernel in one configuration for one architecture, and read what the cubin needs.

Runs without a GPU. Everything here runs in worker processes of `python -m bench compile`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import tempfile
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .table import Limit, Row

if TYPE_CHECKING:
    from tml_kernels._aot import AotSpec

LOOP_ARCH = 90  # whose loops are counted: compilers close them differently for each chip
READER = "3"  # of the rows below: a cached row of another reader is not taken

# Opcode at the start of a SASS instruction -> the name a row uses for it.
MMA_OPCODES = {
    "HMMA": "HMMA",
    "IMMA": "IMMA",
    "HGMMA": "HGMMA",
    "QGMMA": "QGMMA",
    "UTCHMMA": "UTCMMA",
    "UTCQMMA": "UTCMMA",
    "UTCIMMA": "UTCMMA",
    "UTCOMMA": "UTCMMA",
}
# Address, predicate, opcode, the rest.
_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;\n]*)", re.M
)
_TARGET = re.compile(r"0x([0-9a-f]+)")
_PREDICATE = re.compile(r"\bU?P\d")
# What decides whether wgmma, which reads shared memory in a way of its own, sees what was stored.
_SHARED_STEPS = re.compile(
    r"(?P<store>\bst\.shared|\bstmatrix)|(?P<fence>\bfence\.proxy\.async)|(?P<barrier>\bbar\.sync)"
    r"|(?P<wgmma>\bwgmma\.mma_async)"
)
_FENCING = {
    ("stored", "fence"): "clean",
    ("stored", "barrier"): "unfenced",
    ("unfenced", "fence"): "late",
    ("late", "barrier"): "clean",
}
_RESOURCE = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")


@dataclass(frozen=True)
class Job:
    """One compilation: the index of a spec in its op's aot_specs(), and an architecture."""

    op: str
    index: int
    arch: int
    key: str
    digest: str
    limit: Limit | None = None


def specs_of(op: str) -> list[AotSpec]:
    """The op's specs. TypeError when its kernels were imported for the interpreter."""
    from triton.runtime.jit import JITFunction

    specs = importlib.import_module(_spec_module(op)).aot_specs()
    for spec in specs:
        if not isinstance(spec.kernel, JITFunction):
            kind = type(spec.kernel).__name__
            raise TypeError(f"{op}: a {kind} cannot be compiled; unset TRITON_INTERPRET")
    return specs


def _spec_module(op: str) -> str:
    """launch.py where the op has one, else kernel.py."""
    package = f"tml_kernels.ops.{op}"
    found = importlib.util.find_spec(f"{package}.launch") is not None
    return f"{package}.launch" if found else f"{package}.kernel"


def jobs_of(op: str, arch: int) -> list[Job]:
    """Every shipped configuration of an op. ValueError for two with one name."""
    jobs = [
        Job(
            op=op,
            index=index,
            arch=arch,
            key=f"{op}/{spec_name(spec)}/sm_{arch}",
            digest=digest(spec, arch),
            limit=Limit(spec.mma, spec.max_loop),
        )
        for index, spec in enumerate(specs_of(op))
        if spec.min_arch <= arch < (spec.below_arch or arch + 1)
    ]
    for key, count in Counter(job.key for job in jobs).items():
        if count > 1:
            raise ValueError(f"{key}: {count} specs have this name; give them labels")
    return jobs


def spec_name(spec: AotSpec) -> str:
    """ "rms_norm_kernel/block_d=128,num_warps=1": the kernel, and its label or configuration."""
    label = spec.label or _config_label(spec.config)
    return f"{spec.kernel.__name__}/{label.replace('/', '_').replace(' ', '')}"


def _config_label(config: Any) -> str:
    if is_dataclass(config) and not isinstance(config, type):
        return ",".join(f"{name}={value}" for name, value in asdict(config).items())
    return str(config)


def digest(spec: AotSpec, arch: int) -> str:
    """Of all that decides the cubin: source with everything it calls, types, values, compiler."""
    import triton

    parts = (
        READER,
        triton.__version__,
        spec.kernel.cache_key,
        sorted(_signature(spec).items()),
        sorted((k, repr(v)) for k, v in _constexprs(spec).items()),
        _aligned(spec),
        spec.num_warps,
        spec.num_stages,
        spec.weights_per_step,
        arch,
    ) + ((spec.maxnreg,) if spec.maxnreg else ())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _constexprs(spec: AotSpec) -> dict[str, Any]:
    """Given values, and the kernel's defaults for what is neither given nor in the signature."""
    given = dict(spec.constexprs)
    for name, parameter in spec.kernel.signature.parameters.items():
        if name in spec.signature or name in given:
            continue
        if parameter.default is inspect.Parameter.empty:
            raise ValueError(f"{spec_name(spec)}: {name} is in neither signature nor constexprs")
        given[name] = parameter.default
    return given


def _signature(spec: AotSpec) -> dict[str, str]:
    unknown = (set(spec.signature) | set(spec.constexprs)) - set(spec.kernel.arg_names)
    if unknown:
        raise ValueError(f"{spec_name(spec)}: the kernel has no argument {sorted(unknown)}")
    return {name: spec.signature.get(name, "constexpr") for name in spec.kernel.arg_names}


def _aligned(spec: AotSpec) -> list[int]:
    """Indices of the arguments that are multiples of 16."""
    signature = _signature(spec)
    if spec.aligned is None:
        names = [n for n, t in signature.items() if t.startswith("*") or (n == "D" and t[0] == "i")]
    else:
        names = list(spec.aligned)
    return [spec.kernel.arg_names.index(name) for name in names]


def compile_job(job: Job) -> dict[str, Any]:
    """{"row": fields of Row} or {"error": text}; runs in a worker, so nothing is raised."""
    try:
        return {"row": asdict(compile_spec(specs_of(job.op)[job.index], job.arch))}
    except Exception:
        return {"error": traceback.format_exc()}


def compile_spec(spec: AotSpec, arch: int) -> Row:
    """Raises what Triton or ptxas raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attrs = {(index,): [["tt.divisibility", 16]] for index in _aligned(spec)}
    compiled: Any = triton.compile(
        ASTSource(spec.kernel, _signature(spec), _constexprs(spec), attrs),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": spec.num_warps,
            "num_stages": spec.num_stages,
            "maxnreg": spec.maxnreg,
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = read_usage(_cuobjdump("--dump-resource-usage", path))
        sass = _cuobjdump("--dump-sass", path)
    check_fences(compiled.asm["ptx"])
    loop = None
    if spec.weights_per_step and arch == LOOP_ARCH:
        loop = loop_cost(read_loops(sass), spec.weights_per_step, spec.num_warps)
    return Row(**usage, shared_dynamic=compiled.metadata.shared, **read_code(sass), loop=loop)


def check_fences(ptx: str) -> None:
    """ValueError where wgmma may read shared memory before what ordinary stores left there.

    Each thread that stores must fence before the barrier that others wait at. Triton puts the fence
    before the product; where the barrier of an asynchronous copy comes first, it is too late: seen
    on an H200 as sums that differ from run to run.
    """
    state = "clean"
    for step in _SHARED_STEPS.finditer(ptx):
        state = _FENCING.get((state, str(step.lastgroup)), state)
        if (state, step.lastgroup) == ("late", "wgmma"):
            raise ValueError("stores to shared memory are fenced from wgmma after their barrier")
        if step.lastgroup == "store":
            state = "stored"


def read_usage(text: str) -> dict[str, int]:
    """Registers, stack, local and static shared bytes of cuobjdump's resource report."""
    found = {name: int(value) for name, value in _RESOURCE.findall(text)}
    missing = {"REG", "STACK", "SHARED", "LOCAL"} - set(found)
    if missing:
        raise ValueError(f"cuobjdump reports no {sorted(missing)}:\n{text}")
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "local": found["LOCAL"],
        "shared_static": found["SHARED"],
    }


def read_code(sass: str) -> dict[str, Any]:
    """Local memory instructions, and which matrix instructions there are."""
    opcodes = Counter(opcode for _, _, opcode, _ in _INSTRUCTION.findall(sass))
    if not opcodes:
        raise ValueError(f"no instruction found in the disassembly:\n{sass[:1000]}")
    mma = {MMA_OPCODES[opcode] for opcode in opcodes if opcode in MMA_OPCODES}
    return {
        "spill_loads": opcodes["LDL"],
        "spill_stores": opcodes["STL"],
        "mma": "+".join(sorted(mma)),
    }


def read_loops(sass: str) -> list[int]:
    """How many instructions each innermost loop with matrix instructions has, in program order.

    A loop ends at a conditional branch back to its first instruction. Branches back without a
    condition return from waits that the compiler has moved behind the code.
    """
    code = [(int(at, 16), p, opcode, rest) for at, p, opcode, rest in _INSTRUCTION.findall(sass)]
    mma = [at for at, _, opcode, _ in code if opcode in MMA_OPCODES]
    loops = set()
    for end, predicate, opcode, rest in code:
        target = _TARGET.search(rest)
        if opcode != "BRA" or target is None or not (predicate or _PREDICATE.search(rest)):
            continue
        begin = int(target[1], 16)
        if any(begin <= at <= end for at in mma):
            loops.add((begin, end))
    inner = [
        (begin, end)
        for begin, end in sorted(loops)
        if not any((begin, end) != (b, e) and begin <= b and e <= end for b, e in loops)
    ]
    return [sum(begin <= at <= end for at, *_ in code) for begin, end in inner]


def loop_cost(loops: list[int], weights_per_step: tuple[int, ...], num_warps: int) -> float:
    """Instructions per weight of the heaviest loop: all threads', over the weights of one step."""
    if len(loops) != len(weights_per_step):
        raise ValueError(
            f"{len(loops)} loops have matrix instructions (of {loops} instructions), "
            f"weights_per_step is of {len(weights_per_step)}: {weights_per_step}"
        )
    costs = [n * 32 * num_warps / w for n, w in zip(loops, weights_per_step, strict=True)]
    return round(max(costs), 2)


def _cuobjdump(flag: str, path: Path) -> str:
    command = [cuobjdump_path(), flag, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr or result.stdout}")
    return result.stdout


def cuobjdump_path() -> str:
    """The one in Triton's package, else the one on the PATH."""
    import triton

    packaged = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if os.access(packaged, os.X_OK):
        return str(packaged)
    found = shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError(f"cuobjdump is neither at {packaged} nor on the PATH")
    return found
