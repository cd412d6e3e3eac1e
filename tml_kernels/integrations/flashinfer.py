"""FlashInfer's `cutlass_fused_moe`, argument for argument, on `fused_moe`. Needs no FlashInfer."""

# Dimension key: T tokens, D model width, E experts here, F expert width, K experts chosen per
# token.

from __future__ import annotations

import torch
from torch import Tensor

from .._dims import Dims
from ..moe import fused_moe, moe_route
from ..precision import ACTIVATIONS as DTYPES
from ._arguments import plain_experts, refuse

# Values of FlashInfer's ActivationType.
SWIGLU, GEGLU, GEGLU_TANH = 3, 4, 8
ACTIVATIONS = {SWIGLU: "silu", GEGLU: "gelu", GEGLU_TANH: "gelu_tanh"}
_NAMES = ("fc1_expert_weights", "fc2_expert_weights", "fc1_expert_biases", "fc2_expert_biases")


def cutlass_fused_moe(
    input: Tensor,
    token_selected_experts: Tensor,
    token_final_scales: Tensor,
    fc1_expert_weights: Tensor,
    fc2_expert_weights: Tensor,
    output_dtype: torch.dtype,
    quant_scales: list[Tensor] | None,
    fc1_expert_biases: Tensor | None = None,
    fc2_expert_biases: Tensor | None = None,
    input_sf: Tensor | None = None,
    swiglu_alpha: Tensor | None = None,
    swiglu_beta: Tensor | None = None,
    swiglu_limit: Tensor | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    cluster_size: int = 1,
    cluster_rank: int = 0,
    output: Tensor | None = None,
    enable_alltoall: bool = False,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    min_latency_mode: bool = False,
    use_packed_weights: bool = False,
    use_wfp4afp8_humming: bool = False,
    tune_max_num_tokens: int = 8192,
    enable_pdl: bool | None = None,
    activation_type: int = SWIGLU,
    swizzled_input_sf: bool = True,
    use_fused_finalize: bool = True,
    profile_ids: list[int] | None = None,
    workspace_buffer: Tensor | None = None,
) -> Tensor:
    """Each token through its chosen experts: [T, D], in `output` if given.

    input: [T, D], float32, bfloat16 or float16; output_dtype is the same, and quant_scales empty.
    token_selected_experts: [T, K], int32 or int64, ids of all devices' experts; those of other
    devices, and -1, are skipped. token_final_scales: [T, K], float32 (others are converted).
    fc1_expert_weights: [E, 2F, D], F ups, then F gates; fc2_expert_weights: [E, D, F]; biases
    [E, 2F] and [E, D]. ep_size, ep_rank: the weights are rows ep_rank * E to (ep_rank + 1) * E - 1
    of ep_size * E experts; the caller sums over devices. activation_type: 3 Swiglu, 4 Geglu,
    8 GegluTanh. What only chooses among FlashInfer's kernels is ignored: tune_max_num_tokens,
    enable_pdl, swizzled_input_sf, use_fused_finalize, profile_ids, workspace_buffer.

    Accuracy and determinism are those of `fused_moe`. Safe to capture: nothing synchronises.
    Raises TypeError or ValueError naming the argument, and NotImplementedError for any other that
    is not at its default.

    Source: `cutlass_fused_moe` and `ActivationType` in FlashInfer's fused_moe/core.py and
    tllm_enums.py.
    """
    refuse(
        quant_scales=(quant_scales or None, None),
        input_sf=(input_sf, None), swiglu_alpha=(swiglu_alpha, None),
        swiglu_beta=(swiglu_beta, None), swiglu_limit=(swiglu_limit, None),
        tp_size=(tp_size, 1), tp_rank=(tp_rank, 0), cluster_size=(cluster_size, 1),
        cluster_rank=(cluster_rank, 0), enable_alltoall=(enable_alltoall, False),
        use_deepseek_fp8_block_scale=(use_deepseek_fp8_block_scale, False),
        use_w4_group_scaling=(use_w4_group_scaling, False),
        use_mxfp8_act_scaling=(use_mxfp8_act_scaling, False),
        min_latency_mode=(min_latency_mode, False), use_packed_weights=(use_packed_weights, False),
        use_wfp4afp8_humming=(use_wfp4afp8_humming, False),
    )  # fmt: skip
    if activation_type not in ACTIVATIONS:
        raise NotImplementedError(
            f"activation_type: expected one of {list(ACTIVATIONS)}, got {activation_type!r}"
        )
    if not 0 <= ep_rank < ep_size:
        raise ValueError(f"ep_rank: expected 0..{ep_size - 1} of ep_size={ep_size}, got {ep_rank}")
    weights = plain_experts(
        fc1_expert_weights, fc2_expert_weights, fc1_expert_biases, fc2_expert_biases,
        names=_NAMES, order="up_gate",
    )  # fmt: skip
    dims, device = Dims(D=weights.width), weights.device
    ids, scales = token_selected_experts, token_final_scales
    dims.check(input_T_D=input, dtype=DTYPES, device=device)
    dims.check(token_selected_experts_T_K=ids, dtype=(torch.int32, torch.int64), device=device)
    dims.check(token_final_scales_T_K=scales, dtype=DTYPES, device=device)
    refuse(output_dtype=(output_dtype, input.dtype))
    if output is not None:
        dims.check(output_T_D=output, dtype=input.dtype, device=device)
    routing = moe_route(
        # An id of another device lies outside 0..E-1 and is skipped.
        expert_T_K=ids - ep_rank * weights.num_experts if ep_rank else ids,
        weight_T_K=scales.float(),
        num_experts=weights.num_experts,
    )
    return fused_moe(input, weights, routing, activation=ACTIVATIONS[activation_type], out=output)
