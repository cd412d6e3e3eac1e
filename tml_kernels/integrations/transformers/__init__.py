"""transformers' experts and attention on the ops here, and `cache.TmlCache`, which rolls."""

from __future__ import annotations

import importlib
from typing import Any

from .attention import attention_forward as attention_forward
from .attention import causal_mask as causal_mask
from .experts import experts_forward as experts_forward
from .names import NAME

_FUNCTIONS = (
    ("integrations.moe", "ALL_EXPERTS_FUNCTIONS", experts_forward),
    ("integrations.finegrained_fp8", "ALL_FP8_EXPERTS_FUNCTIONS", experts_forward),
    ("modeling_utils", "ALL_ATTENTION_FUNCTIONS", attention_forward),
    ("masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS", causal_mask),
)


def register() -> None:
    """Make experts_implementation="tml" and attn_implementation="tml" known to transformers, for
    `from_pretrained`, `model.set_experts_implementation` and `model.set_attn_implementation`; twice
    is the same as once.

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
