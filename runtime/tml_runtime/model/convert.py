"""A checkpoint to a converted folder, part by part: filled, packed, written, let go of.

At most one part (a layer, or the ends) is in memory, packed, and beside it what of it is still
plain, which is never more than a few of a layer's routed experts (`filled_layer`); the checkpoint's
shards are mapped. A part that is written is on the disk, in its place and in the manifest before
the next one is begun, so a conversion that was stopped goes on where it was.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from tml_kernels._tensor_file import replacing, write_tensor_file

from ..text import TOKENIZER_FILE
from .checkpoint import CheckpointError
from .config import ModelConfig
from .converted import (
    ENDS,
    MANIFEST,
    FileFacts,
    Manifest,
    facts_of,
    is_converted,
    sha256_of,
    templates,
    tensors_of,
)
from .load import Source, filled_ends, filled_layer
from .packing import Packing
from .weights import LayerWeights, ModelWeights

Progress = Callable[[str, int, int, bool], None]  # file, its number from 1, of how many, made now
_MARGIN = 1 << 20  # bytes of headers and the manifest, at most


def convert_checkpoint(
    checkpoint: str | Path | None,
    out: str | Path,
    config: ModelConfig,
    *,
    experts: str | None = None,
    rest: str | None = None,
    search: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = lambda *_: None,
) -> Manifest:
    """Write the folder that `InteractionModel.load` maps: the model that it would pack itself.

    checkpoint: what `load` takes; None: random weights. experts, rest, search: as
    `InteractionModel.packed` takes them. seed: of what the checkpoint lacks. device: where parts
    are packed.

    Call it again with the same arguments to go on: a file with the right checksum is kept, any
    other is made again. Raises CheckpointError, before anything is written, for a checkpoint that
    does not fit, and for a folder that holds something else; with the tensor's name for one that
    holds NaN or Inf. OSError where the disk has no room, before the first part if that can be
    known. After any error, files that were done stay, and none is there in half.
    """
    packing, device, out = Packing(experts, rest, search), torch.device(device), Path(out)
    expected = templates(config, dtype, packing)
    if checkpoint is None:
        source = Source.random(config, seed=seed)
    else:
        source = Source.open(checkpoint, config, seed=seed, finite=True)
    manifest = Manifest(config, dtype, packing, source.report, _shards(source), device.type)
    manifest = _begin(out, manifest, list(expected))
    _check_room(out, expected, manifest)

    where = {"device": device, "dtype": dtype, "packing": packing}
    for number, name in enumerate(expected, 1):
        kept = _is_kept(out / name, manifest.files.get(name))
        if not kept:
            if name == ENDS:
                part = filled_ends(source, **where)
            else:
                part = filled_layer(source, number - 2, **where)
            manifest.files[name] = _write(out / name, part)
            del part  # before the next one is filled
            manifest.write(out)
        progress(name, number, len(expected), not kept)
    if checkpoint is not None:
        _copy_tokenizer(Path(checkpoint), out)
    return manifest


def _copy_tokenizer(checkpoint: Path, out: Path) -> None:
    """The file by which `tml-runtime serve` reads and writes text, if the checkpoint has one."""
    file = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / TOKENIZER_FILE
    if file.is_file():
        with replacing(out / TOKENIZER_FILE) as path:
            shutil.copyfile(file, path)


def _begin(out: Path, asked: Manifest, names: list[str]) -> Manifest:
    """The folder, with a manifest. That of an earlier run goes on if it was after the same; one
    that made no file may have been after anything."""
    found = Manifest.read(out) if is_converted(out) else None
    if found is not None and found.files:
        held = found.facts()
        for name, value in asked.facts().items():
            if held[name] != value:
                reason = (
                    f"was made with {name} {held[name]!r:.100}, not {value!r:.100}; choose another "
                    "folder or remove this one"
                )
                raise CheckpointError(out / MANIFEST, "", reason)
        asked = replace(asked, files=found.files)
    out.mkdir(parents=True, exist_ok=True)
    # Of a process that was killed.
    partial = {path for name in (MANIFEST, *names) for path in out.glob(f".{name}.*.partial")}
    if found is None and not partial.issuperset(out.iterdir()):
        raise CheckpointError(out, "", "is not empty and no converted model; choose another folder")
    for path in partial:
        path.unlink(missing_ok=True)
    if not asked.files:
        asked.write(out)
    return asked


def _check_room(
    out: Path, expected: dict[str, ModelWeights | LayerWeights], manifest: Manifest
) -> None:
    missing = (part for name, part in expected.items() if name not in manifest.files)
    needed = sum(t.nbytes for part in missing for t in tensors_of(part).values()) + _MARGIN
    free = shutil.disk_usage(out).free
    if needed > free:
        words = f"{needed / 1e9:.1f} GB are still to be written, {free / 1e9:.1f} GB are free"
        raise OSError(errno.ENOSPC, words, str(out))


def _is_kept(path: Path, facts: FileFacts | None) -> bool:
    if facts is None or not path.is_file() or path.stat().st_size != facts.size:
        return False
    return sha256_of(path) == facts.sha256


def _write(path: Path, part: ModelWeights | LayerWeights) -> FileFacts:
    # Wide values first: then every tensor begins at a multiple of its own width.
    tensors = sorted(tensors_of(part).items(), key=lambda item: -item[1].itemsize)
    with replacing(path) as partial:
        write_tensor_file(partial, tensors)
        return facts_of(partial)


def _shards(source: Source) -> dict[str, list[int]]:
    """What tells a checkpoint from one that was put in its place meanwhile."""
    stats = {str(file.path.name): file.path.stat() for file in source.files.values()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(stats.items())}
