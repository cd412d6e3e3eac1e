"""Inputs of linear for tests and benchmarks, and what each must move at least."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...quant import FORMATS, pack_matrix
from ...testing import Cost, randn


@dataclass(frozen=True)
class Case:
    num_tokens: int
    width: int  # D
    rows: int  # of the weight
    bias: bool = False
    residual: bool = False
    scale: float = 1.0
    activation: str | None = None
    num_valid: int | None = None
    out_dtype: torch.dtype | None = None
    dtype: torch.dtype = torch.float32
    precision: str | None = None  # of a packed weight

    def __str__(self) -> str:
        kind = self.activation or (f"valid{self.num_valid}" if self.num_valid else "plain")
        extra = ("-bias" if self.bias else "") + ("-add" if self.residual else "")
        return (
            f"T{self.num_tokens}-D{self.width}-F{self.rows}-{kind}{extra}-"
            f"{self.precision or str(self.dtype).removeprefix('torch.')}"
        )

    @property
    def out_width(self) -> int:
        return self.rows // 2 if self.activation == "swiglu" else self.rows

    def make_inputs(self, device: str) -> dict:
        # The weight is drawn on the device: the unembedding has 0.8 G values.
        weight = torch.randn(self.rows, self.width, device=device, dtype=self.dtype)
        weight.mul_(max(self.width, 1) ** -0.5)
        residual = (self.num_tokens, self.out_width)
        return {
            "x_T_D": randn(self.num_tokens, self.width, device=device, dtype=self.dtype),
            "weight_F_D": pack_matrix(weight, self.precision) if self.precision else weight,
            "bias_F": randn(self.rows, device=device) if self.bias else None,
            "residual_T_F": randn(*residual, device=device, dtype=self.dtype)
            if self.residual
            else None,
            "scale": self.scale,
            "activation": self.activation,
            "num_valid": self.num_valid,
        }

    def cost(self) -> Cost:
        size, out_size = self.dtype.itemsize, (self.out_dtype or self.dtype).itemsize
        per_weight = FORMATS[self.precision].bytes_per_weight if self.precision else size
        moved = int(per_weight * self.rows * self.width) + size * self.num_tokens * self.width
        moved += self.num_tokens * self.out_width * (out_size + (size if self.residual else 0))
        return Cost(
            bytes=moved + (4 * self.rows if self.bias else 0),
            flops=2 * self.num_tokens * self.rows * self.width,
        )


@dataclass(frozen=True)
class ConvCase:
    """Of linear_conv. idle: tokens whose slot is -1; their residual, and slots that no token names,
    hold NaN, which nobody may read."""

    num_tokens: int
    width: int  # D
    rows: int
    idle: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    precision: str | None = None

    def __str__(self) -> str:
        kind = self.precision or str(self.dtype).removeprefix("torch.")
        return f"T{self.num_tokens}-D{self.width}-F{self.rows}-i{len(self.idle)}-{kind}"

    def make_inputs(self, device: str) -> dict:
        tokens, rows, narrow = self.num_tokens, self.rows, {"device": device, "dtype": self.dtype}
        weight = randn(rows, self.width, scale=max(self.width, 1) ** -0.5, **narrow)
        # Token t has slot T - t, so that slot 0 is never named and tokens and slots differ.
        slot = torch.tensor([-1 if t in self.idle else tokens - t for t in range(tokens)])
        state = torch.full((tokens + 2, 3, rows), float("nan"))
        named = slot[slot >= 0].long()
        state[named] = randn(len(named), 3, rows)
        residual = randn(tokens, rows)
        residual[list(self.idle)] = float("nan")
        return {
            "x_T_D": randn(tokens, self.width, **narrow),
            "weight_F_D": pack_matrix(weight, self.precision) if self.precision else weight,
            "conv_weight_F_4": randn(rows, 4, device=device, scale=0.5),
            "state_N_3_F": state.to(**narrow),
            "slot_T": slot.to(device, torch.int32),
            "residual_T_F": residual.to(**narrow),
            "norm_weight_F": 1 + 0.1 * randn(rows, device=device),
        }


CONV = [
    ConvCase(0, 32, 16),  # no tokens
    ConvCase(1, 32, 16),  # one
    ConvCase(3, 1, 5, idle=(1,)),  # one input column, an idle session between live ones
    ConvCase(2, 77, 33, idle=(0, 1)),  # nobody is live, odd widths
    ConvCase(5, 2100, 70, idle=(4,)),  # two parts of the columns, a tile of rows and a bit
    ConvCase(18, 300, 130),  # tokens and rows past a block
    ConvCase(3, 300, 130, precision="fp8"),
    ConvCase(3, 300, 130, idle=(0,), precision="fp8_channel"),
    ConvCase(3, 2100, 40, precision="int4"),
]
EDGE = [
    Case(0, 32, 16),  # no tokens
    Case(1, 32, 16, bias=True),  # one token
    Case(3, 1, 5),  # one input column
    Case(5, 77, 33, bias=True, residual=True),  # odd widths
    Case(8, 64, 48, scale=0.25),  # exactly one block of rows
    Case(9, 64, 48, residual=True),  # one row past it
    Case(4, 40, 2, activation="swiglu"),  # one output column
    Case(6, 77, 66, activation="swiglu", bias=True, residual=True),  # everything at once
    Case(3, 32, 20, num_valid=1, scale=0.5),  # one valid column
    Case(3, 32, 20, num_valid=20),  # every column valid
    Case(3, 77, 66, activation="swiglu", bias=True, precision="fp8"),  # less than a step
    Case(9, 130, 33, residual=True, scale=0.5, precision="fp8_channel"),  # a step and a bit
    Case(5, 300, 40, num_valid=30, precision="int4"),
    Case(1, 256, 130, precision="int4_f16"),  # a tile of rows and a bit
]
MODEL = [
    Case(23, 128, 320),  # tiny: the joint projection of a tick
    Case(4, 128, 1024, activation="swiglu"),  # tiny: dense layer of an output step
    Case(4, 128, 320, num_valid=300, scale=1 / 16),  # tiny: unembedding
    Case(2, 4096, 6656),  # inkling-small: qkvr
    Case(2, 4096, 512, activation="swiglu"),  # its width, few rows: the CPU is slow
]
BF16 = torch.bfloat16
LOGITS = {"scale": 1 / 16, "num_valid": 200058, "out_dtype": torch.float32, "dtype": BF16}
BENCH = [
    *(
        case
        for t in (1, 8, 32, 64, 256, 1024)
        for case in (
            Case(t, 4096, 6656, dtype=BF16),  # q, k, v, r
            Case(t, 4096, 4096, dtype=BF16),  # attention output
            Case(t, 4096, 32768, activation="swiglu", dtype=BF16),  # dense gate and up
            Case(t, 16384, 4096, dtype=BF16),  # dense down
        )
    ),
    *(Case(t, 4096, 201024, **LOGITS) for t in (1, 8, 32)),
    *(
        Case(t, 4096, rows, activation=activation, dtype=BF16, precision=precision)
        for t in (1, 8, 32, 256)
        for precision in ("fp8", "int4")
        for rows, activation in ((6656, None), (4096, None), (32768, "swiglu"))
    ),
]
