"""moe: the whole block of a layer, router, routed and shared experts, in three launches."""

# Dimension key: T tokens, D model width, E routed experts, Z shared experts, A = E + Z gate rows,
# F expert width, K experts chosen per token.

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tml_kernels.moe import moe_layer
from tml_kernels.moe_weights import MoEWeights
from tml_kernels.ops.expert_mlp import workspace_bytes
from tml_kernels.ops.expert_mlp.reference import fused_moe_ref
from tml_kernels.ops.route import Routing, moe_route
from tml_kernels.ops.route.cases import assert_routes
from tml_kernels.quant import FORMATS
from tml_kernels.testing import Cost, assert_matches

from . import bench_expert_mlp, moe_peers
from .bench_expert_mlp import LAYERS, SETS, TimedCase
from .harness import OpBench, Variant
from .moe_peers import Routed
from .peers import find

TOP_K = 6
SCALE = 8.0


@dataclass(frozen=True)
class Case:
    """Tokens and gate are drawn on the CPU: cost() counts the experts that they touch."""

    num_tokens: int
    width: int  # D
    expert_width: int  # F
    num_experts: int  # E
    num_shared: int  # Z
    precision: str
    shared_precision: str
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return (
            f"T{self.num_tokens}-D{self.width}-F{self.expert_width}-E{self.num_experts}-"
            f"K{TOP_K}-Z{self.num_shared}-{self.precision}+{self.shared_precision}"
        )

    def tokens_and_gate(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.num_tokens)
        x_T_D = torch.randn(self.num_tokens, self.width, generator=generator)
        gate_A_D = torch.randn(self.num_experts + self.num_shared, self.width, generator=generator)
        return x_T_D.to(self.dtype), gate_A_D.mul_(self.width**-0.5).to(self.dtype)

    def make_inputs(self, device: str) -> dict[str, Any]:
        experts = TimedCase(
            self.num_tokens,
            self.width,
            self.expert_width,
            self.num_experts,
            TOP_K,
            self.num_shared,
            dtype=self.dtype,
            precision=self.precision,
            shared_precision=self.shared_precision,
            order="gate_up",
        )
        x, w_gate = self.tokens_and_gate()
        return {
            "x": x.to(device),
            "w_gate": w_gate.to(device),
            "weights": experts.make_weights(device),
            "top_k": TOP_K,
            "scoring": "sink_sigmoid",
            "scale": SCALE,
        }

    def cost(self) -> Cost:
        """Gate, tokens in and out, touched and shared experts."""
        params = 3 * self.width * self.expert_width
        rows = 2 * self.num_tokens + self.num_experts + self.num_shared
        experts = _touched(self) * FORMATS[self.precision].bytes_per_weight
        experts += self.num_shared * FORMATS[self.shared_precision].bytes_per_weight
        gate = self.width * (self.num_experts + self.num_shared)
        slots = TOP_K + self.num_shared
        return Cost(
            bytes=int(params * experts) + rows * self.width * self.dtype.itemsize,
            flops=2 * self.num_tokens * (gate + params * slots),
        )


@functools.cache
def _touched(case: Case) -> int:
    """How many routed experts the tokens choose together."""
    if case.num_tokens == 0:
        return 0
    x, w_gate = case.tokens_and_gate()
    routing = moe_route(x, w_gate, top_k=TOP_K, scoring="sink_sigmoid", num_shared=case.num_shared)
    return routing.expert_T_K.unique().numel()


def allocate(inputs: dict[str, Any]) -> dict[str, Any]:
    """Routing, output and workspace, so that the block allocates nothing."""
    x, weights = inputs["x"], inputs["weights"]
    (num_tokens, width), top_k = x.shape, inputs["top_k"]
    size = workspace_bytes(weights, num_tokens, top_k, x.dtype)
    sizes = (num_tokens, top_k, weights.num_shared, weights.num_experts)
    return inputs | {
        "routing": Routing.empty(*sizes, x.device, width=width),
        "out": torch.empty_like(x),
        "workspace": torch.empty(size, dtype=torch.uint8, device=x.device),
    }


def check(case: Case, device: str) -> None:
    """The routing against its oracle, and the experts with the routing that was chosen."""
    inputs = allocate(case.make_inputs(device))
    out_T_D = moe_layer(**inputs)
    x, w_gate, weights = (inputs.pop(name) for name in ("x", "w_gate", "weights"))
    routing = inputs["routing"]
    route = {name: inputs[name] for name in ("top_k", "scoring", "scale")}
    route |= {"x_T_D": x, "w_gate_A_D": w_gate, "num_shared": case.num_shared}
    if case.num_tokens > 0:
        assert_routes(routing, route)
    expected = fused_moe_ref(
        x, weights, routing.expert_T_K, routing.weight_T_K, routing.shared_weight_T_Z
    )
    assert_matches(out_T_D, expected, dtype=case.dtype)


def composed(routed: Routed) -> Variant:
    """A router of torch operations in float32, then experts that take plain weights."""
    experts = bench_expert_mlp.on_plain(routed)

    def run(
        x: Tensor, w_gate: Tensor, weights: MoEWeights, top_k: int, scoring: str, scale: float
    ) -> Tensor:
        assert scoring == "sink_sigmoid"
        num_experts = weights.num_experts
        logit_T_A = F.linear(x.float(), w_gate.float())
        score_T_E = torch.sigmoid(logit_T_A[:, :num_experts])
        expert_T_K = torch.topk(score_T_E, top_k, dim=1).indices
        chosen = torch.cat([logit_T_A.gather(1, expert_T_K), logit_T_A[:, num_experts:]], dim=1)
        weight = torch.softmax(F.logsigmoid(chosen), dim=1) * scale
        routing = Routing(expert_T_K.int(), weight[:, :top_k], weight[:, top_k:], num_experts)
        return experts(x, weights, routing, "silu")

    return Variant(run)


def transformers_inkling() -> Variant:
    """The module of transformers with its grouped products. Its router multiplies in x's dtype:
    where scores nearly tie it chooses other experts, so the result is not compared."""
    config_type = find("transformers", "InklingTextConfig")
    module_type = find("transformers.models.inkling.modeling_inkling", "InklingMoE")

    def prepare(inputs: dict[str, Any]) -> dict[str, Any]:
        weights: MoEWeights = inputs["weights"]
        w13, w2 = moe_peers.plain(weights, "silu")
        if weights.shared is None:
            raise NotImplementedError("takes shared experts")
        shared_w13, shared_w2 = moe_peers.plain(weights.shared, "silu")
        config = config_type(
            hidden_size=weights.width,
            moe_intermediate_size=weights.expert_width,
            n_routed_experts=weights.num_experts,
            n_shared_experts=weights.num_shared,
            num_experts_per_tok=inputs["top_k"],
            route_scale=inputs["scale"],
            hidden_act="silu",
        )
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            module = module_type(config)
        gate_proj, up_proj = (half.contiguous() for half in shared_w13.chunk(2, dim=1))
        w_gate = inputs["w_gate"]
        state = {
            "gate.weight": w_gate,
            "gate.global_scale": w_gate.new_ones(1),
            "gate.e_score_correction_bias": w_gate.new_zeros(weights.num_experts),
            "experts.gate_up_proj": w13,
            "experts.down_proj": w2,
            "shared_experts.gate_proj": gate_proj,
            "shared_experts.up_proj": up_proj,
            "shared_experts.down_proj": shared_w2,
        }
        module.load_state_dict(state, assign=True)
        return {"module": module.requires_grad_(False), "x": inputs["x"]}

    def run(module: torch.nn.Module, x: Tensor) -> Tensor:
        return module(x)

    return Variant(run, prepare, check=False)


PRECISIONS = (("bf16", "bf16"), ("fp8", "fp8"), ("int4", "fp8"))
BENCH = [Case(t, 4096, 2048, 256, 2, p, s) for p, s in PRECISIONS for t in (1, 8, 32, 64, 256)]
EDGE = [
    Case(0, 32, 16, 8, 2, "fp32", "fp32", torch.float32),  # no tokens
    Case(1, 32, 16, 8, 1, "fp32", "fp32", torch.float32),  # one token
    Case(9, 77, 33, 7, 2, "fp32", "fp32", torch.float32),  # odd widths
    Case(9, 288, 136, 8, 2, "int4", "fp8", torch.float32),  # two formats, padded columns
]
MODEL = [
    Case(23, 128, 128, 8, 2, "fp32", "fp32", torch.float32),  # tiny
    *(Case(t, 512, 256, 16, 2, p, s) for p, s in PRECISIONS for t in (1, 8)),  # as timed, narrow
]

OP = OpBench(
    name="moe",
    edge=EDGE,
    model=MODEL,
    bench=BENCH,
    check=check,
    variants={
        "ours": Variant(moe_layer, prepare=allocate),
        "torch, gather + bmm": composed(
            bench_expert_mlp.limit_gathered(bench_expert_mlp.gather_bmm)
        ),
    },
    peers={
        "torch grouped_mm": lambda: composed(bench_expert_mlp.torch_grouped_mm()),
        "transformers Inkling": transformers_inkling,
    },
    quick=[case for case in BENCH if case.num_tokens in (1, 64)],
    sets=SETS,
    graph_calls=LAYERS,
)
