"""How expert weights are stored: formats, packing, and what the packed bits mean."""

from .dequantize import dequantize as dequantize
from .fill import pack_matrix as pack_matrix
from .formats import FORMATS as FORMATS
from .formats import Format as Format
from .packed import PackedExperts as PackedExperts
from .rows import take_rows as take_rows
