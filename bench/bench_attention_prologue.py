"""attention_prologue: small rows, many outputs; launches decide below some 64 tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tml_kernels._pages import FP8, quantize_ref
from tml_kernels.ops.attention_prologue import attention_prologue, cases
from tml_kernels.ops.attention_prologue.cases import POOLS, SCALES, reference_inputs
from tml_kernels.ops.attention_prologue.reference import attention_prologue_ref
from tml_kernels.testing import assert_bitwise, assert_matches

from .harness import OpBench, Variant

FP8_LIMIT = 0.04  # rounding to a step of a sixteenth to an eighth, over all sizes: some 0.027


def check(case: cases.Case, device: str) -> None:
    inputs = case.make_inputs(device)
    expected = attention_prologue_ref(**reference_inputs(inputs))
    given_state = inputs["conv_state_N_2_3_GC"]
    state = None if given_state is None else given_state.clone()
    q_T_H_C = attention_prologue(**inputs)
    assert_matches(q_T_H_C, expected.q_T_H_C, dtype=case.dtype)
    written = expected.live_T & (inputs["kv_row_T"] >= 0)
    values = (expected.k_T_G_C[written], expected.v_T_G_C[written])
    for name, scale_name, value in zip(POOLS, SCALES, values, strict=True):
        rows = _rows(inputs[name], inputs["kv_row_T"][written])
        if rows.dtype == FP8:
            scale = _rows(inputs[scale_name], inputs["kv_row_T"][written])
            assert_matches(rows.float() * scale[..., None], value, limit=FP8_LIMIT)
        else:
            assert_matches(rows, value, dtype=rows.dtype)
    if state is not None and expected.state_A_2_3_GC is not None:
        live = inputs["slot_S"] >= 0
        state[inputs["slot_S"][live].long()] = expected.state_A_2_3_GC.to(state.dtype)
        assert_bitwise(inputs["conv_state_N_2_3_GC"], state)


def _rows(pages_P_G_R: Tensor, kv_row: Tensor) -> Tensor:
    return pages_P_G_R[kv_row // pages_P_G_R.shape[2], :, kv_row % pages_P_G_R.shape[2]]


def torch_prologue(**inputs: Any) -> Tensor:
    """In qkvr's dtype, pages and state written by index; the rows that are not written are few."""
    result = attention_prologue_ref(**reference_inputs(inputs), dtype=inputs["qkvr_T_J"].dtype)
    page_rows = inputs[POOLS[0]].shape[2]
    row_T = inputs["kv_row_T"].clamp(min=0)
    page_T, row_T = row_T // page_rows, row_T % page_rows
    for name, scale_name, value in zip(
        POOLS, SCALES, (result.k_T_G_C, result.v_T_G_C), strict=True
    ):
        if inputs[name].dtype == FP8:
            value, scale_T_G = quantize_ref(value)
            inputs[scale_name][page_T, :, row_T] = scale_T_G.float()
            pages, value = inputs[name].view(torch.uint8), value.view(torch.uint8)
        else:
            pages = inputs[name]
        pages[page_T, :, row_T] = value
    if result.state_A_2_3_GC is not None:
        inputs["conv_state_N_2_3_GC"][inputs["slot_S"].long()] = result.state_A_2_3_GC
    return result.q_T_H_C


OP = OpBench(
    name="attention_prologue",
    edge=cases.EDGE,
    model=cases.MODEL,
    bench=cases.BENCH,
    check=check,
    variants={"ours": Variant(attention_prologue), "torch": Variant(torch_prologue)},
)
