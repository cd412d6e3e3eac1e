from .api import apply_deltas as apply_deltas
