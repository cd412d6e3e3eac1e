"""The one place in this package that reads environment variables. README lists them."""

from __future__ import annotations

import os


def print_configs() -> bool:
    """TML_PRINT_CONFIGS: print each kernel's configuration once per problem."""
    return os.environ.get("TML_PRINT_CONFIGS", "0") not in ("", "0")
