from .api import sample as sample
