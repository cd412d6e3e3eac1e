from .api import short_conv as short_conv
