"""Inputs of fused_moe for tests and benchmarks, and what each must move at least."""

# Dimension key: T tokens, D model width, E routed experts, Z shared experts, F expert width,
# K experts chosen per token.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._routing import Routing
from ...moe_weights import MoEWeights, prepare_moe_weights
from ...quant import FORMATS
from ...testing import Cost, randn

PLAIN = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Case:
    """skew: "uniform" draws K distinct experts per token; "zipf" draws them with weights 1 / rank;
    "one" sends every assignment to expert 0; "skip" mixes in ids that are skipped (-1, E and
    beyond). precision: of the routed experts, and of the shared ones unless `shared_precision`
    says otherwise; None is x's dtype."""

    num_tokens: int
    width: int  # D
    expert_width: int  # F
    num_experts: int  # E
    top_k: int
    num_shared: int = 0  # Z
    skew: str = "uniform"
    dtype: torch.dtype = torch.float32
    precision: str | None = None
    shared_precision: str | None = None
    order: str = "interleaved"
    bias: bool = False
    activation: str = "silu"
    late_norm: bool = False  # with a factor for each token

    def __str__(self) -> str:
        parts = [
            f"T{self.num_tokens}-D{self.width}-F{self.expert_width}-E{self.num_experts}",
            f"K{self.top_k}-Z{self.num_shared}-{self.skew}-{PLAIN[self.dtype]}",
        ]
        if self.precision or self.shared_precision:
            parts.append(f"{self.format_of('routed')}+{self.format_of('shared')}")
        if (self.order, self.bias, self.activation) != ("interleaved", False, "silu"):
            parts.append(f"{self.order}-{self.activation}" + "-bias" * self.bias)
        return "-".join([*parts, "late"] if self.late_norm else parts)

    def format_of(self, side: str) -> str:
        routed = self.precision or PLAIN[self.dtype]
        return routed if side == "routed" else self.shared_precision or routed

    def expert_ids(self) -> Tensor:
        """expert_T_K on the CPU, the same for every run: cost() counts the experts it touches."""
        generator = torch.Generator().manual_seed(self.num_tokens)
        # The K largest of u^(1/w) are a draw without replacement with weights w.
        weight_E = torch.ones(self.num_experts)
        if self.skew == "zipf":
            weight_E /= torch.arange(1, self.num_experts + 1)
            weight_E = weight_E[torch.randperm(self.num_experts, generator=generator)]
        score = torch.rand(self.num_tokens, self.num_experts, generator=generator)
        score = score.clamp(min=1e-30).log() / weight_E
        expert_T_K = score.argsort(dim=1, descending=True)[:, : self.top_k].to(torch.int32)
        if self.skew == "one":
            expert_T_K.zero_()
        if self.skew == "skip":
            expert_T_K[::2, 0] = -1
            expert_T_K[1::2, -1] = self.num_experts
            expert_T_K[2:3] = torch.iinfo(torch.int32).max
        return expert_T_K

    def make_weights(self, device: str) -> MoEWeights:
        shared = None
        if self.num_shared:
            shared = self._weights(self.num_shared, self.format_of("shared"), device, None)
        return self._weights(self.num_experts, self.format_of("routed"), device, shared)

    def _weights(
        self, count: int, precision: str, device: str, shared: MoEWeights | None
    ) -> MoEWeights:
        hidden, dtype = self.expert_width, self.dtype if precision in PLAIN.values() else None
        # Drawn on the device: 256 experts of the model are 6.4 G values.
        draw = {"device": device, "dtype": dtype or torch.bfloat16}
        w13 = torch.randn(count, 2 * hidden, self.width, **draw).mul_(self.width**-0.5)
        w2 = torch.randn(count, self.width, hidden, **draw).mul_(hidden**-0.5)
        return prepare_moe_weights(
            w13,
            w2,
            layout=self.order,
            precision=precision,
            bias13=randn(count, 2 * hidden, device=device) if self.bias else None,
            bias2=randn(count, self.width, device=device) if self.bias else None,
            shared=shared,
        )

    def make_inputs(self, device: str) -> dict:
        shape = (self.num_tokens, self.top_k)
        return {
            "x": randn(self.num_tokens, self.width, device=device, dtype=self.dtype),
            "weights": self.make_weights(device),
            "routing": Routing(
                self.expert_ids().to(device),
                randn(*shape, device=device).abs(),
                randn(self.num_tokens, self.num_shared, device=device).abs(),
                self.num_experts,
                inv_rms_T=randn(self.num_tokens, device=device).exp() if self.late_norm else None,
            ),
            "activation": self.activation,
        }

    def cost(self) -> Cost:
        ids = self.expert_ids()
        valid = ids[(ids >= 0) & (ids < self.num_experts)]
        params = 3 * self.width * self.expert_width
        routed = valid.unique().numel() * FORMATS[self.format_of("routed")].bytes_per_weight
        shared = self.num_shared * FORMATS[self.format_of("shared")].bytes_per_weight
        rows = 2 * self.num_tokens * self.width * self.dtype.itemsize
        tables = self.num_tokens * (8 * self.top_k + 4 * self.num_shared)
        return Cost(
            bytes=int(params * (routed + shared)) + rows + tables,
            flops=2 * params * (valid.numel() + self.num_tokens * self.num_shared),
        )


EDGE = [
    Case(0, 32, 16, 4, 2),  # no tokens
    Case(1, 32, 16, 4, 2, num_shared=1),  # one token: experts without a token
    Case(5, 77, 33, 5, 3, num_shared=2),  # odd widths
    Case(3, 8, 1, 4, 2),  # one hidden column
    Case(19, 32, 16, 4, 2, skew="one"),  # every assignment on one expert, over two blocks
    Case(6, 32, 16, 4, 3, num_shared=1, skew="skip"),  # ids that are skipped, one token entirely
    Case(6, 32, 16, 4, 3, skew="skip"),  # and a token that no expert writes
    Case(4, 32, 16, 1, 1, num_shared=3),  # one expert
    Case(9, 32, 16, 3, 3),  # every expert by every token, one row past a block of the CPU path
    Case(7, 160, 72, 4, 2, order="gate_up", bias=True, activation="swiglu_oai"),  # as gpt-oss
    Case(7, 48, 24, 4, 2, 1, order="up_gate", activation="gelu_tanh"),
    Case(6, 32, 16, 60, 10, activation="gelu"),  # many experts, ten a token
    Case(7, 77, 33, 5, 3, 2, skew="skip", bias=True, late_norm=True),  # biases are not multiplied
]
PACKED = [
    Case(t, 288, 136, 5, 2, z, precision=precision, shared_precision=shared, order=order)
    for t, precision, z, shared, order in (
        (3, "fp8", 0, None, "gate_up"),
        (5, "fp8", 1, None, "interleaved"),
        (5, "fp8_channel", 2, "fp8", "up_gate"),
        (3, "int4", 0, None, "interleaved"),
        (5, "int4", 2, "fp8", "gate_up"),
        (5, "mxfp4", 1, "fp8_channel", "interleaved"),
        (5, "nvfp4", 1, "nvfp4", "gate_up"),
        (5, "int4", 1, "fp32", "gate_up"),
    )
] + [
    Case(5, 288, 136, 5, 2, 2, precision="int4", shared_precision="fp8", late_norm=True, bias=bias)
    for bias in (False, True)
]
MODEL = [
    Case(23, 128, 128, 8, 2, num_shared=2),  # tiny
    Case(2, 4096, 256, 6, 6, num_shared=2),  # inkling-small: its widths, few experts, narrow ones
]
BENCH_T = (1, 8, 16, 32, 64, 256, 1024)
BENCH = [
    *(
        Case(t, 4096, 2048, 256, 6, skew=skew, dtype=torch.bfloat16, precision=precision)
        for precision in ("bf16", "fp8", "int4", "mxfp4")
        for skew in ("uniform", "zipf")
        for t in BENCH_T
    ),
    *(
        Case(t, 4096, 2048, 256, 6, 2, dtype=torch.bfloat16, precision=p, shared_precision=s)
        for p, s in (("bf16", "bf16"), ("fp8", "fp8"), ("int4", "fp8"), ("nvfp4", "fp8"))
        for t in (1, 8, 32, 256)
    ),
    # A tick of 8 and of 32 sessions: one token each, and five in its first pass.
    *(
        Case(t, 4096, 2048, 256, 6, 2, skew, torch.bfloat16, "int4", "fp8", late_norm=True)
        for skew in ("uniform", "zipf")
        for t in (8, 32, 40, 160)
    ),
]
