"""The tick loop that runs an interaction model: sessions in, speech, text and actions out."""

from . import errors as errors
from .loop import Runtime as Runtime
from .model import InteractionModel as InteractionModel
from .model import ModelConfig as ModelConfig
from .model import TurnLayout as TurnLayout
from .session import Session as Session

__all__ = ["InteractionModel", "ModelConfig", "Runtime", "Session", "TurnLayout", "errors"]
