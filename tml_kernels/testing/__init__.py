"""What tests and benchmarks of the ops share; importable by other codebases that add an op."""

from .compare import assert_bitwise as assert_bitwise
from .compare import assert_matches as assert_matches
from .compare import relative_l2 as relative_l2
from .cost import Cost as Cost
from .inputs import randn as randn
from .launches import LAUNCHES as LAUNCHES
from .launches import count_launches as count_launches
from .launches import log_ops as log_ops
from .memory import LiveBytes as LiveBytes
