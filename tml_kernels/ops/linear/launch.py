"""Launch of linear's kernel, and what compiles it ahead of time."""

# pyright: reportCallIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._aot import MAX_LOOP, AotSpec
from ..._scratch import is_aligned
from .configs import MAX_COUNTERS, Config, Problem, choose_config, choose_conv_config
from .kernel import linear_kernel


def launch_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_zero: Tensor | None,
    format: str,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: float,
    activation: str | None,
    num_valid: int | None,
    out: Tensor,
    scratch: Tensor | None = None,
    parts: int = 1,
    config: Config | None = None,
    conv: Conv | None = None,
) -> None:
    """Arguments as of the op, none empty; one launch. Without a scratch the counters are cleared
    before it. conv: of `linear_conv`, with its residual and nothing else behind the product."""
    problem = Problem(*x.shape, weight.shape[-2], format, parts)
    config = config or (choose_config if conv is None else choose_conv_config)(problem)
    counter = part = None
    if config.parallel:
        size = config.scratch_bytes(problem)
        if scratch is None:
            scratch = torch.empty(size, dtype=torch.uint8, device=x.device)
            scratch[: 4 * MAX_COUNTERS].zero_()
        counter = scratch[: 4 * MAX_COUNTERS].view(torch.int32)
        part = scratch[4 * MAX_COUNTERS : size].view(torch.float32)
    constexprs = _constexprs(problem, config, activation == "swiglu")
    constexprs["EVEN_W"] &= is_aligned(x)
    linear_kernel[(config.programs(problem),)](
        x, weight, weight_scale, weight_zero, bias, residual, counter, part, out,
        *x.shape, problem.rows, num_valid, scale, *(conv or NO_CONV),
        **constexprs,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


class Conv(NamedTuple):
    """Arguments of the kernel that make it convolve."""

    weight_F_4: Tensor | None
    norm_weight_F: Tensor | None
    slot_T: Tensor | None
    state_N_3_F: Tensor | None
    num_slots: int | None


NO_CONV = Conv(None, None, None, None, None)


def launch_linear_conv(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_zero: Tensor | None,
    format: str,
    conv_weight: Tensor,
    state: Tensor,
    slot: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    out: Tensor,
    scratch: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Arguments as of the op, none empty; one launch."""
    conv = Conv(conv_weight, norm_weight, slot, state, state.shape[0])
    launch_linear(
        x, weight, weight_scale, weight_zero, format, None, residual, 1.0, None, None, out, scratch,
        config=config, conv=conv,
    )  # fmt: skip


def _constexprs(p: Problem, config: Config, swiglu: bool) -> dict[str, Any]:
    return {
        "FORMAT": p.format,
        "SWIGLU": swiglu,
        "SPLITS": p.splits,
        "SPLIT_D": p.split_d,
        "PARALLEL": config.parallel,
        "EVEN_M": p.rows % config.block_m == 0,
        "EVEN_W": p.width % p.step == 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }


_TYPES = {"x_ptr": "*bf16", "residual_ptr": "*bf16", "scale": "fp32", "out_ptr": "*bf16"}
_TYPES |= dict.fromkeys(("bias_ptr", "part_ptr"), "*fp32") | {"counter_ptr": "*i32"}
_TYPES |= {"conv_ptr": "*fp32", "norm_weight_ptr": "*fp32", "slot_ptr": "*i32"}
_TYPES |= {"state_ptr": "*bf16"}
_CONV = ("conv_ptr", "norm_weight_ptr", "slot_ptr", "state_ptr", "N")
_TENSORS = {  # Triton types of a format's data, scale and zero
    "plain": ("*bf16", None, None),
    "fp8": ("*i16", "*fp32", None),
    "fp8_channel": ("*i16", "*fp32", None),
    "int4": ("*i16", "*i32", None),
    "int4_f16": ("*i16", "*i32", "*i32"),  # AWQ has zero points
}
# Name, formats, tokens, D, F, what of the kernel's optional arguments is there.
_PLAIN, _PACKED = ("plain",), ("fp8", "fp8_channel", "int4", "int4_f16")
_EVERY = ("swiglu", "bias_ptr", "residual_ptr")
_SHAPES = (
    ("odd", _PLAIN, (16,), 1100, 335, ("bias_ptr",)),
    ("odd", _PACKED[:2], (16, 64), 2100, 335, ()),
    ("every-step", _PLAIN, (16, 64, 128, 1024), 4096, 4096, _EVERY),
    ("every-step", _PACKED[:3], (16, 64), 4096, 4096, _EVERY),
    ("gate-up", _PACKED[::2], (16, 32), 4096, 32768, ("swiglu",)),
    ("out", _PACKED, (16, 64, 1024), 4096, 4096, ()),
    ("out-conv", _PLAIN, (16, 32, 64, 128), 4096, 4096, ("residual_ptr", *_CONV)),
    ("out-conv", _PACKED, (16, 64), 4096, 4096, ("residual_ptr", *_CONV)),
    ("qkvr", _PLAIN, (16, 64), 4096, 6656, ()),
    ("unembedding", _PLAIN, (16, 32, 64), 4096, 201024, ("num_valid",)),
    ("gate-up", _PLAIN, (16, 32, 64, 1024), 4096, 32768, ("swiglu",)),
    ("out", _PLAIN, (16, 32, 64, 128, 1024), 4096, 4096, ()),
)


def aot_specs() -> list[AotSpec]:
    """The public model's shapes in bf16, for few tokens and for many; the widest last."""
    return [
        _spec(name, Problem(num_tokens, width, rows, format), given)
        for name, formats, tokens, width, rows, given in _SHAPES
        for format in formats
        for num_tokens in tokens
    ]


def _spec(name: str, p: Problem, given: tuple[str, ...]) -> AotSpec:
    config = (choose_conv_config if "conv_ptr" in given else choose_config)(p)
    constexprs = _constexprs(p, config, "swiglu" in given)
    types = dict(zip(("w_ptr", "w_scale_ptr", "w_zero_ptr"), _TENSORS[p.format], strict=True))
    absent = [n for n in ("bias_ptr", "residual_ptr", "num_valid", *_CONV) if n not in given]
    absent += [n for n, kind in types.items() if kind is None]
    absent += [] if config.parallel else ["counter_ptr", "part_ptr"]
    constexprs |= dict.fromkeys(absent)
    signature = {n: (types | _TYPES).get(n, "i32") for n in linear_kernel.arg_names}
    signature = {n: kind for n, kind in signature.items() if n not in constexprs}
    if "num_valid" in given:
        signature["out_ptr"] = "*fp32"
    even = [n for n, size in (("D", p.width), ("F", p.rows)) if size % 16 == 0]
    return AotSpec(
        kernel=linear_kernel,
        config=config,
        signature=signature,
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=(
            *(n for n, kind in signature.items() if kind[0] == "*" and n != "slot_ptr"),
            *even,
        ),
        label=f"{name},{p.format},T={p.num_tokens}",
        mma="HGMMA",
        weights_per_step=(config.block_m * p.step,),
        max_loop=MAX_LOOP if p.format.startswith("int4") and config.block_n <= 32 else None,
    )
