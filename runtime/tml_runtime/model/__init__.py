"""The interaction model in plain form: configuration, weights, state, and its streaming step."""

from .checkpoint import CheckpointError as CheckpointError
from .config import ModelConfig as ModelConfig
from .layout import TurnLayout as TurnLayout
from .load import WeightReport as WeightReport
from .model import InteractionModel as InteractionModel
from .output import TickOutput as TickOutput
from .parts import KvBudget as KvBudget
from .replay import PastTick as PastTick
from .scale import scale_frames as scale_frames
from .state import ModelState as ModelState
from .tick_input import TickInput as TickInput
