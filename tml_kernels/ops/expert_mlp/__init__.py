from .api import fused_moe as fused_moe
from .api import workspace_bytes as workspace_bytes
from .halves import expert_hidden as expert_hidden
from .halves import expert_sum as expert_sum
