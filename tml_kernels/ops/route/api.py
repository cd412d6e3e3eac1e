"""moe_route: check, choose, launch."""

# Dimension key: T tokens, D model width, E routed experts, Z shared experts, A gate rows (E + Z
# with scoring "sink_sigmoid", else E), K experts chosen per token.

from __future__ import annotations

import torch
from torch import Tensor

from ..._numbers import check_eps
from ..._registry import refuse_grad, register_op
from ..._routing import Blocking, Routing, new_parts
from .checks import (
    check_out,
    check_ready,
    check_residual,
    check_scored,
    exactly_one,
    refuse_scoring,
)
from .reference import Rule, moe_route_ref, schedule_ref


def _plain(
    x: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    logit_bias: Tensor | None,
    global_scale: Tensor | None,
    residual: Tensor | None,
    scoring: str,
    renormalize: bool,
    num_groups: int,
    top_groups: int,
    scale: float,
    eps: float,
    block_size: int,
    max_blocks: int,
    expert: Tensor,
    weight: Tensor,
    shared_weight: Tensor,
    inv_rms: Tensor | None,
    schedule: Tensor | None,
    scratch: Tensor | None,
) -> None:
    result = moe_route_ref(
        x,
        gate,
        top_k=expert.shape[1],
        num_shared=shared_weight.shape[1],
        bias_E=bias,
        logit_bias_A=logit_bias,
        global_scale_1=global_scale,
        residual_T_D=residual,
        eps=eps,
        rule=Rule(scoring, renormalize, num_groups, top_groups, scale),
        dtype=torch.float32,
    )
    expert.copy_(result.expert_T_K)
    weight.copy_(result.weight_T_K)
    shared_weight.copy_(result.shared_weight_T_Z)
    if inv_rms is not None and result.inv_rms_T is not None:
        inv_rms.copy_(result.inv_rms_T)
    if schedule is not None:
        _plain_schedule(expert, result.num_experts, block_size, max_blocks, schedule, scratch)


def _plain_schedule(
    expert: Tensor,
    num_experts: int,
    block_size: int,
    max_blocks: int,
    schedule: Tensor,
    scratch: Tensor | None,
) -> None:
    made = schedule_ref(expert, num_experts, Blocking(block_size, scheduled=True))
    assert made.max_blocks == max_blocks
    schedule.copy_(made.buffer)


def _kernel(*args) -> None:
    from .kernel import launch_route

    launch_route(*args)


def _schedule_kernel(*args) -> None:
    from .kernel import launch_route_schedule

    launch_route_schedule(*args)


_op = register_op(
    "route(Tensor x, Tensor? gate, Tensor? bias, Tensor? logit_bias, Tensor? global_scale, "
    "Tensor? residual, str scoring, bool renormalize, int num_groups, int top_groups, float scale, "
    "float eps, int block_size, int max_blocks, Tensor(a!) expert, Tensor(b!) weight, "
    "Tensor(c!) shared_weight, Tensor(d!)? inv_rms, Tensor(e!)? schedule, Tensor(f!)? scratch) "
    "-> ()",
    plain=_plain,
    kernel=_kernel,
)
_schedule_op = register_op(
    "route_schedule(Tensor expert, int num_experts, int block_size, int max_blocks, "
    "Tensor(a!) schedule, Tensor(b!)? scratch) -> ()",
    plain=_plain_schedule,
    kernel=_schedule_kernel,
)


def moe_route(
    x_T_D: Tensor | None = None,
    w_gate_A_D: Tensor | None = None,
    *,
    top_k: int | None = None,
    scoring: str = "softmax",
    bias_E: Tensor | None = None,
    logit_bias_A: Tensor | None = None,
    renormalize: bool = True,
    num_groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    global_scale_1: Tensor | None = None,
    num_shared: int = 0,
    residual_T_D: Tensor | None = None,
    eps: float = 1e-6,
    logits_T_A: Tensor | None = None,
    expert_T_K: Tensor | None = None,
    weight_T_K: Tensor | None = None,
    shared_weight_T_Z: Tensor | None = None,
    num_experts: int | None = None,
    out: Routing | None = None,
) -> Routing:
    """Choose each token's experts, weigh them, and put the work of a step in order.

    Takes one of three inputs. Tokens and a gate: x [T, D], float32, bfloat16 or float16, and
    w_gate [A, D], float32 or x's dtype. Ready logits: [T, A], the same dtypes. Ready ids, int32 or
    int64 [T, K], with float32 weights [T, K] and perhaps [T, Z], and `num_experts`: nothing is
    scored, ids outside 0..E-1 are skipped, and without `out` int32 ids and weights are used as they
    are, not copied. A = E, and E + num_shared for "sink_sigmoid".

    Logits l = x W^T + logit_bias. Scores: "softmax" over the experts; "sigmoid";
    "sqrtsoftplus", sqrt(log(1 + exp(l))); "sink_sigmoid", a sigmoid of the first E. The `top_k`
    largest of score + bias are chosen, ties to the lowest id, in descending order; the bias chooses
    and does not weigh. With num_groups > 1, only from the `top_groups` best of so many equal runs
    of experts: a group is as good as its best expert, or with a bias as its two best together.
    Weights are the scores of the chosen, over their sum + 1e-20 if `renormalize`, times
    scale * global_scale; those of shared experts are 1. With "sink_sigmoid" they are a softmax over
    log-sigmoids of the chosen and the `num_shared` last logits together, times the same.

    With `residual_T_D`, of x's shape and dtype, x is what `short_conv` gives with `late_norm`: x[t]
    over the root mean square of residual[t] (with eps) is routed, and `inv_rms_T` of the result
    tells `fused_moe` the same.

    bias [E], logit_bias [A], global_scale [1]: float32. Returns a `Routing`, written into `out` if
    given: then nothing is allocated and nothing synchronises. float32 throughout. Deterministic;
    row t has the same bits for every number of tokens and every place among them. A row with NaN
    gets valid distinct ids and NaN weights. On CUDA one launch makes all of it, the schedule too,
    after one that clears counters where `out` is made here; ready ids are copied into `out`
    (int64 ones through a temporary).

    Raises TypeError or ValueError naming the argument. NaN in ready weights, at a valid id, is a
    ValueError on the CPU; elsewhere looking for it would synchronise.

    Sources: `grouped_topk` of vLLM; DeepSeek-V3's, gpt-oss's and Inkling's routers of transformers
    5.17.
    """
    check_eps(eps)
    scored = exactly_one(x_T_D, w_gate_A_D, logits_T_A, expert_T_K, weight_T_K)
    rule = Rule(scoring, renormalize, num_groups, top_groups, scale)
    tensors = {"bias_E": bias_E, "logit_bias_A": logit_bias_A, "global_scale_1": global_scale_1}
    if not scored:
        given = {"top_k": top_k, "num_shared": num_shared or None, "residual_T_D": residual_T_D}
        refuse_scoring(rule, given | tensors)
        assert expert_T_K is not None and weight_T_K is not None
        return _route_ready(expert_T_K, weight_T_K, shared_weight_T_Z, num_experts, out)
    if shared_weight_T_Z is not None:
        raise ValueError("shared_weight_T_Z: goes with expert_T_K and weight_T_K alone")
    source = x_T_D if logits_T_A is None else logits_T_A
    assert source is not None
    dims = check_scored(source, w_gate_A_D, top_k, num_shared, num_experts, rule)
    for name, tensor in tensors.items():
        if tensor is not None:
            dims.check(dtype=torch.float32, device=source.device, contiguous=True, **{name: tensor})
    check_residual(dims, residual_T_D, source)
    late_norm = residual_T_D is not None
    if out is None:
        sizes = (dims["T"], dims["K"], dims["Z"], dims["E"])
        width = dims.get("D", 0)
        out = Routing.empty(*sizes, source.device, width=width, late_norm=late_norm)
    else:
        check_out(out, dims, source.device, late_norm=late_norm)
    refuse_grad(source, w_gate_A_D, residual_T_D, *tensors.values())
    if dims["T"] > 0:
        _op(
            source, w_gate_A_D, bias_E, logit_bias_A, global_scale_1, residual_T_D,
            scoring, renormalize, num_groups, top_groups, scale, eps, *_blocks(out),
            out.expert_T_K, out.weight_T_K, out.shared_weight_T_Z, out.inv_rms_T,
            out.schedule and out.schedule.buffer, out.scratch,
        )  # fmt: skip
    return out


def _route_ready(
    expert: Tensor,
    weight: Tensor,
    shared_weight: Tensor | None,
    num_experts: int | None,
    out: Routing | None,
) -> Routing:
    dims = check_ready(expert, weight, shared_weight, num_experts)
    if shared_weight is None:
        shared_weight = weight.new_empty(dims["T"], 0)
    refuse_grad(weight, shared_weight)
    # Clamped, so that no 64-bit id wraps around to a valid one.
    ids = expert if expert.dtype == torch.int32 else expert.clamp(-1, dims["E"]).int()
    if out is None:
        sizes = (dims["T"], dims["K"], dims["Z"], dims["E"])
        out = Routing(ids, weight, shared_weight, dims["E"], *new_parts(*sizes, expert.device))
    else:
        check_out(out, dims, expert.device)
        out.expert_T_K.copy_(ids)
        out.weight_T_K.copy_(weight)
        out.shared_weight_T_Z.copy_(shared_weight)
    if dims["T"] > 0 and out.schedule is not None:
        size, max_blocks = _blocks(out)
        _schedule_op(out.expert_T_K, dims["E"], size, max_blocks, out.schedule.buffer, out.scratch)
    return out


def _blocks(out: Routing) -> tuple[int, int]:
    """Block size and the most blocks; zeros without a schedule."""
    schedule = out.schedule
    return (0, 0) if schedule is None else (schedule.blocking.size, schedule.max_blocks)
