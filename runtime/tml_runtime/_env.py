"""The one place in this package that reads environment variables. README lists them."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path | None:
    """TML_CACHE: where fetched media are kept; None where it is not set."""
    value = os.environ.get("TML_CACHE", "")
    return Path(value).expanduser() if value else None


def nvtx() -> bool:
    """TML_NVTX: mark ticks and stages for Nsight Systems."""
    return os.environ.get("TML_NVTX", "0") not in ("", "0")
