from ..._routing import Routing as Routing
from .api import moe_route as moe_route
