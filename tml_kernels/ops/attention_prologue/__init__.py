from ..._rope import rope_increments as rope_increments
from .api import attention_prologue as attention_prologue
