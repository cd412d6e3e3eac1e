"""flow_head: check, choose, launch."""

# Dimension key: S session rows, D model width, W head width, U inner width of a block's MLP,
# L blocks, B output values (mel bins).

from __future__ import annotations

import torch
from torch import Tensor

from ..._dims import Dims
from ..._numbers import check_count, check_finite
from ..._registry import refuse_grad, register_op
from ...precision import ACTIVATIONS
from .configs import problem_of
from .reference import FlowWeights, flow_head_ref


def _plain(
    cond: Tensor,
    weights: list[Tensor],
    seed: Tensor,
    counter: Tensor,
    num_steps: int,
    guidance: float,
    work: Tensor,
    out: Tensor,
) -> None:
    result = flow_head_ref(
        cond,
        FlowWeights(*weights),
        seed,
        counter,
        num_steps=num_steps,
        guidance=guidance,
        dtype=torch.float32,
    )
    out.copy_(result)


def _kernel(*args) -> None:
    from .launch import launch_flow_head

    launch_flow_head(*args)


_op = register_op(
    "flow_head(Tensor cond, Tensor[] weights, Tensor seed, Tensor counter, int num_steps, "
    "float guidance, Tensor(a!) work, Tensor(b!) out) -> ()",
    plain=_plain,
    kernel=_kernel,
)


def flow_head(
    cond_S_D: Tensor,
    weights: FlowWeights,
    seed_S: Tensor,
    counter_S: Tensor,
    *,
    num_steps: int,
    guidance: float = 1.0,
    out_S_B: Tensor | None = None,
    work: Tensor | None = None,
) -> Tensor:
    """Mel values of one output step per row, by a flow-matching head conditioned on cond.

    x_0 is standard normal noise, Philox-4x32-10 keyed (seed, counter, column); then `num_steps`
    Euler steps x += v(x, t, c) / N from t = 0 to 1. v: c = the projected cond, or `null_W`; e =
    c + MLP(sinusoids of 1000 t, base 10000, cos then sin, SiLU); blocks (shift, scale, gate) =
    Linear(SiLU(e)), h += gate * W2 SiLU(W1 (LN(h) (1 + scale) + shift)); a last modulated norm and
    a projection. LN has no affine part and eps 1e-6. guidance g: v = v_null + g (v_cond - v_null);
    1.0 evaluates the conditioned branch alone. `counter` is how many draws the session made before.

    cond: [S, D], float32, bfloat16 or float16; weights: each float32 or cond's dtype; seed,
    counter: int64. Returns float32 [S, B] (log10 mel), in `out_S_B` when given. float32 throughout:
    on a GPU, bfloat16 weights are multiplied with three bfloat16 parts of each value, whose sum it
    is, others by three tf32 products. Deterministic; row s depends on row s and the weights alone.
    `work`, one axis of float32, is scratch of the kernels, its contents unspecified: on a GPU at
    least `flow_work_size`, on a CPU none. Allocates only outputs and scratch that are not given;
    the first call for a number of steps, width and device also makes the sinusoids, so warm up
    before capturing a graph. Raises TypeError or ValueError naming the argument.

    Source: Lipman et al., "Flow matching for generative modeling", 2023; AdaLN of Peebles and Xie,
    "Scalable diffusion models with transformers", 2023; Ho and Salimans, "Classifier-free diffusion
    guidance", 2022.
    """
    dims = Dims()
    dims.check(cond_S_D=cond_S_D, dtype=ACTIVATIONS)
    device = cond_S_D.device
    if not isinstance(weights, FlowWeights):
        raise TypeError(f"weights: expected FlowWeights, got {type(weights).__name__}")
    allowed = (torch.float32, cond_S_D.dtype)
    for name, tensor in weights._asdict().items():
        dims.check(dtype=allowed, device=device, **{name: tensor})
    if dims["W"] == 0 or dims["W"] % 2:
        raise ValueError(f"cond_W_D: expected an even head width, got W={dims['W']}")
    dims.check(seed_S=seed_S, counter_S=counter_S, dtype=torch.int64, device=device)
    _check_steps(num_steps, guidance)
    if out_S_B is None:
        out_S_B = cond_S_D.new_empty(dims["S"], dims["B"], dtype=torch.float32)
    else:
        dims.check(out_S_B=out_S_B, dtype=torch.float32, device=device)
    work = _scratch(cond_S_D, weights, num_steps, guidance, work)
    refuse_grad(cond_S_D, *weights)
    if out_S_B.numel() > 0:
        _op(cond_S_D, list(weights), seed_S, counter_S, num_steps, guidance, work, out_S_B)
    return out_S_B


def flow_work_size(
    num_rows: int, weights: FlowWeights, *, num_steps: int, guidance: float = 1.0
) -> int:
    """float32 values of scratch that `flow_head` takes on a GPU."""
    check_count("num_rows", num_rows, 0)
    _check_steps(num_steps, guidance)
    return problem_of(num_rows, weights, num_steps, guidance).work_size()


def _check_steps(num_steps: int, guidance: float) -> None:
    check_count("num_steps", num_steps)
    check_finite("guidance", guidance)


def _scratch(
    cond_S_D: Tensor, weights: FlowWeights, num_steps: int, guidance: float, work: Tensor | None
) -> Tensor:
    """The caller's scratch, checked, or new one; the CPU path needs none."""
    size = 0
    if cond_S_D.device.type != "cpu":
        size = flow_work_size(len(cond_S_D), weights, num_steps=num_steps, guidance=guidance)
    if work is None:
        return cond_S_D.new_empty(size, dtype=torch.float32)
    Dims(W=work.numel()).check(work_W=work, dtype=torch.float32, device=cond_S_D.device)
    if work.numel() < size:
        raise ValueError(f"work: expected at least {size} values, got {work.numel()}")
    return work
