from .api import expert_mlp as expert_mlp
