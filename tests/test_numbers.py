"""Every number and flag that an op takes: one of a wrong type is refused by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bench.harness import load
from bench.paths import op_names
from tml_kernels import ops
from tml_kernels._numbers import (
    check_count,
    check_eps,
    check_finite,
    check_flag,
    check_int,
    check_positive,
)
from tml_kernels.ops.dmel import dmel_embed

NAN, INF = float("nan"), float("inf")
WRONG: dict[str, list[tuple[Any, type]]] = {
    "int": [(value, TypeError) for value in ("2", None, True, 2.0, torch.tensor(2))],
    "float": [(value, TypeError) for value in ("2", None, True, 2j, torch.tensor(2.0))]
    + [(value, ValueError) for value in (NAN, INF)],
    "bool": [(value, TypeError) for value in ("yes", None, 1)],
}


def functions() -> dict[str, Callable]:
    """The public ones, by name."""
    public = {name: f for name, f in vars(ops).items() if inspect.isfunction(f)}
    return public | {"dmel_embed": dmel_embed}


def folder(function: Callable) -> str:
    return function.__module__.split(".")[2]


def scalars() -> Iterator[tuple[str, str, str, bool]]:
    """(function, argument, its type, whether it may be None) of all that are no tensor."""
    for name, function in functions().items():
        for argument, parameter in inspect.signature(function).parameters.items():
            kind, _, rest = parameter.annotation.partition(" | ")
            if kind in WRONG:
                yield name, argument, kind, rest == "None"


def inputs_of(name: str, argument: str) -> dict[str, Any]:
    """What the function takes, with rows, so that it comes to its checks and beyond; with `span`
    where that is asked for, which only some calls have."""
    if name == "dmel_embed":
        return {
            "levels_T_B": torch.zeros(2, 3, dtype=torch.uint8),
            "table_V_D": torch.zeros(12, 8),
            "norm_weight_D": torch.ones(8),
            "num_levels": 4,
        }
    op = load(folder(functions()[name]))
    names = inspect.signature(functions()[name]).parameters
    for case in op.edge:
        inputs = case.make_inputs("cpu")
        tensors = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
        used = argument != "span" or inputs.get("span") is not None
        if used and inputs.keys() <= names.keys() and all(x.numel() > 0 for x in tensors):
            return inputs
    raise AssertionError(f"no case of {name} fits")


def tensors_of(result: Any) -> list[torch.Tensor]:
    parts = vars(result).values() if hasattr(result, "num_experts") else result
    return [part for part in parts if isinstance(part, torch.Tensor)]


def test_all_ops_are_seen() -> None:
    assert {folder(function) for function in functions().values()} == set(op_names())
    assert len(list(scalars())) == 32


@pytest.mark.parametrize(("name", "argument", "kind", "optional"), list(scalars()))
def test_a_scalar_of_a_wrong_type_is_refused(
    name: str, argument: str, kind: str, optional: bool
) -> None:
    function, inputs = functions()[name], inputs_of(name, argument)
    function(**inputs)
    required = name == "moe_route" and argument == "top_k"
    for value, error in WRONG[kind]:
        if value is None and optional and not required:
            continue
        with pytest.raises(error, match=rf"^{argument}\b.*: expected .*, got ") as caught:
            function(**(inputs | {argument: value}))
        assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "argument", "values"),
    [
        ("rms_norm", "eps", (1e-6, 1e-5, 0)),
        ("sample", "fallback", (0, 1, 2)),
        ("flow_head", "num_steps", (2, 3, 4)),
        ("linear", "scale", (1.0, 2.0, 3.0)),
        ("moe_route", "scale", (1.0, 2.0, 3.0)),
    ],
)
def test_a_number_may_change_between_calls_of_a_compiled_function(
    name: str, argument: str, values: tuple
) -> None:
    """From the second value on it is a symbol to the tracer."""
    function, inputs = functions()[name], inputs_of(name, argument)
    compiled = torch.compile(
        lambda value: function(**(inputs | {argument: value})), fullgraph=True, backend="eager"
    )
    torch._dynamo.reset()
    for value in values:
        torch.testing.assert_close(
            tensors_of(compiled(value)), tensors_of(function(**(inputs | {argument: value})))
        )


def test_numbers_of_numpy_are_numbers() -> None:
    check_int("n", np.int32(3))
    check_count("n", np.int64(3), 1, 3)
    for value in (np.float32(0.5), np.float64(0.5), np.int64(1), 1):
        check_finite("x", value)
        check_positive("x", value)
        check_eps(value)
    check_flag("late", np.bool_(True))


@pytest.mark.parametrize(
    ("value", "high", "words"),
    [
        (0, None, "n: expected at least 1, got 0"),
        (2**63, None, "n: expected 1..9223372036854775807, got 9223372036854775808"),
        (4, 3, "n: expected 1..3, got 4"),
        (1, 0, "n: expected 1..0, got 1"),
    ],
)
def test_a_count_out_of_range_says_the_range(value: int, high: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}$"):
        check_count("n", value, 1, high)
