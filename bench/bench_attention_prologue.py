"""attention_prologue: small rows, many outputs; launches decide below some 64 tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tml_kernels.ops.attention_prologue import attention_prologue, cases
from tml_kernels.ops.attention_prologue.reference import attention_prologue_ref
from tml_kernels.testing import assert_bitwise, assert_matches

from .harness import OpBench, Variant

POOLS = ("k_pages_P_G_R_C", "v_pages_P_G_R_C")


def reference_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k not in (*POOLS, "kv_row_T")}


def check(case: cases.Case, device: str) -> None:
    inputs = case.make_inputs(device)
    expected = attention_prologue_ref(**reference_inputs(inputs))
    state = inputs["conv_state_N_2_3_GC"].clone()
    q_T_H_C = attention_prologue(**inputs)
    assert_matches(q_T_H_C, expected.q_T_H_C, dtype=case.dtype)
    written = expected.live_T & (inputs["kv_row_T"] >= 0)
    for name, value in zip(POOLS, (expected.k_T_G_C, expected.v_T_G_C), strict=True):
        rows = inputs[name].transpose(1, 2).flatten(0, 1)[inputs["kv_row_T"][written]]
        assert_matches(rows, value[written], dtype=rows.dtype)
    live = inputs["slot_S"] >= 0
    state[inputs["slot_S"][live].long()] = expected.state_S_2_3_GC[live].to(state.dtype)
    assert_bitwise(inputs["conv_state_N_2_3_GC"], state)


def torch_prologue(
    k_pages_P_G_R_C: Tensor,
    v_pages_P_G_R_C: Tensor,
    kv_row_T: Tensor,
    conv_state_N_2_3_GC: Tensor,
    slot_S: Tensor,
    **inputs: Any,
) -> Tensor:
    """In qkvr's dtype, pages and state written by index; the rows that are not written are few."""
    dtype, page_rows = inputs["qkvr_T_J"].dtype, k_pages_P_G_R_C.shape[2]
    inputs |= {"conv_state_N_2_3_GC": conv_state_N_2_3_GC, "slot_S": slot_S}
    result = attention_prologue_ref(**inputs, dtype=dtype)
    row_T = kv_row_T.clamp(min=0)
    k_pages_P_G_R_C[row_T // page_rows, :, row_T % page_rows] = result.k_T_G_C
    v_pages_P_G_R_C[row_T // page_rows, :, row_T % page_rows] = result.v_T_G_C
    conv_state_N_2_3_GC[slot_S.long()] = result.state_S_2_3_GC
    return result.q_T_H_C


OP = OpBench(
    name="attention_prologue",
    edge=cases.EDGE,
    model=cases.MODEL,
    bench=cases.BENCH,
    check=check,
    variants={"ours": Variant(attention_prologue), "torch": Variant(torch_prologue)},
)
