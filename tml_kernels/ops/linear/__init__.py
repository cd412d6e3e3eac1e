from .api import linear as linear
