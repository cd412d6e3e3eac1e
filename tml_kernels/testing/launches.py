"""How many kernels a call launches on a GPU, counted from the log of its ops, on any device.

On a GPU each op is the launches given here; whatever else is in the log is a launch of torch's own,
but for views, buffers that are allocated, and questions to the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

LAUNCHES = {
    "embed_tokens": 1,
    "rms_norm": 1,
    "linear": 1,
    "linear_conv": 1,
    "attention_prologue": 1,
    "paged_attention": 1,
    "short_conv": 1,
    "route": 1,
    "expert_mlp": 2,  # gate-up, down
}
VIEWS = {"view", "select", "slice", "unflatten", "expand", "t", "alias", "is_set_to"}


class _OpLog(TorchDispatchMode):
    """Names of the ops that are called, those inside of our own ops left out."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def log_ops(run: Callable[[], object]) -> Counter[str]:
    """How often each op is called that launches something."""
    with _OpLog() as log:
        run()
    return Counter(op for op in log.ops if op not in VIEWS and "empty" not in op)


def count_launches(ops: Mapping[str, int]) -> int:
    """Of what `log_ops` returned."""
    return sum(LAUNCHES.get(op, 1) * count for op, count in ops.items())
