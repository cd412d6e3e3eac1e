"""What is there, and why not: versions, extension modules, and the backend of every op."""

from __future__ import annotations

import importlib
import importlib.metadata

import torch

from ._registry import registered_ops


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension(module: str) -> str:
    """ "built", or why it cannot be imported."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"not built: {error}"
    return "built"


def backend_info() -> dict:
    """Versions, extension modules and, per op, what runs it on CPU and CUDA tensors and why: a
    dictionary of version, torch, triton, cuda, gpu, extensions and ops.

    >>> backend_info()["ops"]["rms_norm"]["cpu"]
    'plain'
    """
    from . import __version__

    return {
        "version": __version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "extensions": {
            name: _extension(name)
            for name in ("tml_kernels._core", "tml_kernels._cuda", "tml_runtime._tick")
        },
        "ops": {
            name: {"cpu": backends.cpu, "cuda": backends.cuda, "why": backends.why}
            for name, backends in registered_ops().items()
        },
    }
