"""TML_NVTX=1: a range per tick and, in it, one per stage."""

from __future__ import annotations

import pytest
import torch
from fake_model import make_runtime

from tml_runtime import errors, nvtx


class FakeNvtx:
    """Ranges as text: "<name" begins one, ">" ends it."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def range_push(self, name: str) -> None:
        self.said.append(f"<{name}")

    def range_pop(self) -> None:
        self.said.append(">")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvtx:
    made = FakeNvtx()
    monkeypatch.setenv("TML_NVTX", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "nvtx", made)
    return made


def test_ticks_and_stages_are_ranges(fake: FakeNvtx) -> None:
    runtime, _ = make_runtime()
    with runtime:
        runtime.run_ticks(1)
        session = runtime.open_session()
        runtime.run_ticks(2)
        session.close()
    tick = ["<take", ">", "<model", ">", "<publish", ">", ">"]
    assert fake.said == ["<tick 0", "<take", ">", ">", "<tick 1", *tick, "<tick 2", *tick]


def test_a_stage_that_nobody_announced_keeps_ranges_in_balance() -> None:
    fake = FakeNvtx()
    ranges = nvtx.Ranges(fake)
    ranges.open(0)
    for stage in ("take", "hand-off", "model", "publish", "tidy"):
        ranges.lap(stage)
    ranges.close()
    assert fake.said == ["<tick 0", "<take", ">", "<publish", ">", ">"]


@pytest.mark.parametrize("value", ["", "0"])
def test_off_means_nothing_is_marked(
    value: str, fake: FakeNvtx, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TML_NVTX", value)
    runtime, _ = make_runtime()
    with runtime:
        runtime.run_ticks(1)
    assert fake.said == []


def test_without_cuda_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TML_NVTX", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(errors.InputValueError, match="TML_NVTX=1: NVTX ranges need CUDA"):
        make_runtime()


@pytest.mark.gpu
def test_real_ranges_disturb_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TML_NVTX", "1")
    runtime, _ = make_runtime()
    with runtime, runtime.open_session():
        runtime.run_ticks(2)
    assert runtime.report()["ticks"] == 2
