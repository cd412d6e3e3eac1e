"""torch.library.opcheck for every registered op, on calls that the op's own cases make."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.harness import clone, load, tensor_bytes
from bench.paths import benched_ops, op_names
from tml_kernels._registry import registered_ops

MAX_BYTES = 1 << 20  # of the inputs: opcheck runs a call a dozen times


class Recorder(TorchDispatchMode):
    """Keeps copies of the arguments of every tml_kernels op that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[Any, tuple, dict]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if func.namespace == "tml_kernels":
            name = func.name().removeprefix("tml_kernels::")
            self.calls.setdefault(name, []).append((func, clone(args), clone(kwargs)))
        return func(*args, **kwargs)


def calls_of(name: str) -> dict[str, list[tuple[Any, tuple, dict]]]:
    """Calls made by ours on the small edge cases of an op."""
    op = load(name)
    run: Callable = op.variants["ours"].run
    with Recorder() as recorder:
        for case in op.edge:
            inputs = case.make_inputs("cpu")
            if tensor_bytes(inputs) <= MAX_BYTES:
                run(**inputs)
    return recorder.calls


@pytest.mark.parametrize("name", benched_ops())
def test_opcheck(name: str) -> None:
    calls = calls_of(name)
    assert name in calls, f"no case of {name} is small enough"
    func, args, kwargs = max(calls[name], key=lambda call: tensor_bytes(call[1]))
    torch.library.opcheck(func, args, kwargs)


def test_every_registered_op_has_an_opcheck() -> None:
    """Here, or in the tests of an op that registers more than the one of its name."""
    for name in op_names():
        importlib.import_module(f"tml_kernels.ops.{name}")
    tested_there = {"dmel_levels", "dmel_embed", "route_schedule", "linear_conv"}
    tested_there |= {"expert_hidden", "expert_sum"}
    assert set(registered_ops()) - tested_there == set(benched_ops())


def test_a_float_may_change_between_calls_of_a_compiled_function() -> None:
    """The second value is a symbol to the tracer."""
    case = load("paged_attention").edge[0]
    inputs = case.make_inputs("cpu")
    op = load("paged_attention").variants["ours"].run
    compiled = torch.compile(
        lambda scale: op(**(inputs | {"scale": scale})), fullgraph=True, backend="eager"
    )
    for scale in (0.5, 0.25):
        assert torch.equal(compiled(scale), op(**(inputs | {"scale": scale})))
