"""patch_embed: check, choose, launch."""

# Dimension key: N frame groups, L frames in a group, H and W pixels, T tokens, D model width,
# B bytes; O and I outputs and inputs of one layer.

from __future__ import annotations

import torch
from torch import Tensor

from ..._dims import Dims
from ..._numbers import check_eps
from ..._registry import refuse_grad, register_op
from ..._scratch import check_scratch
from ...precision import ACTIVATIONS
from .configs import kernel_why_not, scratch_bytes
from .reference import PATCH_40, PatchSpec, PatchWeights, patch_embed_ref, spec_of


def _plain(
    frames: Tensor,
    extent: Tensor | None,
    linears: list[Tensor],
    norms: list[Tensor],
    final_norm: Tensor,
    folds: list[int],
    extra_column: bool,
    mean: list[float],
    std: list[float],
    eps: float,
    out: Tensor,
    scratch: Tensor | None,
) -> None:
    spec = spec_of(frames, linears, folds, extra_column, mean, std)
    weights = PatchWeights(tuple(linears), tuple(norms), final_norm)
    out.copy_(
        patch_embed_ref(frames, weights, spec=spec, eps=eps, extent_N_2=extent, dtype=torch.float32)
    )


def _kernel(
    frames: Tensor,
    extent: Tensor | None,
    linears: list[Tensor],
    norms: list[Tensor],
    final_norm: Tensor,
    folds: list[int],
    extra_column: bool,
    mean: list[float],
    std: list[float],
    eps: float,
    out: Tensor,
    scratch: Tensor | None,
) -> None:
    from .kernel import launch_patch_embed

    spec = spec_of(frames, linears, folds, extra_column, mean, std)
    run = _plain if kernel_why_not(spec, linears[0].dtype) else launch_patch_embed
    run(
        frames,
        extent,
        linears,
        norms,
        final_norm,
        folds,
        extra_column,
        mean,
        std,
        eps,
        out,
        scratch,
    )


_op = register_op(
    "patch_embed(Tensor frames, Tensor? extent, Tensor[] linears, Tensor[] norms, "
    "Tensor final_norm, int[] folds, bool extra_column, float[] mean, float[] std, float eps, "
    "Tensor(a!) out, Tensor(b!)? scratch) -> ()",
    plain=_plain,
    kernel=_kernel,
)


def patch_embed(
    frames_N_L_H_W_3: Tensor,
    weights: PatchWeights,
    *,
    spec: PatchSpec = PATCH_40,
    eps: float = 1e-6,
    extent_N_2: Tensor | None = None,
    out_T_D: Tensor | None = None,
    scratch_B: Tensor | None = None,
) -> Tensor:
    """One token for every patch of every group of `spec.frames` frames, [T, D].

    Tokens are ordered by group, then patch row, then patch column. A token's bits depend on its own
    pixels and the weights alone, not on how many others there are or where it is among them.

    On CPU tensors everything is float32, rounded once at the end. On CUDA tensors the products take
    operands rounded to the linears' 16-bit dtype and accumulate in float32; towers for which
    `configs.kernel_why_not` has a reason, float32 ones among them, take the CPU path's lines there.
    Allocates `out_T_D` when it is None, and on CUDA the intermediate rows when `scratch_B` is None.

    frames: uint8, RGB last; H and W are multiples of `spec.patch`, or anything with
    `spec.extra_column`. extent, int32, not together with `spec.extra_column`: so many rows and
    columns of each group hold pixels; beyond them it is as beyond a frame, so that what
    `spec.extra_column` would cut may come as patches of one size. weights: linears of one dtype,
    float32, bfloat16 or float16; norms float32 or that dtype. out: any of the three, by default the
    linears' dtype. scratch: uint8, at least `configs.scratch_bytes(spec, T, D, dtype)` of them,
    with any content, aligned to 16. Raises TypeError or ValueError naming the argument.
    """
    if not isinstance(spec, PatchSpec):
        raise TypeError(f"spec: expected a PatchSpec, got {type(spec).__name__}")
    check_eps(eps)
    dims = Dims(L=spec.frames)
    dims.check(frames_N_L_H_W_3=frames_N_L_H_W_3, dtype=torch.uint8)
    rows, columns = spec.grid(dims["H"], dims["W"])
    if extent_N_2 is not None:
        dims.check(extent_N_2=extent_N_2, dtype=torch.int32, device=frames_N_L_H_W_3.device)
        if spec.extra_column:
            raise ValueError("extent_N_2: not together with spec.extra_column")
    device = frames_N_L_H_W_3.device
    width = _check_weights(weights, spec, device)
    dtype = weights.linears[0].dtype
    dims = Dims(T=dims["N"] * rows * columns, D=width)
    if out_T_D is None:
        out_T_D = torch.empty(dims["T"], width, dtype=dtype, device=device)
    else:
        dims.check(out_T_D=out_T_D, dtype=ACTIVATIONS, device=device)
    if scratch_B is not None:
        needed = scratch_bytes(spec, dims["T"], width, dtype)
        check_scratch(scratch_B, needed, device, align=16)
    refuse_grad(*weights.linears, *weights.norms, weights.final_norm)
    if out_T_D.numel() > 0:
        _op(
            frames_N_L_H_W_3, extent_N_2, weights.linears, weights.norms, weights.final_norm,
            spec.folds, spec.extra_column, spec.mean, spec.std, eps, out_T_D, scratch_B,
        )  # fmt: skip
    return out_T_D


def _check_weights(weights: PatchWeights, spec: PatchSpec, device: torch.device) -> int:
    """The model width D, once every tensor has the shape, dtype and device that go with it."""
    if not isinstance(weights, PatchWeights):
        raise TypeError(f"weights: expected PatchWeights, got {type(weights).__name__}")
    linears, norms, count = weights.linears, weights.norms, len(spec.folds)
    if len(linears) != count + 1 or len(norms) != count:
        raise ValueError(
            f"weights: expected {count + 1} linears and {count} norms for folds={spec.folds}, "
            f"got {len(linears)} and {len(norms)}"
        )
    dims = Dims()
    dims.check(last_linear_D_I=linears[-1], dtype=ACTIVATIONS, device=device, contiguous=False)
    if dims["D"] == 0:
        raise ValueError(f"last_linear_D_I: D=0; shape {tuple(linears[-1].shape)}")
    dtype = linears[-1].dtype
    norm_dtypes = (torch.float32, dtype)
    for i, (size_out, size_in) in enumerate(spec.linear_shapes(dims["D"])):
        named = {f"linear{i}_O_I": linears[i]}
        Dims(O=size_out, I=size_in).check(dtype=dtype, device=device, contiguous=True, **named)
    for i, size in enumerate(spec.widths):
        named = {f"norm{i}_O": norms[i]}
        Dims(O=size).check(dtype=norm_dtypes, device=device, contiguous=True, **named)
    dims.check(final_norm_D=weights.final_norm, dtype=norm_dtypes, device=device)
    return dims["D"]
