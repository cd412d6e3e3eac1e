"""Expert weights as `moe` reads them, from plain tensors and from ready quantised checkpoints."""

# Dimension key: E experts, D model width, F expert width, J = 2F gate and up rows, K columns of one
# matrix, R its rows.

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .quant import FORMATS, Format, PackedExperts, dequantize, take_rows
from .quant.checkpoint import MatrixScales, read_checkpoint
from .quant.fill import FloatSource, Source, check_search, pack_experts

ORDERS = ("gate_up", "up_gate", "interleaved")
LAYOUTS = (*ORDERS, *(f"{order}_kn" for order in ORDERS))
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CheckpointScales:
    """Scales of a ready checkpoint, as it stores them. Per precision, for one matrix [R, K] of each
    expert, the weights and scales that `prepare_moe_weights` reads:

    fp8          float8_e4m3fn in the layout; scales [E, ceil(R / 128), ceil(K / 128)] ("_kn":
                 [E, ceil(K / 128), ceil(R / 128)]), factors in float32, bfloat16 or float16
    fp8_channel  float8_e4m3fn in the layout; scales [E, R] or [E, R, 1] ("_kn": also [E, 1, R])
    mxfp4        uint8 [E, R, K / 2], low nibble = even column, or gpt-oss's [E, R, K / 32, 16];
                 scales [E, R, K / 32] in uint8 or float8_e8m0fnu
    nvfp4        uint8 [E, R, K / 2]; scales float8_e4m3fn [E, R, K / 16], and a float32 global
                 factor (compressed-tensors stores its reciprocal)
    int4_f16     int32, scales float16 (int4: bfloat16) for groups of 128 columns, and packing
      "rows"     [E, R, K / 8], scales [E, R, K / 128], zero 8 (compressed-tensors)
      "awq"      [E, K, R / 8], scales [E, K / 128, R], zeros [E, K / 128, R / 8]
      "gptq"     [E, K / 8, R], scales and zeros as awq's; zeros are stored less 1, columns are in
                 their own order (no desc_act)

    No zeros means zero 8; zeros that are all 8 are dropped, since kernels are faster without.
    """

    w13: Tensor
    w2: Tensor
    w13_zero: Tensor | None = None  # int32
    w2_zero: Tensor | None = None
    w13_global: Tensor | None = None  # float32 [E] or a scalar
    w2_global: Tensor | None = None


@dataclass(frozen=True)
class MoEWeights:
    """The experts of one layer, packed.

    `order` says where w13's 2F rows have gate and up: "gate_up" F gates, then F ups; "up_gate" the
    reverse; "interleaved" g0, u0, g1, u1, ... Biases are float32, bias13 in the order of w13's
    rows. `shared` are always-on experts with a precision and an order of their own.

    parts: how many ranks share the rows of every matrix; these are one rank's, w13 [E, 2F / parts,
    D] and w2 [E, D / parts, F], for `expert_hidden` and `expert_sum`.
    """

    w13: PackedExperts
    w2: PackedExperts
    order: str
    bias13_E_J: Tensor | None = None
    bias2_E_D: Tensor | None = None
    shared: MoEWeights | None = None
    parts: int = 1

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order: {self.order!r} is not one of {', '.join(ORDERS)}")
        wanted = (self.w13.num_experts, self.w13.num_columns, self.parts * self.w13.num_rows)
        if wanted != (self.num_experts, self.parts * self.w2.num_rows, 2 * self.w2.num_columns):
            raise ValueError(
                f"w2: [E, D, F] = {[self.w2.num_experts, self.w2.num_rows, self.w2.num_columns]} "
                f"does not fit w13 [E, 2F, D] = "
                f"{[self.w13.num_experts, self.w13.num_rows, self.w13.num_columns]}"
            )
        _check_shared(self.shared, self.width, self.device)
        if self.shared is not None and self.shared.parts != self.parts:
            raise ValueError(f"shared: parts={self.shared.parts}, but {self.parts} of the others")

    @property
    def num_experts(self) -> int:
        return self.w2.num_experts

    @property
    def num_shared(self) -> int:
        return 0 if self.shared is None else self.shared.num_experts

    @property
    def width(self) -> int:
        """D."""
        return self.w13.num_columns

    @property
    def expert_width(self) -> int:
        """F."""
        return self.w2.num_columns

    @property
    def device(self) -> torch.device:
        return self.w13.device

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales and biases, shared experts included."""
        biases = (self.bias13_E_J, self.bias2_E_D)
        total = sum(b.numel() * b.element_size() for b in biases if b is not None)
        total += self.w13.nbytes + self.w2.nbytes
        return total + (0 if self.shared is None else self.shared.nbytes)

    def dequantize(self, expert: int) -> tuple[Tensor, Tensor]:
        """(w13 [2F, D], w2 [D, F]) of one expert, float32: what the kernels multiply by."""
        return dequantize(self.w13, expert), dequantize(self.w2, expert)


def part_of(weights: MoEWeights, part: int, parts: int) -> MoEWeights:
    """Part 0..parts-1 of the rows of every matrix, copied: of w13 the rows of F / parts hidden
    columns, of w2 D / parts. Nothing is rounded again. Raises ValueError for widths that `parts`
    does not divide, and where `take_rows` does."""
    if weights.parts != 1:
        raise ValueError(f"weights: are one of {weights.parts} parts already")
    for name, size in (("D", weights.width), ("F", weights.expert_width)):
        if size % parts:
            raise ValueError(f"weights: {name}={size} is not a multiple of {parts} parts")
    num_hidden, num_rows = weights.expert_width // parts, weights.width // parts
    column_F = torch.arange(num_hidden, device=weights.device) + part * num_hidden
    if weights.order == "interleaved":
        row13_J = torch.stack([2 * column_F, 2 * column_F + 1], dim=1).flatten()
    else:
        row13_J = torch.cat([column_F, weights.expert_width + column_F])
    row2_D = torch.arange(num_rows, device=weights.device) + part * num_rows
    bias13, bias2 = weights.bias13_E_J, weights.bias2_E_D
    return replace(
        weights,
        w13=take_rows(weights.w13, row13_J),
        w2=take_rows(weights.w2, row2_D),
        bias13_E_J=None if bias13 is None else bias13.index_select(1, row13_J),
        bias2_E_D=None if bias2 is None else bias2.index_select(1, row2_D),
        shared=None if weights.shared is None else part_of(weights.shared, part, parts),
        parts=parts,
    )


@torch.no_grad()
def prepare_moe_weights(
    w13: Tensor,
    w2: Tensor,
    *,
    layout: str,
    precision: str,
    scales: CheckpointScales | None = None,
    packing: str | None = None,
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
    shared: MoEWeights | None = None,
    inplace: bool = True,
    progress: bool = False,
    search: bool = False,
) -> MoEWeights:
    """Quantise, convert or repack the experts of one layer. Deterministic.

    layout: the order of w13's rows, "gate_up", "up_gate" or "interleaved" (see `MoEWeights`), of
    w13 [E, 2F, D] and w2 [E, D, F]; with "_kn" appended the matrices are stored [E, K, N], w13
    [E, D, 2F] and w2 [E, F, D], and are transposed.
    precision: fp32, bf16, fp16, fp8, fp8_channel, int4, int4_f16, mxfp4 or nvfp4 (`quant.FORMATS`).
    scales: of a ready checkpoint; `CheckpointScales` lists what is read, and `packing`'s values.
    Without, w13 and w2 are float32, bfloat16 or float16: they are quantised (the loss is in
    `PackedExperts.error_E`) or converted. With their own dtype and without "_kn" they are taken as
    they are, not copied and not checked.

    inplace=True writes the packed experts into the beginning of the sources' own storage: the
    contents of w13 and w2 are gone, also after an error, and what the packed form does not need
    stays allocated with it. Where the packed form is larger (padding of K, a wider dtype) or the
    storage is not aligned to 16 bytes, and with inplace=False, the result is allocated and the
    source is left as it is. It works expert by expert in slabs of 128 rows or an eighth of them:
    beside result and scales that takes less memory than 8 experts of the source, from 512 rows up.

    search: int4 weights that are quantised take, of a few scales for each group of 128 columns, the
    one with the least squared error. Packing takes longer, the packed form is the same.

    bias13 [E, 2F] in w13's row order and bias2 [E, D] are kept in float32. progress=True prints a
    line on stderr for every 8 experts.

    Raises TypeError or ValueError naming the argument: another rank, dtype or device, sizes that do
    not fit, a group size the format does not have, NaN or Inf in scales or in weights that are
    rounded.
    """
    fmt = _check_names(layout, precision)
    check_search(precision, search)
    if search and scales is not None:
        raise ValueError("search: scales are given with the weights; there are none to search for")
    order, kn = layout.removesuffix("_kn"), layout.endswith("_kn")
    sources = [
        _source(name, weights, w13, fmt, kn, scales, packing, search)
        for name, weights in (("w13", w13), ("w2", w2))
    ]
    num_experts, width = _check_sizes(*sources)
    bias13 = _bias("bias13", bias13, (num_experts, sources[0].shape[1]), w13.device)
    bias2 = _bias("bias2", bias2, (num_experts, width), w13.device)
    _check_shared(shared, width, w13.device)
    packed = [pack_experts(source, fmt, inplace=inplace, progress=progress) for source in sources]
    return MoEWeights(packed[0], packed[1], order, bias13, bias2, shared)


def _check_names(layout: str, precision: str) -> Format:
    if layout not in LAYOUTS:
        raise ValueError(f"layout: {layout!r} is not one of {', '.join(LAYOUTS)}")
    if precision not in FORMATS:
        raise ValueError(f"precision: {precision!r} is not one of {', '.join(FORMATS)}")
    return FORMATS[precision]


def _source(
    name: str,
    weights: Tensor,
    w13: Tensor,
    fmt: Format,
    kn: bool,
    scales: CheckpointScales | None,
    packing: str | None,
    search: bool,
) -> Source:
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(weights).__name__}")
    if weights.device != w13.device:
        raise ValueError(f"{name}: expected device {w13.device}, got {weights.device}")
    if not weights.is_contiguous():
        raise ValueError(
            f"{name}: must be contiguous, strides are {weights.stride()} for shape "
            f"{tuple(weights.shape)}; a stack stored [E, K, N] has a layout with '_kn'"
        )
    if weights.numel() == 0:
        raise ValueError(f"{name}: is empty, shape {tuple(weights.shape)}")
    if weights.requires_grad:
        weights = weights.detach()
    if scales is not None:
        if not isinstance(scales, CheckpointScales):
            raise TypeError(f"scales: expected CheckpointScales, got {type(scales).__name__}")
        given = MatrixScales(
            getattr(scales, name),
            getattr(scales, f"{name}_zero"),
            getattr(scales, f"{name}_global"),
        )
        return read_checkpoint(name, weights, fmt, given, kn=kn, packing=packing)
    if weights.dtype not in _FLOATS:
        wanted = " or ".join(str(d) for d in _FLOATS)
        raise TypeError(f"{name}: expected {wanted}, or scales with it; got {weights.dtype}")
    if packing is not None:
        raise ValueError(f"packing: {packing!r} is of a ready checkpoint, which brings scales")
    if weights.ndim != 3:
        raise ValueError(f"{name}: expected 3 axes, got shape {tuple(weights.shape)}")
    return FloatSource(name, weights, fmt, kn, search)


def _check_sizes(source13: Source, source2: Source) -> tuple[int, int]:
    """(E, D)."""
    num_experts, num_rows, width = source13.shape
    if num_rows % 2 or source2.shape != (num_experts, width, num_rows // 2):
        raise ValueError(
            f"w2: [E, D, F] = {source2.shape} does not fit w13 [E, 2F, D] = {source13.shape}"
        )
    return num_experts, width


def _bias(
    name: str, bias: Tensor | None, shape: tuple[int, int], device: torch.device
) -> Tensor | None:
    if bias is None:
        return None
    if not isinstance(bias, Tensor) or bias.dtype not in _FLOATS:
        found = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"{name}: expected {' or '.join(str(d) for d in _FLOATS)}, got {found}")
    if tuple(bias.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(bias.shape)}")
    if bias.device != device:
        raise ValueError(f"{name}: expected device {device}, got {bias.device}")
    if not bias.isfinite().all():
        expert = int((~bias.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"{name}: expert {expert} holds NaN or Inf")
    return bias.detach().to(torch.float32).contiguous()


def _check_shared(shared: MoEWeights | None, width: int, device: torch.device) -> None:
    if shared is None:
        return
    if not isinstance(shared, MoEWeights):
        raise TypeError(f"shared: expected MoEWeights, got {type(shared).__name__}")
    if shared.shared is not None:
        raise ValueError("shared: has shared experts itself")
    if shared.width != width or shared.device != device:
        raise ValueError(
            f"shared: width {shared.width} on {shared.device}, the routed experts have width "
            f"{width} on {device}"
        )
