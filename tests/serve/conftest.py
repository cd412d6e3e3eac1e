"""Where the runtime's fake model is, and coroutines that must end."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))


@pytest.fixture
def run() -> Callable[..., None]:
    """Runs a coroutine to its end; a hang is a failure and not a wait."""

    def run_it(coroutine: Coroutine[Any, Any, None], seconds: float = 30.0) -> None:
        asyncio.run(asyncio.wait_for(coroutine, seconds))

    return run_it
