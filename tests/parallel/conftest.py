from __future__ import annotations

from collections.abc import Iterator

import pytest
from crew import Crew


@pytest.fixture(scope="session")
def crew() -> Iterator[Crew]:
    crew = Crew()
    yield crew
    crew.dismiss()
