from .api import fused_moe as fused_moe
from .api import workspace_bytes as workspace_bytes
