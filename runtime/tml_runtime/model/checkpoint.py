"""The files of a checkpoint: which of them holds each tensor."""

from __future__ import annotations

import json
from pathlib import Path

from tml_kernels._tensor_file import TensorFile, TensorFileError

from ..errors import TmlRuntimeError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class CheckpointError(TmlRuntimeError, TensorFileError):
    """A checkpoint that cannot be used: which `file`, which `tensor` ("" for the file), why."""


def open_files(path: Path) -> dict[str, TensorFile]:
    """The file that holds each tensor, by name: of a file, or of a folder with one or with an index
    of shards. Raises CheckpointError."""
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
    except (
        AttributeError, KeyError, TypeError, ValueError, RecursionError, OSError,
    ) as error:  # fmt: skip
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
