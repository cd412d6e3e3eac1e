"""Kernels for interaction models: one function per op, checked against float64 references."""

from ._info import backend_info as backend_info
from .ops import rms_norm as rms_norm

__version__ = "0.1.0"

__all__ = ["backend_info", "rms_norm"]
