from .api import linear as linear
from .conv import linear_conv as linear_conv
