from .api import dmel as dmel
from .api import dmel_embed as dmel_embed
from .api import dmel_levels as dmel_levels
from .spec import DMEL_20HZ as DMEL_20HZ
from .spec import DMEL_40HZ as DMEL_40HZ
from .spec import DmelSpec as DmelSpec
