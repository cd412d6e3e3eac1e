from .rms_norm import rms_norm as rms_norm
