"""Compile one kernel in one configuration for one architecture, and read what the cubin needs.

Runs without a GPU. Everything here runs in worker processes of `python -m bench compile`.
"""

from __future__ import annotations

import hashlib
import importlib
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

from .table import Row

if TYPE_CHECKING:
    from tml_kernels._aot import AotSpec

READER = "1"  # of the rows below: a cached row of another reader is not taken

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
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.M)
_RESOURCE = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")


@dataclass(frozen=True)
class Job:
    """One compilation: the index of a spec in its op's aot_specs(), and an architecture."""

    op: str
    index: int
    arch: int
    key: str
    digest: str


def specs_of(op: str) -> list[AotSpec]:
    """The op's specs. TypeError when its kernels were imported for the interpreter."""
    from triton.runtime.jit import JITFunction

    specs = importlib.import_module(f"tml_kernels.ops.{op}.kernel").aot_specs()
    for spec in specs:
        if not isinstance(spec.kernel, JITFunction):
            kind = type(spec.kernel).__name__
            raise TypeError(f"{op}: a {kind} cannot be compiled; unset TRITON_INTERPRET")
    return specs


def jobs_of(op: str, arch: int) -> list[Job]:
    """Every shipped configuration of an op. ValueError for two with one name."""
    jobs = [
        Job(op, index, arch, f"{op}/{spec_name(spec)}/sm_{arch}", digest(spec, arch))
        for index, spec in enumerate(specs_of(op))
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
        arch,
    )
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
        options={"num_warps": spec.num_warps, "num_stages": spec.num_stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = read_usage(_cuobjdump("--dump-resource-usage", path))
        code = read_code(_cuobjdump("--dump-sass", path))
    return Row(**usage, shared_dynamic=compiled.metadata.shared, **code)


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
    opcodes = Counter(_INSTRUCTION.findall(sass))
    if not opcodes:
        raise ValueError(f"no instruction found in the disassembly:\n{sass[:1000]}")
    mma = {MMA_OPCODES[opcode] for opcode in opcodes if opcode in MMA_OPCODES}
    return {
        "spill_loads": opcodes["LDL"],
        "spill_stores": opcodes["STL"],
        "mma": "+".join(sorted(mma)),
    }


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
