from .api import FlowWeights as FlowWeights
from .api import flow_head as flow_head
from .api import flow_work_size as flow_work_size
