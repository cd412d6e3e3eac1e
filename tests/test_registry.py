from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from tml_kernels._registry import on_its_device


def test_a_kernel_is_launched_with_its_first_tensors_device_current(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[object] = []

    @contextlib.contextmanager
    def current(device: torch.device) -> Iterator[None]:
        events.append(device)
        yield
        events.append("left")

    monkeypatch.setattr(torch.cuda, "device", current)
    on_its_device(lambda *args: events.append(args[1:]))(torch.empty(2, device="meta"), None, 1e-6)
    assert events == [torch.device("meta"), (None, 1e-6), "left"]
