from .api import Routing as Routing
from .api import route as route
