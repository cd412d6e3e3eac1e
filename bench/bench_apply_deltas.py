"""apply_deltas: some hundred scattered words; the launch decides."""

from __future__ import annotations

from torch import Tensor

from tml_kernels.ops.apply_deltas import apply_deltas, cases
from tml_kernels.ops.apply_deltas.reference import apply_deltas_ref
from tml_kernels.testing import assert_bitwise

from .harness import OpBench, Variant

TABLES = ("page_Q", "base_Q", "rows_Q", "row_position_W")


def check(case: cases.Case, device: str) -> None:
    inputs = case.make_inputs(device)
    expected = apply_deltas_ref(**inputs)
    for actual, table in zip(run(**inputs), expected, strict=True):
        assert_bitwise(actual, table)


def run(**inputs: Tensor) -> tuple[Tensor, ...]:
    apply_deltas(**inputs)
    return tuple(inputs[name] for name in TABLES)


def torch_apply(
    delta_U_4: Tensor, row_Z: Tensor, position_Z: Tensor, **tables: Tensor
) -> tuple[Tensor, ...]:
    """One write by index for each table; there is no padding in what is timed."""
    key_U = delta_U_4[:, 0]
    for column, name in enumerate(TABLES[:3], start=1):
        tables[name][key_U] = delta_U_4[:, column].to(tables[name].dtype)
    tables["row_position_W"][row_Z] = position_Z
    return tuple(tables[name] for name in TABLES)


OP = OpBench(
    name="apply_deltas",
    edge=cases.EDGE,
    model=cases.MODEL,
    bench=cases.BENCH,
    check=check,
    variants={"ours": Variant(run), "torch": Variant(torch_apply)},
)
