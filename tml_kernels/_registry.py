"""Registers ops with torch, and knows which backend each one has and why.

Every op has one schema, writes into tensors it is given and returns nothing: nothing is allocated
behind a captured graph's back, and the fake implementation is empty. CPU tensors take the plain
torch path in float32; CUDA tensors take the kernel where there is one, and the plain path where
there is none yet, which `backend_info()` says.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_LIB = torch.library.Library("tml_kernels", "DEF")
_BACKENDS: dict[str, OpBackends] = {}


@dataclass(frozen=True)
class OpBackends:
    """What runs an op on each device. `why` says why CUDA tensors do not get a kernel, else ""."""

    cpu: str
    cuda: str
    why: str


@dataclass(frozen=True)
class Toolchain:
    """What a kernel is made with. why_not: why such kernels cannot run here, else None."""

    name: str
    why_not: Callable[[], str | None]


def triton_why_not() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (Linux only: pip install triton)"
    return None


def cuda_why_not() -> str | None:
    if importlib.util.find_spec("tml_kernels._cuda") is None:
        return "tml_kernels._cuda is not built (needs nvcc: TML_CUDA=1 pip install -e . says more)"
    return None


TRITON = Toolchain("triton", triton_why_not)
CUDA = Toolchain("_cuda", cuda_why_not)


def on_its_device(kernel: Callable[..., None]) -> Callable[..., None]:
    """Kernels run on the current device, which need not be that of the first tensor."""

    def launch(*args: Any) -> None:
        with torch.cuda.device(args[0].device):
            kernel(*args)

    return launch


def register_op(
    schema: str,
    *,
    plain: Callable[..., None],
    kernel: Callable[..., None] | None = None,
    needs: Toolchain = TRITON,
) -> torch._ops.OpOverload:
    """Register `tml_kernels::<schema>`; returns the callable overload.

    schema: a torch schema whose outputs are mutated arguments, for instance
        "rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()".
    plain: the reference maths in float32, any device. kernel: the launcher for CUDA tensors, whose
    first argument is on the GPU. needs: what the kernel is made with.
    """
    name = schema.split("(", 1)[0]
    why = "no kernel for this op yet" if kernel is None else (needs.why_not() or "")
    _LIB.define(schema)
    _LIB.impl(name, plain, "CPU")
    _LIB.impl(name, plain if why or kernel is None else on_its_device(kernel), "CUDA")
    torch.library.register_fake(f"tml_kernels::{name}", lambda *args, **kwargs: None, lib=_LIB)
    _BACKENDS[name] = OpBackends("plain", "plain" if why else needs.name, why)
    return getattr(torch.ops.tml_kernels, name).default


def registered_ops() -> dict[str, OpBackends]:
    return dict(sorted(_BACKENDS.items()))


def refuse_grad(*tensors: torch.Tensor | None) -> None:
    """The ops have no backward; a silently lost gradient would be worse than an error."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            "tml_kernels ops are for inference and have no backward: call under torch.no_grad(), "
            "or use the op's reference (tml_kernels.ops.<op>.reference), which torch differentiates"
        )


def is_same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are the same elements. torch.compile cannot ask that: there, whether they are
    one tensor."""
    if torch.compiler.is_compiling():
        return tensor is other
    return tensor.numel() > 0 and tensor.is_set_to(other)


def refuse_same(**pair: torch.Tensor) -> None:
    """ValueError where an output, named first, is what is still read once it is written."""
    (name, tensor), (other_name, other) = pair.items()
    if is_same(tensor, other):
        raise ValueError(f"{name}: must not be the same memory as {other_name}")
