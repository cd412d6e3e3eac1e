from .api import attention_prologue as attention_prologue
from .rope import rope_increments as rope_increments
