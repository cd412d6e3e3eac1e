"""Hand-off: what the model delegates goes to a slower model in the background, and comes back as
text at tick boundaries. The live loop never waits for it.
"""

from .handoff import Handoff as Handoff
from .line import Line as Line
from .local import LocalModel as LocalModel
from .openai_model import OpenAIModel as OpenAIModel
from .options import HandoffOptions as HandoffOptions
from .options import Policy as Policy
from .request import BackgroundModel as BackgroundModel
from .request import Request as Request
from .request import Snapshot as Snapshot
from .transcript import Turn as Turn
