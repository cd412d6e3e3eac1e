"""Several processes: ranks that run one model together, and shards that run one each."""

from .lead import LeadModel as LeadModel
from .lead import follow as follow
from .ranks import Ranks as Ranks
