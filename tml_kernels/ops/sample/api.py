"""sample: check, choose, launch."""

# Dimension key: S session rows, V vocabulary, N biases of a row, W words of 32 ids, M words of
# scratch.

from __future__ import annotations

import torch
from torch import Tensor

from ..._dims import Dims
from ..._numbers import check_int
from ..._registry import refuse_grad, register_op
from .configs import scratch_words
from .reference import sample_ref


def _plain(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    counter: Tensor,
    min_p: Tensor | None,
    bias_id: Tensor | None,
    bias: Tensor | None,
    seen: Tensor | None,
    penalty: Tensor | None,
    fallback: int,
    out: Tensor,
    fault: Tensor,
    scratch: Tensor | None,
) -> None:
    _check_range("temperature_S", temperature, 0.0, torch.finfo(torch.float32).max)
    _check_range("top_k_S", top_k, 0, torch.iinfo(torch.int32).max)
    _check_range("top_p_S", top_p, 0.0, 1.0)
    largest = torch.finfo(torch.float32).max
    if min_p is not None:
        _check_range("min_p_S", min_p, 0.0, 1.0)
    if bias_id is not None and bias is not None:
        _check_range("bias_id_S_N", bias_id.flatten(), -1, logits.shape[1] - 1)
        _check_range("bias_S_N", bias.flatten(), float("-inf"), largest)
    if penalty is not None:
        _check_range("penalty_S", penalty, torch.finfo(torch.float32).tiny, largest)
    token, is_fault = sample_ref(
        logits,
        temperature,
        top_k,
        top_p,
        seed,
        counter,
        fallback=fallback,
        min_p_S=min_p,
        bias_id_S_N=bias_id,
        bias_S_N=bias,
        seen_S_W=seen,
        penalty_S=penalty,
        dtype=torch.float32,
    )
    out.copy_(token)
    fault.copy_(is_fault)


def _check_range(name: str, values: Tensor, low: float, high: float) -> None:
    """Raise ValueError unless every value is in low..high; NaN is not."""
    for value in values.tolist():
        if not low <= value <= high:
            raise ValueError(f"{name}: expected values in {low}..{high}, got {value}")


def _kernel(*args) -> None:
    from .kernel import launch_sample

    launch_sample(*args)


_op = register_op(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor seed, "
    "Tensor counter, Tensor? min_p, Tensor? bias_id, Tensor? bias, Tensor? seen, "
    "Tensor? penalty, int fallback, Tensor(a!) out, Tensor(b!) fault, Tensor(c!)? scratch) -> ()",
    plain=_plain,
    kernel=_kernel,
)


def sample(
    logits_S_V: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    seed_S: Tensor,
    counter_S: Tensor,
    *,
    fallback: int,
    min_p_S: Tensor | None = None,
    bias_id_S_N: Tensor | None = None,
    bias_S_N: Tensor | None = None,
    seen_S_W: Tensor | None = None,
    penalty_S: Tensor | None = None,
    out_S: Tensor | None = None,
    fault_S: Tensor | None = None,
    scratch_M: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row: bias, repetition penalty, temperature, top-k, top-p, min-p, in this
    order, then an exact draw.

    Temperature 0 takes the largest logit, ties to the lowest id. Else the token is the arg max of
    logit / temperature + Gumbel noise over what top-k (0: off; ties at the edge keep the lowest
    ids), top-p (1: off; the shortest prefix by descending probability that reaches p of the top-k's
    mass) and min-p (of that, at least min_p times the best one's probability) keep, which draws
    from their renormalised softmax. Noise is Philox-4x32-10 keyed
    (seed, counter, column): a draw does not depend on the row, the batch or the device's generator;
    count `counter` up by one per draw.

    bias, float32 [S, N], is added to the logits of bias_id, int32 [S, N] with -1 where unused; -inf
    forbids a token, and an id that comes twice gets both. Of seen ids, logits are divided by
    penalty, float32 [S], where positive and multiplied by it else; bit v % 32 of word v // 32 of
    seen, int32 [S, W] with W = ceil(V / 32), says so of id v. Both act on greedy rows too.

    A row with a NaN, or with nothing but -inf, gives `fallback` and fault = True; the others are
    untouched. Logits of +inf share the draw between them.

    logits: float32 [S, V]; temperature, top_p, min_p: float32; top_k: int32; seed, counter: int64.
    Returns (token int32 [S], fault bool [S]), written into `out_S` and `fault_S` when given.
    float32, the top-p mass summed in float64. Deterministic. On CUDA one launch, for V up to 2^20.
    scratch: int32, `configs.scratch_words(S, V)` or more, zeros at first, for one call after
    another of this S and V; without it some is made, with one more launch that clears it.

    Raises TypeError or ValueError naming the argument; on the plain path also for temperature < 0,
    top_k < 0, top_p or min_p outside 0..1, ids outside -1..V - 1, a bias of +inf or NaN, and a
    penalty that is not positive and finite. The kernel takes the first two as 0, a larger top_p as
    1, a larger min_p as 1, such ids as unused, and a row that gets a NaN is a fault.

    A kernel's draw can differ from the oracle's where the two best scores, or the mass before a
    token and p, are within about 1e-6 of each other, relative.

    Sources: Maddison, Tarlow, Minka, "A* sampling", 2014 (the Gumbel-max trick); Keskar et al.,
    "CTRL", 2019, section 4.1 (the penalty, in the form that transformers' logits processors give
    it; the order is theirs too); Nguyen et al., "Turning up the heat: min-p sampling", 2024.
    """
    dims = Dims()
    dims.check(logits_S_V=logits_S_V, dtype=torch.float32)
    device = logits_S_V.device
    dims.check(temperature_S=temperature_S, top_p_S=top_p_S, dtype=torch.float32, device=device)
    dims.check(top_k_S=top_k_S, dtype=torch.int32, device=device)
    dims.check(seed_S=seed_S, counter_S=counter_S, dtype=torch.int64, device=device)
    _check_options(
        dims, device, min_p_S=min_p_S, bias_id_S_N=bias_id_S_N, bias_S_N=bias_S_N,
        seen_S_W=seen_S_W, penalty_S=penalty_S,
    )  # fmt: skip
    check_int("fallback", fallback)
    if not 0 <= fallback < dims["V"]:
        raise ValueError(f"fallback: expected a token in 0..{dims['V'] - 1}, got {fallback}")
    if out_S is None:
        out_S = logits_S_V.new_empty(dims["S"], dtype=torch.int32)
    else:
        dims.check(out_S=out_S, dtype=torch.int32, device=device)
    if fault_S is None:
        fault_S = logits_S_V.new_empty(dims["S"], dtype=torch.bool)
    else:
        dims.check(fault_S=fault_S, dtype=torch.bool, device=device)
    if scratch_M is not None:
        needed = scratch_words(dims["S"], dims["V"])
        dims.check(scratch_M=scratch_M, dtype=torch.int32, device=device)
        if dims["M"] < needed:
            raise ValueError(f"scratch_M: {needed} words are needed, got M={dims['M']}")
    refuse_grad(logits_S_V)
    if dims["S"] > 0:
        _op(
            logits_S_V, temperature_S, top_k_S, top_p_S, seed_S, counter_S,
            min_p_S, bias_id_S_N, bias_S_N, seen_S_W, penalty_S,
            fallback, out_S, fault_S, scratch_M,
        )  # fmt: skip
    return out_S, fault_S


def _check_options(dims: Dims, device: torch.device, **options: Tensor | None) -> None:
    """ValueError or TypeError unless they come in pairs, with the shapes of the docstring."""
    for pair in (("bias_id_S_N", "bias_S_N"), ("seen_S_W", "penalty_S")):
        given, missing = sorted(pair, key=lambda name: options[name] is None)
        if options[given] is not None and options[missing] is None:
            raise ValueError(f"{missing}: goes with {given}, got None")
    for name, tensor in options.items():
        if tensor is not None:
            dtype = torch.int32 if name in ("bias_id_S_N", "seen_S_W") else torch.float32
            dims.check(dtype=dtype, device=device, contiguous=True, **{name: tensor})
    words = -(-dims["V"] // 32)
    if dims.get("W", words) != words:
        raise ValueError(f"seen_S_W: V={dims['V']} takes {words} words, got W={dims['W']}")
