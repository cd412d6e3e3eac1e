"""expert_mlp: check, choose, launch."""

# Dimension key: T tokens, D model width, E routed experts, Z shared experts, K experts chosen per
# token, G experts of all devices together, B bytes.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._dims import Dims
from ..._numbers import check_flag
from ..._registry import is_same, refuse_grad, register_op
from ..._routing import Blocking, Routing, Schedule, check_schedule
from ...moe_weights import MoEWeights
from ...precision import ACTIVATIONS as DTYPES
from ...quant import FORMATS, PackedExperts
from .configs import ACTIVATIONS, kernel_why_not, quantized_why_not, workspace_of
from .reference import fused_moe_ref

Flat = list[Tensor | None]


def flatten(weights: MoEWeights | None) -> tuple[Flat, list[str], list[int]]:
    """Tensors, names and sizes of weights without their shared experts, as an op's schema takes
    them; nothing for None. `unflatten` is the inverse."""
    if weights is None:
        return [], [], []
    tensors: Flat = []
    for side in (weights.w13, weights.w2):
        tensors += [side.data, side.scale, side.zero, side.outer_E]
    tensors += [weights.bias13_E_J, weights.bias2_E_D]
    names = [weights.w13.format.name, weights.w2.format.name, weights.order]
    return tensors, names, [weights.width, weights.expert_width, weights.parts]


def unflatten(
    tensors: Flat, names: list[str], sizes: list[int], shared: MoEWeights | None = None
) -> MoEWeights | None:
    if not tensors:
        return None
    width, hidden, parts = sizes

    def side(at: int, format: str, rows: int, columns: int) -> PackedExperts:
        data, scale, zero, outer = tensors[at : at + 4]
        assert data is not None
        return PackedExperts(FORMATS[format], data, scale, zero, outer, rows, columns, None)

    return MoEWeights(
        side(0, names[0], 2 * hidden // parts, width),
        side(4, names[1], width // parts, hidden),
        names[2],
        tensors[8],
        tensors[9],
        shared,
        parts,
    )


class Call(NamedTuple):
    """The arguments of the registered op, in its schema's order."""

    x: Tensor
    routed: Flat
    names: list[str]
    sizes: list[int]
    shared: Flat
    shared_names: list[str]
    shared_sizes: list[int]
    expert: Tensor
    weight: Tensor
    shared_weight: Tensor
    inv_rms: Tensor | None
    schedule: Tensor | None
    block_size: int
    num_routed: int
    expert_map: Tensor | None
    activation: str
    quantize_x: bool
    out: Tensor
    workspace: Tensor | None

    def weights(self) -> MoEWeights:
        shared = unflatten(self.shared, self.shared_names, self.shared_sizes)
        weights = unflatten(self.routed, self.names, self.sizes, shared)
        assert weights is not None
        return weights

    def routing(self) -> Routing:
        schedule = None
        if self.schedule is not None:
            blocking = Blocking(self.block_size, scheduled=True)
            num_tokens, top_k = self.expert.shape
            max_blocks = blocking.max_blocks(num_tokens, top_k, self.num_routed)
            schedule = Schedule(self.schedule, blocking, max_blocks)
        given = (self.expert, self.weight, self.shared_weight, self.num_routed)
        return Routing(*given, schedule, inv_rms_T=self.inv_rms)


def _plain(*args: Any) -> None:
    call = Call(*args)
    result = fused_moe_ref(
        call.x, call.weights(), call.expert, call.weight, call.shared_weight,
        inv_rms_T=call.inv_rms, activation=call.activation, quantize_x=call.quantize_x,
        expert_map_G=call.expert_map, dtype=torch.float32,
    )  # fmt: skip
    call.out.copy_(result)


def _kernel(*args: Any) -> None:
    from .launch import launch_expert_mlp

    call = Call(*args)
    weights, workspace = call.weights(), call.workspace
    if workspace is None:
        num_tokens, top_k = call.expert.shape
        size = workspace_bytes(weights, num_tokens, top_k, call.x.dtype)
        workspace = torch.empty(size, dtype=torch.uint8, device=call.x.device)
    launch_expert_mlp(
        call.x, weights, call.routing(), call.expert_map, call.activation, call.quantize_x,
        call.out, workspace,
    )  # fmt: skip


SCHEMA = (
    "(Tensor x, Tensor?[] routed, str[] names, int[] sizes, Tensor?[] shared, "
    "str[] shared_names, int[] shared_sizes, Tensor expert, Tensor weight, Tensor shared_weight, "
    "Tensor? inv_rms, Tensor? schedule, int block_size, int num_routed, Tensor? expert_map, "
    "str activation, bool quantize_x, Tensor(a!) out, Tensor(b!)? workspace) -> ()"
)
_op = register_op(f"expert_mlp{SCHEMA}", plain=_plain, kernel=_kernel)


def fused_moe(
    x: Tensor,
    weights: MoEWeights,
    routing: Routing,
    *,
    activation: str = "silu",
    quantize_x: bool = False,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    expert_map: Tensor | None = None,
) -> Tensor:
    """Each token through its chosen experts and all shared ones, combined by weight: [T, D].

    out[t] = sum over k = 0..K-1, in that order, of weight[t, k] * mlp(expert[t, k], x[t]), then
    the shared experts in order; mlp(e, x) = w2[e] act(w13[e] x + b13[e]) + b2[e]. Ids outside
    0..num_experts-1 are skipped, whatever their weight holds, and an expert without tokens is not
    read. Two launches on CUDA: gate-up with the activation, down with the sum.

    x, out: [T, D], float32, bfloat16 or float16, distinct. weights: of `prepare_moe_weights`; on
    CUDA packed ones (fp8 and 4 bits) take no float16, and a matrix has at most 2^31 - 1 elements.
    routing: of `moe_route`; where it has `inv_rms_T`, x[t] stands for x[t] * inv_rms[t], and the
    sums of gate-up are multiplied by it. activation: "silu", "gelu", "gelu_tanh" (of the gate,
    times the up) or "swiglu_oai" (gpt-oss: both clamped at 7, gate * sigmoid(1.702 gate) *
    (up + 1)). quantize_x: also round the activations of fp8 weights, to e4m3 with one scale per
    token and 128 columns, and multiply in fp8; on CUDA for sm_89 and newer, where 16 divides D and
    F and x begins at a multiple of 16 bytes. expert_map: [G] int32, row of the weights for each of
    G global ids, -1 (or what is none of their rows) for one that lives elsewhere; `routing` then
    holds global ids. workspace: uint8, of `workspace_bytes`, any content, aligned to 64.

    Accumulates in float32 and rounds once, but for the hidden row between the launches, which CUDA
    rounds to x's dtype. Deterministic; row t depends on row t, its ids and weights alone: the same
    bits for every T, position and neighbour. Allocates nothing with `out` and `workspace`; no
    launch but these, no synchronisation. Raises TypeError or ValueError naming the argument.
    """
    dims = _check_input(x, weights, routing, expert_map)
    num_slots = dims["K"] + weights.num_shared
    check_activation(activation)
    check_flag("quantize_x", quantize_x)
    if quantize_x:
        _check_fp8(x, weights)
    if out is None:
        out = torch.empty_like(x)
    else:
        dims.check(out_T_D=out, dtype=x.dtype, device=x.device)
        if is_same(out, x):
            raise ValueError("out: must not be x; rows of x are read until the last launch ends")
    if workspace is not None:
        Dims().check(workspace_B=workspace, dtype=torch.uint8, device=x.device)
        needed = workspace_bytes(weights, dims["T"], dims["K"], x.dtype)
        if workspace.shape[0] < needed or workspace.storage_offset() % 64:
            raise ValueError(
                f"workspace: expected {needed} bytes for {dims['T']} tokens of {num_slots} slots, "
                f"aligned to 64; got {workspace.shape[0]} at offset {workspace.storage_offset()}"
            )
    routed, names, sizes = flatten(weights)
    shared, shared_names, shared_sizes = flatten(weights.shared)
    refuse_grad(x, *routed, *shared, routing.weight_T_K)
    schedule = routing.schedule
    if dims["T"] > 0:
        _op(
            x, routed, names, sizes, shared, shared_names, shared_sizes,
            routing.expert_T_K, routing.weight_T_K, routing.shared_weight_T_Z, routing.inv_rms_T,
            None if schedule is None else schedule.buffer,
            0 if schedule is None else schedule.blocking.size,
            routing.num_experts, expert_map, activation, quantize_x, out, workspace,
        )  # fmt: skip
    return out


def workspace_bytes(weights: MoEWeights, num_tokens: int, top_k: int, dtype: torch.dtype) -> int:
    """Bytes that `fused_moe` needs between its launches; more tokens never need fewer."""
    hidden = weights.expert_width
    if weights.shared is not None:
        hidden = max(hidden, weights.shared.expert_width)
    slots = top_k + weights.num_shared
    return workspace_of(num_tokens, slots, weights.width, hidden, dtype).size


def check_types(weights: MoEWeights, routing: Routing) -> None:
    if not isinstance(weights, MoEWeights):
        raise TypeError(
            f"weights: expected MoEWeights (see prepare_moe_weights), got {type(weights).__name__}"
        )
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected Routing (see moe_route), got {type(routing).__name__}")


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")


def _check_input(
    x: Tensor, weights: MoEWeights, routing: Routing, expert_map: Tensor | None
) -> Dims:
    check_types(weights, routing)
    dims = Dims()
    dims.check(x_T_D=x, dtype=DTYPES)
    if dims["D"] != weights.width:
        raise ValueError(f"x_T_D: D={dims['D']}, but the weights are for D={weights.width}")
    if weights.parts != 1:
        raise ValueError(
            f"weights: hold one of {weights.parts} parts of every expert; see expert_hidden"
        )
    if weights.device != x.device:
        raise ValueError(f"weights: expected device {x.device}, got {weights.device}")
    dims.check(expert_T_K=routing.expert_T_K, dtype=torch.int32, device=x.device)
    dims.check(weight_T_K=routing.weight_T_K, dtype=torch.float32, device=x.device)
    dims = Dims(**dims, Z=weights.num_shared)
    dims.check(shared_weight_T_Z=routing.shared_weight_T_Z, dtype=torch.float32, device=x.device)
    if routing.inv_rms_T is not None:
        dims.check(inv_rms_T=routing.inv_rms_T, dtype=torch.float32, device=x.device)
    if dims["K"] == 0:
        raise ValueError("expert_T_K: expected K of at least 1, got 0")
    sizes = (dims["T"], dims["K"], routing.num_experts)
    check_schedule("routing.schedule", routing.schedule, *sizes, x.device)
    if expert_map is None:
        if routing.num_experts != weights.num_experts:
            raise ValueError(
                f"routing: made for num_experts={routing.num_experts}, but the weights hold "
                f"{weights.num_experts}; give expert_map where they are a part of all experts"
            )
    else:
        Dims(G=routing.num_experts).check(
            expert_map_G=expert_map, dtype=torch.int32, device=x.device
        )
    if x.device.type == "cuda":
        for side in (weights, weights.shared):
            for packed in () if side is None else (side.w13, side.w2):
                reason = kernel_why_not(x.dtype, packed)
                if reason is not None:
                    raise ValueError(f"x_T_D: {reason}")
    return dims


def _check_fp8(x: Tensor, weights: MoEWeights) -> None:
    if weights.device.type == "cuda":
        found = torch.cuda.get_device_capability(weights.device)
        if found < (8, 9):
            raise ValueError(
                f"quantize_x: fp8 products need a GPU of 8.9 or newer, this is {found}"
            )
    for side in (weights, weights.shared):
        for packed in () if side is None else (side.w13, side.w2):
            if not packed.format.name.startswith("fp8"):
                raise ValueError(
                    f"quantize_x: needs fp8 weights, and some are {packed.format.name}"
                )
            reason = quantized_why_not(packed, int(x.storage_offset()) * x.itemsize)
            if reason is not None and x.device.type == "cuda":
                raise ValueError(f"quantize_x: {reason}")
