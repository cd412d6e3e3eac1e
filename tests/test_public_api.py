"""The public names of both packages change on purpose, here and in CHANGELOG.md, or not at all."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent

PUBLIC = {
    "tml_kernels": [
        "RollingKVCache",
        "PagePlan",
        "attention_prologue",
        "backend_info",
        "dmel",
        "flow_head",
        "fused_moe",
        "linear",
        "moe_layer",
        "moe_route",
        "paged_attention",
        "patch_embed",
        "plan_pages",
        "prepare_moe_weights",
        "rms_norm",
        "sample",
        "short_conv",
    ],
    "tml_runtime": [
        "InteractionModel",
        "ModelConfig",
        "Runtime",
        "Session",
        "TurnLayout",
        "errors",
    ],
}
EVERYTHING = [(package, name) for package, names in PUBLIC.items() for name in names]


@pytest.mark.parametrize("package", PUBLIC)
def test_names_are_these(package: str) -> None:
    assert sorted(importlib.import_module(package).__all__) == sorted(PUBLIC[package])


@pytest.mark.parametrize("package", PUBLIC)
def test_nothing_else_is_in_sight(package: str) -> None:
    """What is imported for use inside has a leading underscore or is a submodule."""
    module = importlib.import_module(package)
    visible = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    }
    assert visible <= set(PUBLIC[package])


@pytest.mark.parametrize(("package", "name"), EVERYTHING)
def test_name_is_documented_and_typed(package: str, name: str) -> None:
    value = getattr(importlib.import_module(package), name)
    assert inspect.getdoc(value), f"{name} has no docstring"
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        parts = {p.name: p.annotation for p in signature.parameters.values()}
        parts["return"] = signature.return_annotation
        untyped = [part for part, kind in parts.items() if kind is inspect.Signature.empty]
        assert untyped == []


@pytest.mark.parametrize("folder", ["tml_kernels", "runtime/tml_runtime"])
def test_package_says_it_is_typed(folder: str) -> None:
    assert (ROOT / folder / "py.typed").exists()
