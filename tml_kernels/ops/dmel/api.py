"""dmel, dmel_levels and dmel_embed: check, choose, launch."""

# Dimension key: S session rows, W samples of this call, N state slots, L samples of tail,
# F frames, B bands, Q frequency bins, V = B * levels rows of the table, T tokens, D model width.

from __future__ import annotations

import torch
from torch import Tensor

from ..._dims import Dims
from ..._numbers import check_count, check_eps
from ..._ragged import check_slots
from ..._registry import refuse_grad, register_op
from ...precision import ACTIVATIONS
from .configs import MAX_WIDTH
from .reference import dmel_embed_ref, dmel_levels_ref
from .spec import DMEL_20HZ, DmelSpec


def _plain_levels(
    pcm: Tensor, tail: Tensor, slot: Tensor, spec: list[float], work: Tensor, levels: Tensor
) -> None:
    if slot.device.type == "cpu":  # elsewhere reading the values would synchronise
        check_slots(slot, tail.shape[0])
    new_levels, new_tail = dmel_levels_ref(pcm, tail, slot, DmelSpec.unpack(spec))
    levels.copy_(new_levels)
    tail.copy_(new_tail)


def _plain_embed(
    levels: Tensor, table: Tensor, norm_weight: Tensor, num_levels: int, eps: float, out: Tensor
) -> None:
    if levels.device.type == "cpu" and int(levels.max()) >= num_levels:
        raise ValueError(f"levels_T_B: {int(levels.max())} is not below {num_levels=}")
    out.copy_(
        dmel_embed_ref(
            levels, table, norm_weight, num_levels=num_levels, eps=eps, dtype=torch.float32
        )
    )


def _plain(
    pcm: Tensor,
    tail: Tensor,
    slot: Tensor,
    table: Tensor,
    norm_weight: Tensor,
    spec: list[float],
    eps: float,
    work: Tensor,
    levels: Tensor,
    out: Tensor,
) -> None:
    _plain_levels(pcm, tail, slot, spec, work, levels)
    num_levels = DmelSpec.unpack(spec).num_levels
    rows = out.view(-1, out.shape[-1])
    _plain_embed(levels.flatten(0, 1), table, norm_weight, num_levels, eps, rows)
    out[slot < 0] = 0


def _kernel_levels(*args) -> None:
    from .kernel import launch_dmel_levels

    launch_dmel_levels(*args)


def _kernel_embed(*args) -> None:
    from .kernel import launch_dmel_embed

    launch_dmel_embed(*args)


def _kernel(*args) -> None:
    from .kernel import launch_dmel

    launch_dmel(*args)


_levels_op = register_op(
    "dmel_levels(Tensor pcm, Tensor(a!) tail, Tensor slot, float[] spec, Tensor(b!) work, "
    "Tensor(c!) levels) -> ()",
    plain=_plain_levels,
    kernel=_kernel_levels,
)
_embed_op = register_op(
    "dmel_embed(Tensor levels, Tensor table, Tensor norm_weight, int num_levels, float eps, "
    "Tensor(a!) out) -> ()",
    plain=_plain_embed,
    kernel=_kernel_embed,
)
_op = register_op(
    "dmel(Tensor pcm, Tensor(a!) tail, Tensor slot, Tensor table, Tensor norm_weight, "
    "float[] spec, float eps, Tensor(b!) work, Tensor(c!) levels, Tensor(d!) out) -> ()",
    plain=_plain,
    kernel=_kernel,
)


def dmel(
    pcm_S_W: Tensor,
    tail_N_L: Tensor,
    slot_S: Tensor,
    table_V_D: Tensor,
    norm_weight_D: Tensor,
    *,
    spec: DmelSpec = DMEL_20HZ,
    eps: float = 1e-6,
    out_S_F_D: Tensor | None = None,
    levels_S_F_B: Tensor | None = None,
    work_S_F_Q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(tokens_S_F_D, levels_S_F_B): each hop of sound as its mel levels and their embedding.

    `dmel_levels` followed by `dmel_embed` (both in this module), in two launches, with their
    promises; tokens of idle rows are zero.

    pcm: [S, F * hop] and tail: [N, fft - hop], float32, the tail updated in place; slot: int32 [S],
    -1 idle; table: [B * num_levels, D], float32, bfloat16 or float16; norm_weight: [D], float32 or
    the table's dtype. Tokens: [S, F, D] of the table's dtype; levels: uint8 [S, F, B].
    Deterministic. Raises TypeError or ValueError naming the argument.
    """
    dims = _check_sound(pcm_S_W, tail_N_L, slot_S, spec)
    check_eps(eps)
    _check_table(dims, table_V_D, norm_weight_D, spec.num_bands, spec.num_levels, pcm_S_W.device)
    levels_S_F_B, work_S_F_Q = _buffers(dims, pcm_S_W, levels_S_F_B, work_S_F_Q)
    if out_S_F_D is None:
        out_S_F_D = table_V_D.new_empty(dims["S"], dims["F"], dims["D"])
    else:
        dims.check(out_S_F_D=out_S_F_D, dtype=table_V_D.dtype, device=pcm_S_W.device)
    refuse_grad(pcm_S_W, tail_N_L, table_V_D, norm_weight_D)
    if levels_S_F_B.numel() > 0:
        _op(
            pcm_S_W, tail_N_L, slot_S, table_V_D, norm_weight_D,
            spec.pack(), eps, work_S_F_Q, levels_S_F_B, out_S_F_D,
        )  # fmt: skip
    return out_S_F_D, levels_S_F_B


def dmel_levels(
    pcm_S_W: Tensor,
    tail_N_L: Tensor,
    slot_S: Tensor,
    *,
    spec: DmelSpec = DMEL_20HZ,
    levels_S_F_B: Tensor | None = None,
    work_S_F_Q: Tensor | None = None,
) -> Tensor:
    """Mel levels, uint8 [S, F, B], of W = F * hop new samples of every session.

    Frame f is a Hann window over the last `fft` samples up to the end of hop f: the slot's tail
    holds those before this call, zeros at the start of a stream, and is updated in place. Its
    magnitudes (power at least 1e-10) go through the mel filters; the level is the one whose centre
    is nearest to log10 of the band's energy, ties to the lowest. Idle rows (slot -1) give zeros,
    whatever they hold, and no tail changes. A frame with a sample that is not finite gets
    unspecified levels, as do the later frames it is in.

    CPU tensors: the spectrum in float64, so that levels equal those of the source on speech. CUDA
    tensors: float32 accumulation of the DFT as a product, in fixed order. Deterministic; a frame
    depends on its own samples alone, so a stream has the same levels however it is cut into calls
    and whoever else is in them. `work_S_F_Q` (Q = fft / 2 + 1) is scratch of the kernels, its
    contents unspecified. Allocates only outputs and scratch that are not given; the first call for
    a spec and device also makes the DFT tables (5 MB), so warm up before capturing a graph.

    pcm: [S, W] and tail: [N, fft - hop], float32; slot: int32 [S], each at most once (values are
    checked on the CPU only; a GPU takes a slot outside 0..N-1 as idle). Raises TypeError or
    ValueError naming the argument, before any state changes.

    Source: Bai et al., "dMel: Speech Tokenization made Simple", 2024; `InklingFeatureExtractor`
    and `InklingProcessor` of transformers 5.17.
    """
    dims = _check_sound(pcm_S_W, tail_N_L, slot_S, spec)
    levels_S_F_B, work_S_F_Q = _buffers(dims, pcm_S_W, levels_S_F_B, work_S_F_Q)
    refuse_grad(pcm_S_W, tail_N_L)
    if levels_S_F_B.numel() > 0:
        _levels_op(pcm_S_W, tail_N_L, slot_S, spec.pack(), work_S_F_Q, levels_S_F_B)
    return levels_S_F_B


def dmel_embed(
    levels_T_B: Tensor,
    table_V_D: Tensor,
    norm_weight_D: Tensor,
    *,
    num_levels: int = DMEL_20HZ.num_levels,
    eps: float = 1e-6,
    out_T_D: Tensor | None = None,
) -> Tensor:
    """Tokens [T, D]: RMSNorm of the sum over bands b of table[b * num_levels + level_b].

    Accumulates in float32, bands in order, and rounds once; [T, B, D] is never materialised.
    Deterministic, row t depends on row t alone. Allocates only when `out_T_D` is None.

    levels: uint8 [T, B], each below num_levels (checked on the CPU only; a GPU takes a larger one
    as the highest); table: [B * num_levels, D], float32, bfloat16 or float16, D <= 16384; out has
    the table's dtype; norm_weight: [D], float32 or the table's dtype. Raises TypeError or
    ValueError naming the argument.
    """
    check_count("num_levels", num_levels)
    check_eps(eps)
    dims = Dims()
    dims.check(levels_T_B=levels_T_B, dtype=torch.uint8)
    if dims["B"] == 0:
        raise ValueError(f"levels_T_B: expected at least one band, got {tuple(levels_T_B.shape)}")
    device = levels_T_B.device
    _check_table(dims, table_V_D, norm_weight_D, dims["B"], num_levels, device)
    if out_T_D is None:
        out_T_D = table_V_D.new_empty(dims["T"], dims["D"])
    else:
        dims.check(out_T_D=out_T_D, dtype=table_V_D.dtype, device=device)
    refuse_grad(table_V_D, norm_weight_D)
    if dims["T"] > 0:
        _embed_op(levels_T_B, table_V_D, norm_weight_D, num_levels, eps, out_T_D)
    return out_T_D


def _check_sound(pcm_S_W: Tensor, tail_N_L: Tensor, slot_S: Tensor, spec: DmelSpec) -> Dims:
    if not isinstance(spec, DmelSpec):
        raise TypeError(f"spec: expected a DmelSpec, got {type(spec).__name__}")
    dims = Dims(L=spec.tail, B=spec.num_bands, Q=spec.num_bins)
    dims.check(pcm_S_W=pcm_S_W, dtype=torch.float32)
    dims.check(tail_N_L=tail_N_L, dtype=torch.float32, device=pcm_S_W.device)
    dims.check(slot_S=slot_S, dtype=torch.int32, device=pcm_S_W.device)
    if dims["W"] % spec.hop:
        raise ValueError(f"pcm_S_W: {dims['W']} samples are not a multiple of {spec.hop=}")
    return Dims(**dims, F=dims["W"] // spec.hop)


def _check_table(
    dims: Dims,
    table_V_D: Tensor,
    norm_weight_D: Tensor,
    num_bands: int,
    num_levels: int,
    device: torch.device,
) -> None:
    dims.check(table_V_D=table_V_D, dtype=ACTIVATIONS, device=device)
    if dims["V"] != num_bands * num_levels:
        raise ValueError(
            f"table_V_D: expected {num_bands} bands * {num_levels} levels = "
            f"{num_bands * num_levels} rows, got {dims['V']}"
        )
    if not 0 < dims["D"] <= MAX_WIDTH:
        raise ValueError(f"table_V_D: D={dims['D']} is not in 1..{MAX_WIDTH}")
    dtypes = (torch.float32, table_V_D.dtype)
    dims.check(norm_weight_D=norm_weight_D, dtype=dtypes, device=device)


def _buffers(
    dims: Dims, pcm_S_W: Tensor, levels_S_F_B: Tensor | None, work_S_F_Q: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The caller's output and scratch, checked, or new ones; the CPU path needs no scratch."""
    shape = (dims["S"], dims["F"])
    if levels_S_F_B is None:
        levels_S_F_B = pcm_S_W.new_empty(*shape, dims["B"], dtype=torch.uint8)
    else:
        dims.check(levels_S_F_B=levels_S_F_B, dtype=torch.uint8, device=pcm_S_W.device)
    if work_S_F_Q is None:
        width = 0 if pcm_S_W.device.type == "cpu" else dims["Q"]
        work_S_F_Q = pcm_S_W.new_empty(*shape, width)
    else:
        dims.check(work_S_F_Q=work_S_F_Q, dtype=torch.float32, device=pcm_S_W.device)
    return levels_S_F_B, work_S_F_Q
