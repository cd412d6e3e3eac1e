from .api import shift_keys as shift_keys
