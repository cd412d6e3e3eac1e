from .api import patch_embed as patch_embed
from .reference import PATCH_40 as PATCH_40
from .reference import PatchSpec as PatchSpec
from .reference import PatchWeights as PatchWeights
