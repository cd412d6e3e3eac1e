"""The one place in this package that reads environment variables. README lists them."""

from __future__ import annotations

import os
from pathlib import Path


def check_ranks() -> bool:
    """TML_CHECK_RANKS=1: ranks of one model compare digests of what they hold after every tick."""
    return os.environ.get("TML_CHECK_RANKS", "") == "1"


def cache_dir() -> Path | None:
    """TML_CACHE: where fetched media are kept; None where it is not set."""
    value = os.environ.get("TML_CACHE", "")
    return Path(value).expanduser() if value else None


def nvtx() -> bool:
    """TML_NVTX: mark ticks and stages for Nsight Systems."""
    return _is_set("TML_NVTX")


def eager() -> bool:
    """TML_EAGER: on a GPU run ticks op by op, in the shapes that their graphs would have."""
    return _is_set("TML_EAGER")


def debug_graph() -> bool:
    """TML_DEBUG_GRAPH: as TML_EAGER, on any device, and check every stage's numbers."""
    return _is_set("TML_DEBUG_GRAPH")


def background_key() -> str | None:
    return os.environ.get("TML_BACKGROUND_KEY") or None


def serve_token(given: str | None = None) -> str | None:
    """What a client of `tml-runtime serve` must know: as given, else TML_SERVE_TOKEN, else None."""
    return given if given is not None else os.environ.get("TML_SERVE_TOKEN") or None


def _is_set(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")
