"""Kernels for interaction models: one function per op, checked against float64 references.

For inference: where gradients are enabled, a tensor that requires one raises RuntimeError.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from ._info import backend_info as backend_info
from ._page_plan import PagePlan as PagePlan
from .moe import fused_moe as fused_moe
from .moe import moe_layer as moe_layer
from .moe import moe_route as moe_route
from .moe import prepare_moe_weights as prepare_moe_weights
from .ops import attention_prologue as attention_prologue
from .ops import dmel as dmel
from .ops import flow_head as flow_head
from .ops import linear as linear
from .ops import paged_attention as paged_attention
from .ops import patch_embed as patch_embed
from .ops import plan_pages as plan_pages
from .ops import rms_norm as rms_norm
from .ops import sample as sample
from .ops import short_conv as short_conv

if _TYPE_CHECKING:
    from .kv_cache import RollingKVCache as RollingKVCache

__version__ = "0.1.0"

__all__ = [
    "PagePlan",
    "RollingKVCache",
    "attention_prologue",
    "backend_info",
    "dmel",
    "flow_head",
    "fused_moe",
    "linear",
    "moe_layer",
    "moe_route",
    "paged_attention",
    "patch_embed",
    "plan_pages",
    "prepare_moe_weights",
    "rms_norm",
    "sample",
    "short_conv",
]


def __getattr__(name: str) -> _Any:
    """RollingKVCache needs the built extension, which the ops do not: it is imported when asked."""
    if name == "RollingKVCache":
        from .kv_cache import RollingKVCache

        return RollingKVCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
