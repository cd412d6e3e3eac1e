from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """The model is for inference; its callers switch gradients off."""
    with torch.no_grad():
        yield
