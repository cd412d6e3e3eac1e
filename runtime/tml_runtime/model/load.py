"""Weights from a checkpoint in the published layout, written straight into their place."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tml_kernels._tensor_file import TensorFile, write_tensor_file
from tml_kernels.moe import MoEWeights
from tml_kernels.quant import PackedExperts

from .checkpoint import CheckpointError, open_files
from .config import ModelConfig
from .nvfp4 import Nvfp4Stack, find_stack
from .packing import Packing, joined, pack_ends, pack_layer, pack_stack
from .random_fill import fill_random
from .repeat import repeat_experts
from .weights import (
    EXPERT_ORDER,
    FLOW_PREFIX,
    MTP_PREFIX,
    LayerWeights,
    ModelWeights,
    Named,
    empty_ends,
    empty_experts,
    empty_layer,
    empty_weights,
    expert_shapes,
    is_routed,
    mtp_prefix,
    named_layer,
    named_tensors,
    routed_names,
)

if TYPE_CHECKING:
    from ..parallel.ranks import Ranks

FLOATS = ("F32", "BF16", "F16")
PLAIN = Packing()  # nothing is packed
_CHECKED_VALUES = 1 << 24  # looked at in one go for NaN and Inf

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightReport:
    """Where every weight came from. `random` is what no checkpoint gave."""

    source: str
    loaded: tuple[str, ...]
    random: tuple[str, ...]
    ignored: tuple[str, ...]
    seed: int

    def __str__(self) -> str:
        text = f"{self.source}: {len(self.loaded)} tensors loaded"
        if self.random:
            text += f", {len(self.random)} random from seed {self.seed} ({self.random[0]}, ...)"
        if self.ignored:
            text += f", {len(self.ignored)} ignored ({self.ignored[0]}, ...)"
        return text


@dataclass(frozen=True)
class Source:
    """Where a model's plain weights come from: files that were found to fit it, or a seed.

    finite: NaN and Inf are refused.
    """

    config: ModelConfig
    files: dict[str, TensorFile]  # of each tensor by name; one that is not here is random
    report: WeightReport
    nvfp4: dict[str, Nvfp4Stack] = field(default_factory=dict)  # what a file has in nvfp4, by name
    finite: bool = False

    @classmethod
    def random(cls, config: ModelConfig, *, seed: int) -> Source:
        report = WeightReport("no checkpoint", (), tuple(_shapes(config)), (), seed)
        return cls(config, {}, report)

    @classmethod
    def open(
        cls, path: str | Path, config: ModelConfig, *, seed: int, finite: bool = False
    ) -> Source:
        """Names, shapes and dtypes are checked in full. Raises CheckpointError."""
        path = Path(path)
        files, wanted = open_files(path), _shapes(config)
        found = {n: find_stack(path, files, n, wanted[n]) for n in wanted if is_routed(n)}
        nvfp4 = {name: stack for name, stack in found.items() if stack is not None}
        random = _check(path, config, files, wanted, nvfp4)
        read = {*wanted, *(part for stack in nvfp4.values() for part in stack.parts)}
        report = WeightReport(
            source=str(path),
            loaded=tuple(name for name in wanted if name not in random),
            random=tuple(random),
            ignored=tuple(sorted(name for name in files if name not in read)),
            seed=seed,
        )
        return cls(config, files, report, nvfp4, finite)

    def fill(self, named: Named, begin: int = 0) -> None:
        """Write a tensor. begin: of a routed stack, the expert that the view begins with.

        Weights in nvfp4 are decoded to float32 and rounded from there to where they go. Raises
        CheckpointError for what is not finite, where that is refused.
        """
        name, view = named
        if name in self.nvfp4:
            stack = self.nvfp4[name]
            name = stack.codes
            for expert, matrix_R_K in enumerate(view, begin):
                matrix_R_K.copy_(stack.values(expert, view.device))
        elif name in self.files:
            view.copy_(self.files[name].tensor(name)[begin : begin + len(view)])
        else:
            fill_random(self.config, named, self.report.seed, begin)
        if self.finite and name in self.files and not _is_finite(view):
            reason = f"holds NaN or Inf as {view.dtype}"
            raise CheckpointError(self.files[name].path, name, reason)


def random_weights(
    config: ModelConfig,
    *,
    seed: int,
    device: torch.device | str,
    dtype: torch.dtype,
    packing: Packing = PLAIN,
    ranks: Ranks | None = None,
    distinct_experts: int | None = None,
) -> tuple[ModelWeights, WeightReport]:
    """distinct_experts: as `InteractionModel.random` takes it. Raises ValueError."""
    if distinct_experts is not None and not 1 <= distinct_experts <= config.experts.num_experts:
        raise ValueError(
            f"{distinct_experts=} is not in 1..{config.experts.num_experts}, the experts of a layer"
        )
    source = Source.random(config, seed=seed)
    weights = _fill_weights(
        source,
        device=device,
        dtype=dtype,
        packing=packing,
        ranks=ranks,
        distinct_experts=distinct_experts,
    )
    return weights, source.report


def load_weights(
    path: str | Path,
    config: ModelConfig,
    *,
    seed: int,
    device: torch.device | str,
    dtype: torch.dtype,
    packing: Packing = PLAIN,
    ranks: Ranks | None = None,
) -> tuple[ModelWeights, WeightReport]:
    """Read a safetensors file, or a folder with one or with an index of shards.

    Names and shapes are checked before memory is taken, and each tensor is copied once, from the
    mapped file into its place, so the peak is the model itself; where it is packed, that and what
    `filled_layer` has in plain form. Values are rounded to where they go. The speech head, which
    the published checkpoints lack, is random unless the file has it; the report and a warning say
    so. Routed experts may be in nvfp4 (`nvfp4` says how): packed as nvfp4 they keep their codes and
    scales, anything else is made of their exact values. Raises CheckpointError with the file, the
    tensor and the reason for anything missing, unknown, misshapen, truncated or of a dtype that is
    not a float, and where something is packed, for NaN and Inf.
    """
    packs = packing.experts is not None or packing.rest is not None
    source = Source.open(path, config, seed=seed, finite=packs)
    weights = _fill_weights(source, device=device, dtype=dtype, packing=packing, ranks=ranks)
    log_report(source.report)
    return weights, source.report


def log_report(report: WeightReport) -> None:
    _log.log(logging.WARNING if report.random else logging.INFO, "%s", report)


def filled_ends(
    source: Source, *, device: torch.device | str, dtype: torch.dtype, packing: Packing
) -> ModelWeights:
    """What is not in a layer: every tensor written by the source, then packed."""
    ends = empty_ends(source.config, device=device, dtype=dtype)
    for named in named_tensors(source.config, ends):
        source.fill(named)
    return pack_ends(ends, packing)


def filled_layer(
    source: Source,
    layer: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    packing: Packing,
    distinct_experts: int | None = None,
) -> LayerWeights:
    """The same of one layer. Its plain form is let go of at the end; of routed experts that are
    packed, no more than PIECE are there in plain form, of one of their two matrices."""
    config, routed = source.config, None
    if not config.is_dense(layer):
        count = distinct_experts or config.experts.num_experts
        routed = filled_experts(
            source, layer, count, device=device, dtype=dtype, precision=packing.experts,
            search=packing.search,
        )  # fmt: skip
        if distinct_experts is not None:
            routed = repeat_experts(routed, config.experts.num_experts)
    w = empty_layer(config, layer, device=device, dtype=dtype, routed=routed)
    for named in named_layer(config, layer, w, routed=False):
        source.fill(named)
    return pack_layer(layer, w, packing, routed=False)


def filled_experts(
    source: Source,
    layer: int,
    num_experts: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    precision: str | None,
    search: bool = False,
) -> MoEWeights:
    """The first routed experts of a layer: the stack itself where they stay plain, else packed
    piece by piece."""
    w13_name, w2_name = routed_names(layer)
    if precision is None:
        experts = empty_experts(source.config, num_experts, device=device, dtype=dtype)
        source.fill(Named(w13_name, experts.w13.data))
        source.fill(Named(w2_name, experts.w2.data))
        return experts

    def stack(name: str, shape: tuple[int, int]) -> PackedExperts:
        ready = source.nvfp4.get(name)
        if ready is not None and precision == "nvfp4":
            return joined(num_experts, lambda begin, end: ready.packed(begin, end, device))

        def piece(begin: int, end: int) -> PackedExperts:
            kept = dtype if ready is None else torch.float32  # holds what is in nvfp4 as it is
            plain_E_R_K = torch.empty(end - begin, *shape, device=device, dtype=kept)
            source.fill(Named(name, plain_E_R_K), begin)
            where = f"{name}, counted from expert {begin}"
            return pack_stack(where, plain_E_R_K, precision, search=search)

        return joined(num_experts, piece)

    w13_J_D, w2_D_F = expert_shapes(source.config)
    return MoEWeights(stack(w13_name, w13_J_D), stack(w2_name, w2_D_F), EXPERT_ORDER)


def _fill_weights(
    source: Source,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    packing: Packing,
    ranks: Ranks | None,
    distinct_experts: int | None = None,
) -> ModelWeights:
    """Every tensor written by the source. A layer is packed, this rank's share of it copied, and
    the rest let go of, before the next one is made."""
    packing.check(dtype)
    ends = filled_ends(source, device=device, dtype=dtype, packing=packing)

    def layer_of(layer: int) -> LayerWeights:
        return filled_layer(
            source,
            layer,
            device=device,
            dtype=dtype,
            packing=packing,
            distinct_experts=distinct_experts,
        )

    return assemble(source.config, ends, layer_of, ranks)


def assemble(
    config: ModelConfig,
    ends: ModelWeights,
    layer_of: Callable[[int], LayerWeights],
    ranks: Ranks | None,
) -> ModelWeights:
    """A model of its ends and of layers that are made one after the other; with ranks, this one's
    share of them, copied before the next one is made."""

    def shared_layer(layer: int) -> LayerWeights:
        w = layer_of(layer)
        return w if ranks is None else ranks.share_layer(config, layer, w)

    ends = ends if ranks is None else ranks.share_ends(ends)
    return replace(ends, layers=tuple(shared_layer(layer) for layer in config.layers))


def save_weights(path: str | Path, config: ModelConfig, weights: ModelWeights) -> None:
    """Write one safetensors file in the same layout, with the speech head under its own prefix.

    Raises ValueError for packed weights, before the file is opened.
    """
    write_tensor_file(Path(path), named_tensors(config, weights))


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of every tensor of the checkpoint layout."""
    weights = empty_weights(config, device="meta", dtype=torch.float32)
    return {named.name: tuple(named.view.shape) for named in named_tensors(config, weights)}


def _is_finite(view: Tensor) -> bool:
    """In slabs of rows, so that it takes little memory beside the tensor."""
    rows = max(1, _CHECKED_VALUES // max(1, view[0].numel()))
    return all(bool(part.isfinite().all()) for part in view.split(rows))


def _check(
    path: Path,
    config: ModelConfig,
    files: dict[str, TensorFile],
    wanted: dict[str, tuple[int, ...]],
    nvfp4: dict[str, Nvfp4Stack],
) -> list[str]:
    """Names to fill at random, once the files are known to fit the model."""
    random: list[str] = []
    for name, shape in wanted.items():
        if name in nvfp4:
            continue
        if name not in files:
            if not name.startswith(FLOW_PREFIX):
                raise CheckpointError(path, name, f"missing; expected shape {shape}")
            random.append(name)
        elif files[name].shape(name) != shape:
            raise CheckpointError(
                files[name].path, name, f"has shape {files[name].shape(name)}, expected {shape}"
            )
        elif (dtype := files[name].entries[name].dtype) not in FLOATS:
            reason = f"dtype {dtype} is not one of {', '.join(FLOATS)}"
            raise CheckpointError(files[name].path, name, reason)
    num_flow = sum(name.startswith(FLOW_PREFIX) for name in wanted)
    if 0 < len(random) < num_flow:
        raise CheckpointError(path, random[0], "missing, while other parts of the head are there")
    known = set(wanted)
    for stack in nvfp4.values():
        known.update(stack.parts, stack.unread)
    for name, file in files.items():
        if name not in known and not _is_ignored(config, name):
            raise CheckpointError(file.path, name, "unknown to this model's configuration")
    return random


def _is_ignored(config: ModelConfig, name: str) -> bool:
    """Multi-token-prediction layers behind the model's own: without them it says the same. Where it
    has none, all that belongs to them."""
    if not config.mtp_layers:
        return name.startswith(MTP_PREFIX)
    own = tuple(mtp_prefix(layer) for layer in range(len(config.mtp_layers)))
    return name.startswith(f"{MTP_PREFIX}layers.") and not name.startswith(own)
