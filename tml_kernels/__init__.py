"""Kernels for interaction models: one function per op, checked against float64 references."""

from ._info import backend_info as backend_info
from .ops import attention_prologue as attention_prologue
from .ops import dmel as dmel
from .ops import expert_mlp as expert_mlp
from .ops import flow_head as flow_head
from .ops import linear as linear
from .ops import paged_attention as paged_attention
from .ops import patch_embed as patch_embed
from .ops import rms_norm as rms_norm
from .ops import route as route
from .ops import sample as sample
from .ops import short_conv as short_conv

__version__ = "0.1.0"

__all__ = [
    "attention_prologue",
    "backend_info",
    "dmel",
    "expert_mlp",
    "flow_head",
    "linear",
    "paged_attention",
    "patch_embed",
    "rms_norm",
    "route",
    "sample",
    "short_conv",
]
