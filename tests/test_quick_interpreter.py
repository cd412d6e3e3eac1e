"""What makes the interpreter quick changes no bit of what a kernel computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import interpreted
import numpy as np
import pytest
import torch

from tml_kernels.testing import assert_bitwise


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted where there is a GPU")
def test_the_same_bits_as_without(tmp_path: Path) -> None:
    file = tmp_path / "operations.npz"
    command = [sys.executable, "-W", "ignore", interpreted.__file__, str(file)]
    subprocess.run(command, check=True)
    with np.load(file) as saved:
        expected = [torch.from_numpy(array) for array in saved.values()]
    for _ in range(2):  # and again with what the first run kept
        for ours, theirs in zip(interpreted.run_operations(), expected, strict=True):
            assert_bitwise(ours, theirs)
