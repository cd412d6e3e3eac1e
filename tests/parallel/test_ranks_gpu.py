"""Ranks with a GPU each, over NCCL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
import torch
from crew import Crew, values

two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs 2 GPUs, here are {torch.cuda.device_count()}"
)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_gpus_say_what_one_says(crew: Crew, tmp_path: Path, mode: str) -> None:
    with torch.inference_mode():
        expected: Any = jobs.on_gpus(0, 1, "", "eager")
    said, followed = values(crew.run(2, jobs.on_gpus, tmp_path, mode))
    assert followed == len(expected) == len(said)
    for mine, other in zip(said, expected, strict=True):
        for x, y in zip(mine, other, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.gpu
@two_gpus
def test_a_gather_is_captured_in_a_graph(crew: Crew, tmp_path: Path) -> None:
    assert values(crew.run(2, jobs.captured_gather, tmp_path)) == [True, True]
