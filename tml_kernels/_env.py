"""The one place in this package that reads environment variables. README lists them."""

from __future__ import annotations

import os


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def print_configs() -> bool:
    return flag("TML_PRINT_CONFIGS")


def interpreting() -> bool:
    """Triton kernels run in its interpreter, on CPU tensors (a test mode of Triton's own)."""
    return flag("TRITON_INTERPRET")
