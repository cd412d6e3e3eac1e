"""transformers' experts on the ops here."""

from __future__ import annotations

import importlib
from typing import Any

from .experts import experts_forward as experts_forward
from .names import NAME

_FUNCTIONS = (
    ("integrations.moe", "ALL_EXPERTS_FUNCTIONS", experts_forward),
    ("integrations.finegrained_fp8", "ALL_FP8_EXPERTS_FUNCTIONS", experts_forward),
)


def register() -> None:
    """Make `from_pretrained(..., experts_implementation="tml")` and
    `model.set_experts_implementation("tml")` known to transformers; twice is the same as once.

    Raises ImportError where transformers is missing, or has no such interface.
    """
    interfaces = [_interface(module, name) for module, name, _ in _FUNCTIONS]
    for interface, (_, _, function) in zip(interfaces, _FUNCTIONS, strict=True):
        interface.register(NAME, function)


def _interface(module: str, name: str) -> Any:
    try:
        version = importlib.import_module("transformers").__version__
    except ImportError as error:
        raise ImportError(
            "transformers is not installed: pip install 'transformers>=5.17'"
        ) from error
    path = f"transformers.{module}"
    try:
        return getattr(importlib.import_module(path), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"transformers {version} has no {path}.{name}, where functions are registered; "
            f"5.17 has it"
        ) from error
