"""What moe_route refuses, and with which words."""

# Dimension key: T tokens, D model width, E routed experts, Z shared experts, A gate rows, K experts
# chosen per token.

from __future__ import annotations

import torch
from torch import Tensor

from ..._dims import Dims
from ..._numbers import check_count, check_finite, check_flag, check_int
from ..._routing import Routing, check_schedule, check_words, choose_blocking, scratch_sizes
from ...precision import ACTIVATIONS
from .configs import MAX_EXPERTS
from .reference import SCORINGS, Rule

MAX_GROUPS = 256  # a token's groups are compared in pairs, all at once


def exactly_one(
    x: Tensor | None,
    gate: Tensor | None,
    logits: Tensor | None,
    expert: Tensor | None,
    weight: Tensor | None,
) -> bool:
    """Whether there is something to score; ValueError unless exactly one input is whole."""
    pairs = {
        ("x_T_D", "w_gate_A_D"): (x, gate),
        ("logits_T_A",): (logits,),
        ("expert_T_K", "weight_T_K"): (expert, weight),
    }
    given = [names for names, pair in pairs.items() if any(tensor is not None for tensor in pair)]
    if len(given) != 1:
        named = " and ".join(name for names in given for name in names) or "none"
        raise ValueError(
            "moe_route takes exactly one of (x_T_D, w_gate_A_D), logits_T_A and "
            f"(expert_T_K, weight_T_K); got {named}"
        )
    for name, tensor in zip(given[0], pairs[given[0]], strict=True):
        if tensor is None:
            other = next(n for n in given[0] if n != name)
            raise ValueError(f"{name}: needed with {other}, got None")
    return expert is None


def refuse_scoring(rule: Rule, given: dict) -> None:
    default = Rule()
    changed = {
        name: value for name, value in vars(rule).items() if value != getattr(default, name)
    } | {name: value for name, value in given.items() if value is not None}
    for name, value in changed.items():
        shown = "a tensor" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name}: {shown} does not go with ready ids, which nothing scores")


def check_scored(
    source: Tensor,
    gate: Tensor | None,
    top_k: int | None,
    num_shared: int,
    num_experts: int | None,
    rule: Rule,
) -> Dims:
    """Sizes of everything: T, A, E, K, Z, and D where there is a gate."""
    dims, rows = Dims(), "logits_T_A" if gate is None else "w_gate_A_D"
    if gate is None:
        dims.check(logits_T_A=source, dtype=ACTIVATIONS)
    else:
        dims.check(x_T_D=source, dtype=ACTIVATIONS)
        dtypes = (torch.float32, source.dtype)
        dims.check(w_gate_A_D=gate, dtype=dtypes, device=source.device)
        if dims["D"] == 0:
            raise ValueError("w_gate_A_D: has no columns, so there is nothing to score")
    if rule.scoring not in SCORINGS:
        raise ValueError(f"scoring: expected one of {', '.join(SCORINGS)}, got {rule.scoring!r}")
    check_flag("renormalize", rule.renormalize)
    check_finite("scale", rule.scale)
    check_count("num_shared", num_shared, 0, None)
    experts = rule.num_experts(dims["A"], num_shared)
    if num_experts is not None:
        check_int("num_experts", num_experts)
    if num_experts is not None and num_experts != experts:
        raise ValueError(f"num_experts: {rows} has {experts} experts, got {num_experts}")
    if not 0 < experts <= MAX_EXPERTS:
        raise ValueError(f"{rows}: expected 1..{MAX_EXPERTS} experts, got {experts}")
    if rule.scoring == "sink_sigmoid" and rule.renormalize is not True:
        raise ValueError(f"renormalize: sink_sigmoid always does, got {rule.renormalize!r}")
    check_count("num_groups", rule.num_groups, 1, MAX_GROUPS)
    if experts % rule.num_groups:
        raise ValueError(f"num_groups: {rule.num_groups} do not divide {experts} experts")
    check_count("top_groups", rule.top_groups, 1, rule.num_groups)
    eligible = experts // rule.num_groups * rule.top_groups
    top_k = check_count("top_k", top_k, 1, eligible, f" of {experts} experts")
    return Dims(**dims, E=experts, K=top_k, Z=num_shared)


def check_residual(dims: Dims, residual: Tensor | None, source: Tensor) -> None:
    """Of x, whose norm is divided by here."""
    if residual is None:
        return
    if "D" not in dims:
        raise ValueError("residual_T_D: goes with x_T_D and w_gate_A_D alone")
    dims.check(residual_T_D=residual, dtype=source.dtype, device=source.device, contiguous=True)


def check_ready(
    expert: Tensor, weight: Tensor, shared_weight: Tensor | None, num_experts: int | None
) -> Dims:
    """Sizes T, K, Z and E; on the CPU also that no weight in use is NaN."""
    dims = Dims()
    dims.check(expert_T_K=expert, dtype=(torch.int32, torch.int64))
    device = expert.device
    dims.check(weight_T_K=weight, dtype=torch.float32, device=device)
    if shared_weight is None:
        dims = Dims(**dims, Z=0)
    else:
        dims.check(shared_weight_T_Z=shared_weight, dtype=torch.float32, device=device)
    if dims["K"] == 0:
        raise ValueError(f"expert_T_K: needs at least one column; shape {tuple(expert.shape)}")
    dims = Dims(**dims, E=check_count("num_experts", num_experts, 1, MAX_EXPERTS))
    if device.type == "cpu":
        _refuse_nan("weight_T_K", weight, (expert >= 0) & (expert < dims["E"]))
        if shared_weight is not None:
            _refuse_nan("shared_weight_T_Z", shared_weight, None)
    return dims


def _refuse_nan(name: str, weight: Tensor, used: Tensor | None) -> None:
    bad = weight.isnan() if used is None else weight.isnan() & used
    if bad.any():
        raise ValueError(f"{name}: NaN at {bad.nonzero()[0].tolist()}")


def check_out(out: Routing, dims: Dims, device: torch.device, *, late_norm: bool = False) -> None:
    """That `out` has these sizes, `inv_rms_T` exactly with `late_norm`, and on CUDA the schedule
    and scratch that the kernel writes."""
    if not isinstance(out, Routing):
        raise TypeError(f"out: expected a Routing, got {type(out).__name__}")
    if out.num_experts != dims["E"]:
        raise ValueError(f"out.num_experts: expected {dims['E']}, got {out.num_experts}")
    dims.check(expert_T_K=out.expert_T_K, dtype=torch.int32, device=device)
    dims.check(weight_T_K=out.weight_T_K, dtype=torch.float32, device=device)
    dims.check(shared_weight_T_Z=out.shared_weight_T_Z, dtype=torch.float32, device=device)
    if (out.inv_rms_T is not None) != late_norm:
        wanted = "needed with residual_T_D" if late_norm else "given without residual_T_D"
        raise ValueError(f"out.inv_rms_T: {wanted}; see Routing.empty")
    if out.inv_rms_T is not None:
        dims.check(inv_rms_T=out.inv_rms_T, dtype=torch.float32, device=device)
    tokens, top_k, experts = dims["T"], dims["K"], dims["E"]
    check_schedule("out.schedule", out.schedule, tokens, top_k, experts, device)
    needed = device.type == "cuda" and choose_blocking(tokens, top_k, experts).scheduled
    if out.schedule is None and needed:
        raise ValueError(f"out.schedule: needed for {tokens} tokens; see Routing.empty")
    if out.scratch is not None:
        width, logits = dims.get("D", 0), dims.get("A", 0)
        words = sum(scratch_sizes(tokens, top_k, logits, experts, width))
        check_words("out.scratch", out.scratch, words, device)
    elif device.type == "cuda":
        raise ValueError("out.scratch: needed on CUDA; see Routing.empty")
