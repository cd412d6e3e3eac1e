from __future__ import annotations

import torch
from torch import Tensor


def randn(
    *shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Tensor:
    """Normal values, drawn on the CPU from torch's global generator: one seed for every device."""
    return (scale * torch.randn(*shape)).to(device=device, dtype=dtype)
