"""patch_embed: products of 75 to 9,600 columns; the weights decide for few patches."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tml_kernels.ops.patch_embed import PatchSpec, PatchWeights, cases, patch_embed
from tml_kernels.ops.patch_embed.reference import divide_frames, patch_embed_ref
from tml_kernels.testing import assert_matches

from .harness import OpBench, Variant


def check(case: cases.Case, device: str) -> None:
    inputs = case.make_inputs(device)
    assert_matches(patch_embed(**inputs), patch_embed_ref(**inputs), dtype=case.dtype)


def torch_patch_embed(frames_N_L_H_W_3: Tensor, weights: PatchWeights, spec: PatchSpec) -> Tensor:
    """In the weights' dtype, layer by layer, with torch's own norm and GELU."""
    dtype = weights.linears[0].dtype
    x = divide_frames(frames_N_L_H_W_3, spec).to(dtype)
    num_tokens, frames, side, _, depth = x.shape
    for fold, linear, norm in zip(spec.folds, weights.linears, weights.norms, strict=False):
        side //= fold
        x = x.reshape(num_tokens * frames, side, fold, side, fold, depth)
        x = F.linear(x.permute(0, 1, 3, 2, 4, 5).reshape(-1, fold * fold * depth), linear)
        depth = x.shape[-1]
        x = F.gelu(F.rms_norm(x, (depth,), norm.to(dtype), 1e-6))
    x = F.linear(x.reshape(num_tokens, frames * depth), weights.linears[-1])
    return F.rms_norm(x, (x.shape[-1],), weights.final_norm.to(dtype), 1e-6)


def with_norms_in_linears_dtype(inputs: dict) -> dict:
    linears, norms, final_norm = inputs["weights"]
    dtype = linears[0].dtype
    narrow = PatchWeights(linears, tuple(norm.to(dtype) for norm in norms), final_norm.to(dtype))
    return inputs | {"weights": narrow}


OP = OpBench(
    name="patch_embed",
    edge=cases.EDGE,
    # The kernels are those of 16-bit weights; float32 ones take the plain path on a GPU too.
    model=[*cases.MODEL, *(replace(case, dtype=torch.bfloat16) for case in cases.MODEL)],
    bench=cases.BENCH,
    check=check,
    variants={
        "ours": Variant(patch_embed),
        "torch": Variant(torch_patch_embed, with_norms_in_linears_dtype),
    },
)
