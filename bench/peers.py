"""Other people's kernels, timed beside ours where they are installed. None is ever required."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

# Distribution name -> the module that is imported from it.
PEERS = {
    "torch": "torch",
    "transformers": "transformers",
    "flashinfer-python": "flashinfer",
    "xformers": "xformers",
    "liger-kernel": "liger_kernel",
    "sglang": "sglang",
    "sgl-deep-gemm": "deep_gemm",
    "humming-kernels": "humming",
    "flag-gems": "flag_gems",
    "vllm": "vllm",
}


def peer_versions() -> dict[str, str | None]:
    """Installed version of every peer, None where it is not; nothing is imported."""
    versions: dict[str, str | None] = {}
    for distribution in PEERS:
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[distribution] = None
    return versions


def find(module: str, name: str) -> Any:
    """`name` of an installed peer. ImportError says which module or name is missing."""
    found = getattr(importlib.import_module(module), name, None)
    if found is None:
        raise ImportError(f"{module} has no {name}")
    return found
