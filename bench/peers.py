"""Other people's kernels, timed beside ours where they are installed. None is ever required."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

PEERS = (  # distributions whose kernels are timed
    "torch",
    "transformers",
    "flashinfer-python",
    "xformers",
    "liger-kernel",
    "sgl-kernel",
    "humming-kernels",
    "flag-gems",
    "vllm",
)


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
