"""runtime/README.md is the contract: every test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CONTRACT = (ROOT / "runtime" / "README.md").read_text()
FOLDERS = ("runtime", "handoff", "parallel", "serve")  # where no other is named
PROMISES = [row for row in CONTRACT.splitlines() if row.startswith("|") and "test" in row]


def held_by() -> list[tuple[str, str]]:
    """(file, test) of every row; one without a file is in the last that its row names."""
    named, rows = [], (row.rsplit("|", 2)[1] for row in PROMISES)
    for names in rows:
        file = ""
        for name in re.findall(r"`([^`]+)`", names):
            path, _, test = name.rpartition("::")
            if name.startswith("tests/") and not test.startswith("test_"):
                continue
            file = path or file
            named.append((file, test))
    return named


def sources_of(file: str) -> list[str]:
    found = [ROOT / file] if "/" in file else [ROOT / "tests" / f / file for f in FOLDERS]
    return [path.read_text() for path in found if path.is_file()]


def test_every_promise_names_tests_that_exist() -> None:
    named = held_by()
    assert len(named) > 80
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not any(re.search(rf"^(def {test}\(|{test} =)", text, re.M) for text in sources_of(file))
    ]
    assert missing == []


def test_no_promise_is_made_twice() -> None:
    promises = [row.split("|")[1].strip() for row in PROMISES]
    assert sorted(set(promises)) == sorted(promises)
