"""How expert weights are stored: formats, packing, and what the packed bits mean."""

from .dequantize import dequantize as dequantize
from .formats import FORMATS as FORMATS
from .formats import Format as Format
from .packed import PackedExperts as PackedExperts
