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
from .weights import (
    FLOW_PREFIX,
    LayerWeights,
    ModelWeights,
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


def random_weights(
    config: ModelConfig,
    *,
    seed: int,
    device: torch.device | str,
    dtype: torch.dtype,
    packing: Packing = PLAIN,
    ranks: Ranks | None = None,
) -> tuple[ModelWeights, WeightReport]:
    names: list[str] = []

    def fill(named: Named) -> None:
        names.append(named.name)
        fill_random(config, named, seed)

    weights = _fill_weights(config, fill, device=device, dtype=dtype, packing=packing, ranks=ranks)
    return weights, WeightReport("no checkpoint", (), tuple(names), (), seed)


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
    path = Path(path)
    files = _open(path)
    wanted = {
        named.name: tuple(named.view.shape)
        for named in named_tensors(config, empty_weights(config, device="meta", dtype=dtype))
    }
    random = _check(path, files, wanted)

    def fill(named: Named) -> None:
        if named.name in random:
            fill_random(config, named, seed)
        else:
            named.view.copy_(files[named.name].tensor(named.name))

    weights = _fill_weights(config, fill, device=device, dtype=dtype, packing=packing, ranks=ranks)
    report = WeightReport(
        source=str(path),
        loaded=tuple(name for name in wanted if name not in random),
        random=tuple(random),
        ignored=tuple(sorted(name for name in files if name not in wanted)),
        seed=seed,
    )
    _log.log(logging.WARNING if random else logging.INFO, "%s", report)
    return weights, report


def _fill_weights(
    config: ModelConfig,
    fill: Callable[[Named], None],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    packing: Packing,
    ranks: Ranks | None,
) -> ModelWeights:
    """Every tensor written by `fill`. A layer is packed, this rank's share of it copied, and the
    rest let go of, before the next one is made."""

    def filled_layer(layer: int) -> LayerWeights:
        w = empty_layer(config, layer, device=device, dtype=dtype)
        for named in named_layer(config, layer, w):
            fill(named)
        w = pack_layer(layer, w, packing)
        return w if ranks is None else ranks.share_layer(config, layer, w)

    packing.check(dtype)
    ends = empty_ends(config, device=device, dtype=dtype)
    for named in named_tensors(config, ends):
        fill(named)
    ends = pack_ends(ends, packing)
    ends = ends if ranks is None else ranks.share_ends(ends)
    return replace(ends, layers=tuple(filled_layer(layer) for layer in config.layers))


def save_weights(path: str | Path, config: ModelConfig, weights: ModelWeights) -> None:
    """Write one safetensors file in the same layout, with the speech head under its own prefix.

    Raises ValueError for packed weights, before the file is opened.
    """
    write_tensor_file(Path(path), named_tensors(config, weights))


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
