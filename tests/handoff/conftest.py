"""The runtime's fake model, and a check that no hand-off thread outlives its test."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))


def handoff_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("tml-handoff")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    assert handoff_threads() == []
    yield
    end = time.monotonic() + 30.0
    while handoff_threads() and time.monotonic() < end:  # a function may be about to return
        time.sleep(0.002)
    assert handoff_threads() == []
