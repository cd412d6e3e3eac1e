"""Runs attention_prologue by its public function and by its kernel on any device, and checks it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tml_kernels._pages import FP8
from tml_kernels.ops.attention_prologue import attention_prologue
from tml_kernels.ops.attention_prologue.cases import POOLS, SCALES, Case, reference_inputs
from tml_kernels.ops.attention_prologue.kernel import launch_attention_prologue
from tml_kernels.ops.attention_prologue.reference import attention_prologue_ref
from tml_kernels.testing import assert_bitwise, assert_matches

Run = Callable[[dict], Tensor]
MUTATED = ("conv_state_N_2_3_GC", *POOLS, *SCALES)
PER_TOKEN = ("qkvr_T_J", "kv_row_T", "position_T")
OP_TENSORS = (
    "qkvr_T_J", "k_conv_GC_4", "v_conv_GC_4", "q_norm_C", "k_norm_C", "conv_state_N_2_3_GC",
    *POOLS, *SCALES, "kv_row_T", "start_S1", "slot_S", "rope_phase_B", "position_T",
)  # fmt: skip


def op_args(inputs: dict, out: Tensor) -> tuple:
    """The arguments of the registered op and of its launcher."""
    return (*(inputs.get(name) for name in OP_TENSORS), inputs["num_heads"], 1e-6, out)


def run_public(inputs: dict) -> Tensor:
    return attention_prologue(**inputs)


def run_kernel(inputs: dict) -> Tensor:
    qkvr, width = inputs["qkvr_T_J"], inputs["k_pages_P_G_R_C"].shape[3]
    out = qkvr.new_empty(qkvr.shape[0], inputs["num_heads"], width)
    if out.numel() > 0 and inputs["slot_S"].numel() > 0:
        launch_attention_prologue(*op_args(inputs, out))
    return out


PATHS = [
    pytest.param(run_public, "cpu", id="public"),
    pytest.param(run_kernel, None, id="kernel"),
    pytest.param(run_public, "cuda", id="gpu", marks=pytest.mark.gpu),
]


def clone(inputs: dict) -> dict:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def tokens_of(inputs: dict, first: int, end: int, slot: int = 0) -> dict:
    """The inputs of a call with tokens first..end alone, of the session row `slot` of these."""
    start = torch.tensor([0, end - first], dtype=torch.int32, device=inputs["start_S1"].device)
    own = {name: inputs[name][first:end].clone() for name in PER_TOKEN if name in inputs}
    return inputs | own | {"start_S1": start, "slot_S": inputs["slot_S"][slot : slot + 1].clone()}


def assert_same_writes(actual: dict, expected: dict) -> None:
    """State, pages and scales hold the same bits."""
    for name in MUTATED:
        if isinstance(actual.get(name), Tensor):
            assert_bitwise(actual[name], expected[name])


def pool_rows(pages_P_G_R_C: Tensor) -> Tensor:
    """The pool, or its scales, as rows [P * R, G, C], in the order kv_row counts them."""
    return pages_P_G_R_C.transpose(1, 2).flatten(0, 1)


def check(case: Case, run: Run, device: str) -> None:
    inputs = case.make_inputs(device)
    before = clone(inputs)
    expected = attention_prologue_ref(**reference_inputs(inputs))
    q = run(inputs)
    assert_matches(q, expected.q_T_H_C, dtype=case.dtype)
    assert (q[~expected.live_T] == 0).all()

    written = expected.live_T & (inputs["kv_row_T"] >= 0)
    kv_row = inputs["kv_row_T"][written]
    values = (expected.k_T_G_C[written], expected.v_T_G_C[written])
    for name, scale_name, value in zip(POOLS, SCALES, values, strict=True):
        rows = pool_rows(inputs[name])
        if rows.dtype == FP8:
            check_fp8(rows[kv_row], pool_rows(inputs[scale_name])[kv_row], value)
        else:
            assert_matches(rows[kv_row], value, dtype=rows.dtype)
    for name in (*POOLS, *SCALES):
        if name in inputs:
            rows, rows_before = pool_rows(inputs[name]), pool_rows(before[name])
            untouched = torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
            untouched[kv_row] = False
            assert_bitwise(rows[untouched], rows_before[untouched])

    if expected.state_A_2_3_GC is not None:
        state = before["conv_state_N_2_3_GC"].clone()
        active = inputs["slot_S"] >= 0
        state[inputs["slot_S"][active].long()] = expected.state_A_2_3_GC.to(state.dtype)
        assert_bitwise(inputs["conv_state_N_2_3_GC"], state)


def check_fp8(rows_A_G_C: Tensor, scale_A_G: Tensor, expected_A_G_C: Tensor) -> None:
    """amax / 448 within float32's limit, and every value within half a step of e4m3: a sixteenth of
    it, or 2^-10 scales among subnormals, and what float32 adds."""
    amax_A_G = expected_A_G_C.abs().amax(-1)
    assert_matches(scale_A_G, amax_A_G / 448)
    scale_A_G_1 = scale_A_G.double()[..., None]
    error = (rows_A_G_C.double() * scale_A_G_1 - expected_A_G_C).abs()
    half_step = torch.maximum(expected_A_G_C.abs() / 16, scale_A_G_1 * 2.0**-10)
    assert (error <= half_step * 1.0001 + amax_A_G[..., None] * 1e-6).all()
