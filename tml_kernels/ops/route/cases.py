"""Inputs of moe_route for tests and benchmarks, and what each must move at least."""

# Dimension key: T tokens, D model width, E routed experts, Z shared experts, A gate rows, K experts
# chosen per token.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._routing import Routing
from ...testing import Cost, assert_matches, randn
from .reference import Rule, choice_ref, logits_ref, moe_route_ref, scores_ref

# Choice scores nearer than this, of values around 1, may be ordered either way in float32.
NEAR_TIE = 2e-5


@dataclass(frozen=True)
class Case:
    num_tokens: int
    width: int  # D, or 0 for ready logits
    num_experts: int  # E
    top_k: int
    num_shared: int = 0  # Z
    scoring: str = "sink_sigmoid"
    bias: bool = True
    logit_bias: bool = False
    renormalize: bool = True
    groups: tuple[int, int] = (1, 1)  # how many, and how many of them are kept
    scale: float = 8.0
    dtype: torch.dtype = torch.float32
    gate_dtype: torch.dtype | None = None  # dtype, unless given
    late_norm: bool = False  # with the residual that x is to be divided by the size of

    def __str__(self) -> str:
        flags = {
            "bias": self.bias,
            "linear": self.logit_bias,
            "plain": not self.renormalize,
            "G{}of{}".format(*self.groups[::-1]): self.groups != (1, 1),
            "gate32": self.gate_dtype == torch.float32,
            "late": self.late_norm,
        }
        return "-".join([
            f"T{self.num_tokens}-D{self.width}-E{self.num_experts}-K{self.top_k}-Z{self.num_shared}",
            self.scoring,
            *(name for name, given in flags.items() if given),
            str(self.dtype).removeprefix("torch."),
        ])  # fmt: skip

    @property
    def num_logits(self) -> int:
        """A."""
        return self.num_experts + self.num_shared * (self.scoring == "sink_sigmoid")

    def make_inputs(self, device: str) -> dict[str, Any]:
        tokens, width, logits = self.num_tokens, self.width, self.num_logits
        if width:
            gate_dtype = self.gate_dtype or self.dtype
            gate = randn(logits, width, device=device, dtype=gate_dtype, scale=width**-0.5)
            x = randn(tokens, width, device=device, dtype=self.dtype)
            source = {"x_T_D": x, "w_gate_A_D": gate}
            if self.late_norm:
                source["residual_T_D"] = 3.0 * randn(tokens, width, device=device, dtype=self.dtype)
                source["x_T_D"] = 3.0 * x
        else:
            source = {"logits_T_A": randn(tokens, logits, device=device, dtype=self.dtype)}
        bias = randn(self.num_experts, device=device, scale=0.1)
        return source | {
            "top_k": self.top_k,
            "scoring": self.scoring,
            "bias_E": bias if self.bias else None,
            "logit_bias_A": randn(logits, device=device) if self.logit_bias else None,
            "renormalize": self.renormalize,
            "num_groups": self.groups[0],
            "top_groups": self.groups[1],
            "scale": self.scale,
            "global_scale_1": torch.full((1,), 1.25, device=device) if self.bias else None,
            "num_shared": self.num_shared,
        }

    def cost(self) -> Cost:
        logits, size = self.num_logits, self.dtype.itemsize
        gate_size = (self.gate_dtype or self.dtype).itemsize
        out = self.num_tokens * 4 * (2 * self.top_k + self.num_shared)
        source = self.num_tokens * size * (self.width or logits) * (1 + self.late_norm)
        return Cost(
            bytes=source + gate_size * self.width * logits + 4 * self.num_experts + out,
            flops=2 * self.num_tokens * logits * self.width,
        )


def split_inputs(inputs: dict[str, Any]) -> tuple[dict[str, Any], Rule]:
    """The arguments of `moe_route_ref`, from those of `moe_route`."""
    names = ("scoring", "renormalize", "num_groups", "top_groups", "scale")
    rest = {name: value for name, value in inputs.items() if name not in names}
    if "logits_T_A" in rest:
        rest["x_T_D"] = rest.pop("logits_T_A")
    return rest, Rule(**{name: inputs[name] for name in names if name in inputs})


def assert_routes(result: Routing, inputs: dict[str, Any]) -> None:
    """Fail unless this is the oracle's routing of these inputs, up to experts that nearly tie."""
    given, rule = split_inputs(inputs)
    expected = moe_route_ref(**given, rule=rule)
    x_T_D = given["x_T_D"]
    if expected.inv_rms_T is not None:
        assert result.inv_rms_T is not None
        assert_matches(result.inv_rms_T, expected.inv_rms_T)
        x_T_D = x_T_D.double() * expected.inv_rms_T[:, None]
    logit_T_A = logits_ref(x_T_D, given.get("w_gate_A_D"), given.get("logit_bias_A"), torch.float64)
    score_T_E = scores_ref(logit_T_A[:, : expected.num_experts], rule.scoring)
    choice_T_E = choice_ref(score_T_E, given.get("bias_E"), rule)
    assert_chosen(result.expert_T_K, expected.expert_T_K, choice_T_E)
    # Weighed by the experts that were chosen: a near tie is not an error of the weights.
    ours, theirs = result.expert_T_K.sort(1), expected.expert_T_K.sort(1)
    same_T = (ours.values == theirs.values).all(1)
    weight = result.weight_T_K.gather(1, ours.indices)[same_T]
    assert_matches(weight, expected.weight_T_K.gather(1, theirs.indices)[same_T])
    assert_matches(result.shared_weight_T_Z[same_T], expected.shared_weight_T_Z[same_T])
    assert same_T.sum() >= 0.9 * len(same_T), f"{int((~same_T).sum())} of {len(same_T)} differ"


def assert_chosen(expert_T_K: Tensor, expected_T_K: Tensor, choice_T_E: Tensor) -> None:
    """Fail unless each id is the expected one or nearly ties with it; ids of a row are distinct."""
    assert expert_T_K.dtype == torch.int32 and expert_T_K.shape == expected_T_K.shape
    ordered_T_K = expert_T_K.sort(1).values
    assert bool((ordered_T_K.diff(dim=1) > 0).all()), "an expert is chosen twice"
    choice_T_K = choice_T_E.gather(1, expert_T_K.long())
    apart_T_K = (choice_T_K - choice_T_E.gather(1, expected_T_K.long())).abs()
    wrong_T_K = (expert_T_K != expected_T_K) & ~(apart_T_K <= NEAR_TIE)
    assert not wrong_T_K.any(), f"wrong experts at {wrong_T_K.nonzero()[:4].tolist()}"


DEEPSEEK = {"scoring": "sigmoid", "groups": (8, 4), "scale": 2.5}
EDGE = [
    Case(0, 32, 8, 2, 2),  # no tokens
    Case(1, 32, 8, 2, 2),  # one token
    Case(5, 77, 13, 3, 1),  # odd widths
    Case(4, 32, 8, 2, 0),  # no shared experts
    Case(4, 32, 6, 6, 2),  # every expert is chosen
    Case(3, 32, 1, 1, 0),  # one expert: its weight is the scale
    Case(9, 64, 8, 1, 2),  # one past a block of rows
    Case(3, 77, 1, 1, scoring="softmax", bias=False),  # one expert of weight 1
    Case(17, 600, 60, 4, scoring="softmax", bias=False),  # two splits, the second not full
    Case(21, 96, 60, 7, scoring="sigmoid", groups=(5, 2), scale=1.5),  # groups of 12
    Case(6, 32, 12, 2, scoring="softmax", bias=False, groups=(3, 1), renormalize=False),
    Case(9, 600, 8, 2, 2, late_norm=True),  # two groups and two splits of squares, not full
    Case(20, 77, 12, 3, scoring="softmax", logit_bias=True, late_norm=True),
    Case(10, 0, 9, 5, scoring="sqrtsoftplus", num_shared=3),  # ready logits
    Case(11, 0, 10, 4, scoring="sigmoid", bias=False, renormalize=False, logit_bias=True),
    Case(12, 0, 12, 3, 2, dtype=torch.bfloat16),  # ready logits, shared ones among them
]
MODEL = [
    Case(23, 128, 8, 2, 2),  # tiny
    Case(32, 4096, 256, 6, 2),  # inkling-small
    Case(17, 4096, 256, 6, 2, late_norm=True),  # inkling-small as its layers call it
    Case(7, 4096, 8, 2, scoring="softmax", bias=False, scale=1.0),  # Mixtral
    Case(7, 2048, 128, 8, scoring="softmax", bias=False, scale=1.0),  # Qwen3-MoE
    Case(40, 2048, 512, 10, scoring="softmax", bias=False, scale=1.0),  # Qwen3-Next
    Case(7, 2880, 128, 4, scoring="softmax", bias=False, logit_bias=True, scale=1.0),  # gpt-oss
    Case(9, 7168, 256, 8, **DEEPSEEK),  # DeepSeek-V3
    Case(9, 2048, 384, 8, scoring="sigmoid", scale=2.827),  # Kimi K2
]
BENCH = [
    *(Case(t, 4096, 256, 6, 2, dtype=torch.bfloat16) for t in (1, 8, 16, 32, 64, 256, 1024)),
    *(
        Case(t, 4096, 256, 6, 2, dtype=torch.bfloat16, late_norm=True)
        for t in (1, 8, 16, 32, 40, 64, 256)
    ),
    *(Case(t, 7168, 256, 8, dtype=torch.bfloat16, **DEEPSEEK) for t in (1, 8, 64, 1024)),
]
