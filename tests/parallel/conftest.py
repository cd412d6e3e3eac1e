from __future__ import annotations

from collections.abc import Iterator

import pytest
from crew import Crew

from tml_runtime.clock import torch_threads


@pytest.fixture(scope="session")
def crew() -> Iterator[Crew]:
    crew = Crew()
    yield crew
    crew.dismiss()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As every rank has: two threads add up in another order."""
    with torch_threads(1):
        yield
