"""Weights from a checkpoint in the published layout, written straight into their place."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tml_kernels._tensor_file import TensorFile, TensorFileError, write_tensor_file

from ..errors import TmlRuntimeError
from .config import ModelConfig
from .packing import Packing, pack_ends, pack_layer
from .repeat import repeat_experts
from .weights import (
    FLOW_PREFIX,
    LayerWeights,
    ModelWeights,
    MoeWeights,
    Named,
    empty_ends,
    empty_layer,
    empty_weights,
    fill_random,
    named_layer,
    named_tensors,
)

if TYPE_CHECKING:
    from ..parallel.ranks import Ranks

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F32", "BF16", "F16")
IGNORED_PREFIX = "model.mtp."  # multi-token-prediction layers: they draft, the model runs without
PLAIN = Packing()  # nothing is packed

_log = logging.getLogger(__name__)


class CheckpointError(TmlRuntimeError, TensorFileError):
    """A checkpoint that cannot be used: which `file`, which `tensor` ("" for the file), why."""


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
    """Where a model's plain weights come from: files that were found to fit it, or a seed."""

    config: ModelConfig
    files: dict[str, TensorFile]  # of each tensor by name; one that is not here is random
    report: WeightReport

    @classmethod
    def random(cls, config: ModelConfig, *, seed: int) -> Source:
        report = WeightReport("no checkpoint", (), tuple(_shapes(config)), (), seed)
        return cls(config, {}, report)

    @classmethod
    def open(cls, path: str | Path, config: ModelConfig, *, seed: int) -> Source:
        """Names, shapes and dtypes are checked in full. Raises CheckpointError."""
        path = Path(path)
        files, wanted = _open(path), _shapes(config)
        random = _check(path, files, wanted)
        report = WeightReport(
            source=str(path),
            loaded=tuple(name for name in wanted if name not in random),
            random=tuple(random),
            ignored=tuple(sorted(name for name in files if name not in wanted)),
            seed=seed,
        )
        return cls(config, files, report)

    def fill(self, named: Named) -> None:
        if named.name in self.files:
            named.view.copy_(self.files[named.name].tensor(named.name))
        else:
            fill_random(self.config, named, self.report.seed)


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
        config,
        source.fill,
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
    mapped file into its place, so the peak is the model itself; where it is packed, that and one
    layer in plain form. Values are rounded to where they go. The speech head, which the published
    checkpoints lack, is random unless the file has it; the report and a warning say so. Raises
    CheckpointError with the file, the tensor and the reason for anything missing, unknown,
    misshapen, truncated or of a dtype that is not a float.
    """
    source = Source.open(path, config, seed=seed)
    fill = source.fill
    weights = _fill_weights(config, fill, device=device, dtype=dtype, packing=packing, ranks=ranks)
    log_report(source.report)
    return weights, source.report


def log_report(report: WeightReport) -> None:
    _log.log(logging.WARNING if report.random else logging.INFO, "%s", report)


def filled_ends(
    config: ModelConfig,
    fill: Callable[[Named], None],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    packing: Packing,
) -> ModelWeights:
    """What is before and after the layers: every tensor written by `fill`, then packed."""
    ends = empty_ends(config, device=device, dtype=dtype)
    for named in named_tensors(config, ends):
        fill(named)
    return pack_ends(ends, packing)


def filled_layer(
    config: ModelConfig,
    layer: int,
    fill: Callable[[Named], None],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    packing: Packing,
    distinct_experts: int | None = None,
) -> LayerWeights:
    """The same of one layer. Its plain form is let go of at the end."""
    w = empty_layer(config, layer, device=device, dtype=dtype, num_experts=distinct_experts)
    for named in named_layer(config, layer, w):
        fill(named)
    packed = pack_layer(layer, w, packing)
    if distinct_experts is None or not isinstance(packed.mlp, MoeWeights):
        return packed
    experts = repeat_experts(packed.mlp.experts, config.experts.num_experts)
    return replace(packed, mlp=replace(packed.mlp, experts=experts))


def _fill_weights(
    config: ModelConfig,
    fill: Callable[[Named], None],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    packing: Packing,
    ranks: Ranks | None,
    distinct_experts: int | None = None,
) -> ModelWeights:
    """Every tensor written by `fill`. A layer is packed, this rank's share of it copied, and the
    rest let go of, before the next one is made."""
    packing.check(dtype)
    ends = filled_ends(config, fill, device=device, dtype=dtype, packing=packing)

    def layer_of(layer: int) -> LayerWeights:
        return filled_layer(
            config,
            layer,
            fill,
            device=device,
            dtype=dtype,
            packing=packing,
            distinct_experts=distinct_experts,
        )

    return assemble(config, ends, layer_of, ranks)


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


def _open(path: Path) -> dict[str, TensorFile]:
    """The file that holds each tensor, by name."""
    if path.is_dir():
        if (path / INDEX).is_file():
            return _open_shards(path / INDEX)
        path = path / SINGLE
    file = TensorFile(path, CheckpointError)
    return dict.fromkeys(file.entries, file)


def _open_shards(index: Path) -> dict[str, TensorFile]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = {name: index.parent / shard for name, shard in weight_map.items()}
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(index, "", f"not an index of shards: {error!r}") from None
    opened: dict[Path, TensorFile] = {}
    for name, shard in shards.items():
        if shard.parent != index.parent:
            raise CheckpointError(index, name, f"its shard {shard} is not beside the index")
        if shard not in opened:
            opened[shard] = TensorFile(shard, CheckpointError)
        if name not in opened[shard].entries:
            raise CheckpointError(shard, name, "missing, though the index says it is here")
    for shard, file in opened.items():
        for name in file.entries:
            if shards.get(name) != shard:
                raise CheckpointError(
                    shard, name, f"not in {index.name}, or there for another file"
                )
    return {name: opened[shard] for name, shard in shards.items()}


def _check(
    path: Path, files: dict[str, TensorFile], wanted: dict[str, tuple[int, ...]]
) -> list[str]:
    """Names to fill at random, once the files are known to fit the model."""
    random: list[str] = []
    for name, shape in wanted.items():
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
    for name, file in files.items():
        if name not in wanted and not name.startswith(IGNORED_PREFIX):
            raise CheckpointError(file.path, name, "unknown to this model's configuration")
    return random
