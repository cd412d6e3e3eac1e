"""Optional packages: one clear line when one is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

_PIP_NAME = {"av": "PyAV"}


class MissingExtraError(RuntimeError):
    """A package of one of the extras is not installed."""


def require(module: str, purpose: str, *, extra: str = "demo") -> ModuleType:
    """Import `module` or raise MissingExtraError: what it is for and which extra to install.

    >>> require("json", "read a report").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = _PIP_NAME.get(module, module.partition(".")[0])
        raise MissingExtraError(
            f"{name} is needed to {purpose}, and cannot be imported ({error}): "
            f'pip install "tml-kernels[{extra}]"'
        ) from error
