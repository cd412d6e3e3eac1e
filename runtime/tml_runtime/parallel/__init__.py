"""Several processes: ranks that run one model together, and shards that run one each."""

from .follow import follow as follow
from .lead import LeadModel as LeadModel
from .ranks import Ranks as Ranks
