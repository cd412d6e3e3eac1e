"""What of expert_mlp is compiled ahead of time: the model's sizes in every precision and block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..._aot import MAX_LOOP, AotSpec
from ..._triton.steps import STEP
from .configs import FOUR_BIT, Problem, choose_config
from .kernel import GIVEN, INV_RMS, SIZES, TABLES, down_kernel, gate_up_kernel

# Format -> Triton types of data, scale, zero and outer; None: there is no such tensor.
_TENSORS = {
    "plain": ("*bf16", None, None, None),
    "fp8": ("*i16", "*fp32", None, None),
    "fp8_channel": ("*i16", "*fp32", None, None),
    "int4": ("*i16", "*i32", None, None),
    "int4_f16": ("*i16", "*i32", "*i32", None),  # AWQ has zero points
    "mxfp4": ("*i16", "*i32", None, "*fp32"),
    "nvfp4": ("*i16", "*i32", None, "*fp32"),
}
TOKENS = ("x_ptr", "h_ptr", "out_ptr")
_TYPES = {
    **dict.fromkeys(("part_ptr", "weight_ptr", "shared_weight_ptr"), "*fp32"),
    **dict.fromkeys(("expert_ptr", "counter_ptr", *TABLES), "*i32"),
}
INTERACTION_SHARED = 2  # shared experts of the model whose tokens come with a late norm
_ALIGNED_SIZES = ("D", "F", "SHARED_F", "H")


@dataclass(frozen=True)
class Shape:
    """Precisions and traits of one model. num_shared = 0: the shared experts' names are unused."""

    routed: str
    shared: str
    num_shared: int = 2
    top_k: int = 6
    quantize_x: bool = False
    scheduled: bool = True
    bias: bool = False
    activation: str = "silu"
    dtype: str = "bf16"  # of the tokens

    @property
    def loops(self) -> tuple[str, ...]:
        """Formats of a kernel's loops, in the order of its code."""
        return (self.routed,) if self.routed == self.shared else (self.shared, self.routed)

    @property
    def label(self) -> str:
        names = f"{self.routed}+{self.shared}" if self.num_shared else self.routed
        return (
            names
            + "-w8a8" * self.quantize_x
            + "-bias" * self.bias
            + "-alone" * (not self.scheduled)
            + "-fp32" * (self.dtype == "fp32")
        )


SHAPES = (
    Shape("mxfp4", "mxfp4", 0, top_k=4, bias=True, activation="swiglu_oai"),  # gpt-oss
    Shape("int4_f16", "int4_f16", 0, top_k=2),  # an AWQ Mixtral
    Shape("fp8", "fp8", 1, top_k=8, quantize_x=True),  # DeepSeek-V3
    Shape("fp8_channel", "fp8_channel"),
    Shape("nvfp4", "fp8"),
    Shape("mxfp4", "fp8"),
    Shape("int4", "int4", 0),
    Shape("plain", "plain", scheduled=False),
    Shape("int4", "fp8", scheduled=False),
    Shape("plain", "plain"),
    Shape("fp8", "fp8"),
    Shape("int4", "fp8"),
)
LARGE = ("plain", "fp8", "int4")  # also for blocks of more than 32 tokens
# Tokens of float32 that take fewer stages before sm_90, as others would not fit.
CRAMPED = (
    (Shape("nvfp4", "nvfp4", 0, dtype="fp32"), 16),
    (Shape("nvfp4", "nvfp4", 0, dtype="fp32"), 64),
    (Shape("int4_f16", "int4_f16", 0, dtype="fp32"), 64),
)


def aot_specs() -> list[AotSpec]:
    """Every shape x block size x kernel, the widest last; first those only of sm_80."""
    cramped = [
        _spec(kernel, shape, block_n, cramped=True)
        for kernel in (gate_up_kernel, down_kernel)
        for shape, block_n in CRAMPED
    ]
    return cramped + [
        _spec(kernel, shape, block_n)
        for kernel in (gate_up_kernel, down_kernel)
        for block_n in (16, 32, 64)
        for shape in SHAPES
        if block_n == 16
        or (shape.scheduled and (block_n == 32 or (shape.num_shared and shape.routed in LARGE)))
    ]


def _spec(kernel: Any, shape: Shape, block_n: int, *, cramped: bool = False) -> AotSpec:
    alone = not shape.scheduled
    config = choose_config(Problem(shape.routed, shape.shared, block_n, alone, cramped))
    constexprs: dict[str, Any] = {
        "K": shape.top_k,
        "Z": shape.num_shared,
        "SCHEDULED": shape.scheduled,
        "FORMAT": shape.routed,
        "SHARED_FORMAT": shape.shared,
        "ALIKE": shape.routed == shape.shared,
        "QUANTIZE_X": shape.quantize_x,
        "EVEN_M": True,
        "EVEN_W": True,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    if kernel is gate_up_kernel:
        constexprs["ACTIVATION"] = shape.activation
        constexprs |= {"ORDER": "interleaved", "SHARED_ORDER": "interleaved"}
    signature = {}
    for name in kernel.arg_names:
        kind = None if name in constexprs else _type_of(name, shape)
        if kind is not None:
            signature[name] = kind
        elif name not in constexprs:
            constexprs[name] = None
    given = {*SIZES, *TABLES, *GIVEN, INV_RMS}
    aligned = [name for name, kind in signature.items() if kind[0] == "*" or name in _ALIGNED_SIZES]
    return AotSpec(
        kernel=kernel,
        config=config,
        signature=signature,
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=tuple(name for name in aligned if name not in given),
        label=f"{shape.label},block_n={block_n}",
        maxnreg=config.maxnreg,
        min_arch=89 if shape.quantize_x else 80,
        below_arch=90 if cramped else None,
        mma="QGMMA" if shape.quantize_x else "HGMMA",
        weights_per_step=tuple(config.block_m * STEP[format] for format in shape.loops),
        # A 4-bit weight of a few tokens; more tokens cost products and are bound by them.
        max_loop=MAX_LOOP if shape.routed in FOUR_BIT and block_n <= 32 else None,
    )


def _type_of(name: str, shape: Shape) -> str | None:
    """None: this shape has no such tensor."""
    if name in TOKENS:
        return f"*{shape.dtype}"
    if name in _TYPES:
        return None if name in TABLES and not shape.scheduled else _TYPES[name]
    if name in ("map_ptr", "num_local"):
        return None
    if not name.endswith("_ptr"):
        return "i32"
    if name == INV_RMS:
        return "*fp32" if shape.num_shared == INTERACTION_SHARED else None
    format = shape.shared if name.startswith("shared_") else shape.routed
    name = name.removeprefix("shared_").removesuffix("_ptr")
    if name == "bias":
        return "*fp32" if shape.bias else None
    return _TENSORS[format][("w", "scale", "zero", "outer").index(name)]
