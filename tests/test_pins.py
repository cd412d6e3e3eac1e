"""Tool versions stand in three places; they must be the same ones."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tools_have_one_version() -> None:
    pinned = dict(re.findall(r'"([\w-]+)==([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert {"ruff", "pyright", "clang-format"} <= pinned.keys()
    for tool, version in re.findall(r'"([\w-]+)==([\d.]+)"', hooks):
        assert pinned[tool] == version, f"{tool}: pre-commit has {version}, dev {pinned[tool]}"
    assert {tool for tool, _ in re.findall(r'"([\w-]+)==([\d.]+)"', hooks)} >= {"ruff"}


def test_package_version_is_the_projects() -> None:
    import tml_kernels

    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', text, re.M)[1] == tml_kernels.__version__  # type: ignore[index]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {tml_kernels.__version__}" in changelog
