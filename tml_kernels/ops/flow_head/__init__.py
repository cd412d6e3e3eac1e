from .api import FlowWeights as FlowWeights
from .api import flow_head as flow_head
