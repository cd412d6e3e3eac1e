from .api import attention_prologue as attention_prologue
