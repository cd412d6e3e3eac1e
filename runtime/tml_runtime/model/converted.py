"""A converted model on disk: a folder of safetensors files and a manifest that says what they are.

One file a layer and one for the ends, what is before and after the layers. Every tensor is there as
the model holds it, packed matrices with their scales, under the path of its field
(`mlp.experts.w13.scale`). So loading is mapping the files and copying each tensor to its device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from tml_kernels._tensor_file import DTYPES, TensorFile, replacing
from tml_kernels.precision import ACTIVATIONS

from .checkpoint import CheckpointError
from .config import ModelConfig, from_data
from .load import WeightReport, assemble, log_report
from .packing import Packing, pack_ends, pack_layer
from .weights import LayerWeights, ModelWeights, empty_ends, empty_layer

if TYPE_CHECKING:
    from ..parallel.ranks import Ranks

FORMAT = "tml-converted/1"
MANIFEST = "manifest.json"
ENDS = "ends.safetensors"
_CHUNK = 1 << 24  # bytes hashed at a time
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_T = TypeVar("_T")


@dataclass(frozen=True)
class FileFacts:
    """Of one file that is whole: its length in bytes, its checksum, and what is in it."""

    size: int
    sha256: str
    tensors: dict[str, list]  # name: [dtype, shape]


@dataclass
class Manifest:
    """What a folder holds, and from what it was made. files: those that are done."""

    config: ModelConfig
    dtype: torch.dtype
    packing: Packing
    report: WeightReport  # which tensors were loaded and which are random
    shards: dict[str, list[int]]  # the checkpoint's files: [bytes, time of change in ns]
    device: str  # kind of device that packed, and drew what is random
    files: dict[str, FileFacts] = field(default_factory=dict)

    def facts(self) -> dict[str, object]:
        """All that decides the bits of the files."""
        config = {f"config.{name}": value for name, value in vars(self.config).items()}
        made = {"seed": self.report.seed, "device": self.device, "shards": self.shards}
        return {**config, "dtype": self.dtype, **asdict(self.packing), **made}

    def write(self, folder: Path) -> None:
        data = {
            "format": FORMAT,
            "config": asdict(self.config),
            "dtype": _DTYPE_NAMES[self.dtype],
            "packing": asdict(self.packing),
            "report": asdict(self.report),
            "shards": self.shards,
            "device": self.device,
            "files": {name: asdict(facts) for name, facts in self.files.items()},
        }
        with replacing(folder / MANIFEST) as partial:
            partial.write_text(json.dumps(data, indent=1))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises CheckpointError for what is no manifest, or of another version."""
        path = folder / MANIFEST
        try:
            data = json.loads(path.read_text())
            found = data["format"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(path, "", f"not a manifest: {error!r:.200}") from None
        if found != FORMAT:
            reason = f"has format {found!r:.40}, not {FORMAT!r}; convert the checkpoint again"
            raise CheckpointError(path, "", reason)
        try:
            files = from_data(dict, data["files"], "files")
            # Older folders do not name these two.
            packing = {"search": False, **data["packing"]}
            config = {"mtp_layers": [], **data["config"]}
            manifest = cls(
                config=from_data(ModelConfig, config, "config"),
                dtype=DTYPES[data["dtype"]],
                packing=from_data(Packing, packing, "packing"),
                report=from_data(WeightReport, data["report"], "report"),
                shards=from_data(dict, data["shards"], "shards"),
                device=from_data(str, data["device"], "device"),
                files={name: from_data(FileFacts, facts, name) for name, facts in files.items()},
            )
            if manifest.dtype not in ACTIVATIONS:
                raise ValueError(f"dtype: {data['dtype']!r} is no model's")
            manifest.packing.check(manifest.dtype)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(path, "", f"is damaged: {error!r:.300}") from None
        return manifest


class ConvertedModel:
    """A converted folder whose files are all there, with the sizes and tensors they should have.

    Nothing is read yet but the headers.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._templates = templates(manifest.config, manifest.dtype, manifest.packing)
        missing = [name for name in self._templates if name not in manifest.files]
        if missing:
            done = len(self._templates) - len(missing)
            reason = (
                f"{done} of {len(self._templates)} files are done, {missing[0]} is not; run "
                "`tml-runtime convert` again as it was started"
            )
            raise CheckpointError(folder / MANIFEST, "", reason)
        self._files = {
            name: _open(folder / name, manifest.files[name], template)
            for name, template in self._templates.items()
        }

    @classmethod
    def open(cls, path: str | Path) -> ConvertedModel | None:
        """None for what is not a converted folder. Raises CheckpointError for one that is not
        whole."""
        if not is_converted(path):
            return None
        return cls(Path(path), Manifest.read(Path(path)))

    def check(self, config: ModelConfig | None, *, search: bool, **given: object) -> None:
        """CheckpointError where the folder holds another model than the one that is asked for.
        None, and no search: whatever it holds. given: seed, dtype, experts, rest."""
        given["search"] = search or None
        asked = {name: value for name, value in given.items() if value is not None}
        if config is not None:
            asked |= {f"config.{name}": value for name, value in vars(config).items()}
        held = self.manifest.facts()
        for name, value in asked.items():
            if held[name] != value:
                reason = (
                    f"{name} is {held[name]}, and {value} was asked for; convert again for that"
                )
                raise CheckpointError(self._path, "", reason)

    def verify(self) -> None:
        """Read every byte. Raises CheckpointError for a file whose checksum is another one."""
        for name, file in self._files.items():
            if sha256_of(file.path) != self.manifest.files[name].sha256:
                raise CheckpointError(file.path, "", "is altered: its checksum does not match")

    def weights(self, device: torch.device | str, ranks: Ranks | None = None) -> ModelWeights:
        """The model's tensors, copied from the mapped files one by one; nothing is packed again."""

        def copied(name: str) -> Any:
            file = self._files[name]

            def copy(tensor: str, like: Tensor) -> Tensor:
                return file.tensor(tensor).to(device, copy=True)

            return rebuilt(self._templates[name], copy)

        def layer_of(layer: int) -> LayerWeights:
            return copied(layer_file(layer))

        log_report(self.manifest.report)
        return assemble(self.manifest.config, copied(ENDS), layer_of, ranks)

    @property
    def _path(self) -> Path:
        return self._files[ENDS].path.parent / MANIFEST


def is_converted(path: str | Path) -> bool:
    return (Path(path) / MANIFEST).is_file()


def layer_file(layer: int) -> str:
    return f"layer-{layer:03}.safetensors"


def templates(
    config: ModelConfig, dtype: torch.dtype, packing: Packing
) -> dict[str, ModelWeights | LayerWeights]:
    """What each file holds, on device "meta": the ends, then the layers in order."""
    packing.check(dtype)
    ends = pack_ends(empty_ends(config, device="meta", dtype=dtype), packing)
    found: dict[str, ModelWeights | LayerWeights] = {ENDS: ends}
    for layer in config.layers:
        w = empty_layer(config, layer, device="meta", dtype=dtype)
        found[layer_file(layer)] = pack_layer(layer, w, packing)
    return found


def rebuilt(value: _T, make: Callable[[str, Tensor], Tensor], name: str = "") -> _T:
    """The same containers with `make(path, tensor)` in the place of every tensor."""

    def inner(part: str, item: Any) -> Any:
        return rebuilt(item, make, f"{name}.{part}" if name else part)

    if isinstance(value, Tensor):
        return make(name, value)
    if isinstance(value, tuple):
        parts = getattr(value, "_fields", None) or map(str, range(len(value)))
        items = [inner(part, item) for part, item in zip(parts, value, strict=True)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        items = {f.name: inner(f.name, getattr(value, f.name)) for f in fields(value)}
        return replace(value, **items)
    return value


def tensors_of(weights: ModelWeights | LayerWeights) -> dict[str, Tensor]:
    """Every tensor by its path."""
    found: dict[str, Tensor] = {}

    def note(name: str, tensor: Tensor) -> Tensor:
        found[name] = tensor
        return tensor

    rebuilt(weights, note)
    return found


def facts_of(path: Path) -> FileFacts:
    file = TensorFile(path, CheckpointError)
    tensors = {name: [entry.dtype, list(entry.shape)] for name, entry in file.entries.items()}
    return FileFacts(len(file.bytes), sha256_of(path), tensors)


def sha256_of(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha.update(chunk)
    return sha.hexdigest()


def _open(path: Path, facts: FileFacts, template: ModelWeights | LayerWeights) -> TensorFile:
    file = TensorFile(path, CheckpointError)
    if len(file.bytes) != facts.size:
        reason = f"has {len(file.bytes)} bytes, {MANIFEST} says {facts.size}"
        raise CheckpointError(path, "", reason)
    wanted = tensors_of(template)
    for name, like in wanted.items():
        expected = (_DTYPE_NAMES[like.dtype], tuple(like.shape))
        if name not in file.entries:
            raise CheckpointError(path, name, f"missing; expected {expected[0]} {expected[1]}")
        entry = file.entries[name]
        if (entry.dtype, entry.shape) != expected:
            reason = f"is {entry.dtype} {entry.shape}, expected {expected[0]} {expected[1]}"
            raise CheckpointError(path, name, reason)
    for name in file.entries:
        if name not in wanted:
            raise CheckpointError(path, name, "unknown to this model's configuration")
    return file
