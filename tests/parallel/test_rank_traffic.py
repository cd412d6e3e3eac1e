"""What ranks exchange is what arithmetic says."""

from __future__ import annotations

from pathlib import Path

import jobs
import pytest
import torch
from crew import Crew, values

from tml_runtime import ModelConfig
from tml_runtime.parallel.traffic import Traffic, pass_traffic, tick_traffic


@pytest.mark.parametrize("num_sessions", [1, 3])
def test_traffic_is_that_of_the_calls(crew: Crew, tmp_path: Path, num_sessions: int) -> None:
    for received, calls, prefilled in values(crew.run(2, jobs.counted, tmp_path, num_sessions)):
        expected = tick_traffic(
            jobs.CONFIG, 2, num_sessions=num_sessions, prefill_tokens=prefilled,
            dtype=torch.float32,
        )  # fmt: skip
        assert expected == Traffic(received, calls)


def test_of_the_published_model() -> None:
    """The figures of docs/parallel.md, and that they are in it."""
    config = ModelConfig.preset("inkling-small")
    token = pass_traffic(config, 2, 1, torch.bfloat16)
    assert token == Traffic(42 * 57_344 // 2, 168)
    text = (Path(__file__).parents[2] / "docs/parallel.md").read_text()
    for num_ranks in (2, 4, 8):
        tick = tick_traffic(config, num_ranks, num_sessions=1, prefill_tokens=9)
        many = tick_traffic(config, num_ranks, num_sessions=32, prefill_tokens=32 * 9)
        assert many.received == 32 * tick.received
        row = f"| {num_ranks} | {tick.received / 1e6:.1f} MB | {many.received / 1e6:,.0f} MB | "
        assert row + f"{tick.collectives} |" in text, row
