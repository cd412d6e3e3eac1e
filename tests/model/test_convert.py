"""Converting: the same bits as packing in memory, whatever stopped it in between."""

from __future__ import annotations

import errno
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inkling_oracle import norm_once, random_inkling
from safetensors.torch import load_file, save_file
from small_model import small_config
from test_model_load import edit_header
from test_model_oracle import LIMIT, Sequence, our_logits
from test_model_tick import assert_row, run_alone
from test_packed import CASES, append_logits

from tml_kernels.testing import assert_bitwise, assert_matches
from tml_runtime.model import CheckpointError, InteractionModel, ModelConfig
from tml_runtime.model import convert as convert_module
from tml_runtime.model import load as load_module
from tml_runtime.model.checkpoint import SINGLE
from tml_runtime.model.convert import convert_checkpoint
from tml_runtime.model.converted import ENDS, MANIFEST, layer_file, tensors_of
from tml_runtime.model.load import save_weights
from tml_runtime.model.weights import FLOW_PREFIX, LayerWeights, ModelWeights

CONFIG = small_config()
NAMES = [ENDS, *(layer_file(layer) for layer in CONFIG.layers)]
PACKED: dict[str, Any] = {"experts": "int4", "rest": "fp8", "dtype": torch.float32}
W2 = "model.llm.layers.2.mlp.experts.w2_weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain one, without a speech head, as the published ones are."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_weights(folder / SINGLE, CONFIG, InteractionModel.random(CONFIG, seed=3).weights)
    tensors = load_file(folder / SINGLE)
    kept = {name: t for name, t in tensors.items() if not name.startswith(FLOW_PREFIX)}
    save_file(kept, folder / SINGLE)
    return folder


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, converted in one go."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert_checkpoint(checkpoint, out, CONFIG, **PACKED)
    return out


def assert_same_model(actual: InteractionModel, expected: InteractionModel) -> None:
    """Every tensor that either holds, scales and rounding errors included, and the report."""
    ours, theirs = tensors_of(actual.weights), tensors_of(expected.weights)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert_bitwise(tensor, theirs[name])
        assert tensor.is_contiguous() and tensor.data_ptr() % tensor.itemsize == 0, name
    assert (actual.config, actual.dtype) == (expected.config, expected.dtype)
    assert actual.report == expected.report


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("experts", "rest", "dtype"),
    [
        *((experts, rest, torch.bfloat16) for experts, rest in CASES),
        (None, None, torch.bfloat16),
        (None, None, torch.float16),
        ("nvfp4", "int4", torch.float32),
    ],
)
def test_is_bitwise_the_model_packed_in_memory(
    experts: str | None, rest: str | None, dtype: torch.dtype, checkpoint: Path, tmp_path: Path
) -> None:
    """Its tensors, and what it says: append and ticks."""
    names: dict[str, Any] = {"experts": experts, "rest": rest, "dtype": dtype, "seed": 5}
    convert_checkpoint(checkpoint, tmp_path / "out", CONFIG, **names)
    model = InteractionModel.load(tmp_path / "out", verify=True)
    expected = InteractionModel.load(checkpoint, config=CONFIG, **names)
    assert_same_model(model, expected)
    assert len(model.report.random) == 19 and model.report.seed == 5
    x_T_D = torch.randn(40, CONFIG.width).to(dtype)
    assert_bitwise(append_logits(model, x_T_D), append_logits(expected, x_T_D))
    assert_row(run_alone(model, 5, 1)[0], 0, run_alone(expected, 5, 1)[0], 0)


def test_random_weights_of_a_preset(tmp_path: Path) -> None:
    config = ModelConfig.preset("tiny")
    convert_checkpoint(None, tmp_path / "out", config, experts="mxfp4", rest="fp8", seed=7)
    expected = InteractionModel.random(
        config, seed=7, dtype=torch.bfloat16, experts="mxfp4", rest="fp8"
    )
    assert_same_model(InteractionModel.load(tmp_path / "out", config=config), expected)


def test_a_checkpoint_of_transformers_gives_its_logits(tmp_path: Path) -> None:
    oracle = random_inkling(CONFIG)
    oracle.save_pretrained(tmp_path / "published", max_shard_size="200KB")
    assert len(list((tmp_path / "published").glob("*.safetensors"))) > 2
    convert_checkpoint(tmp_path / "published", tmp_path / "out", CONFIG, dtype=torch.float32)
    norm_once(oracle)
    sequence = Sequence(CONFIG)
    expected = sequence.expected(CONFIG, oracle)
    model = InteractionModel.load(tmp_path / "out")
    for ours in our_logits(model, sequence.tokens(model)):
        assert_matches(ours, expected, limit=LIMIT)


class Stopped(BaseException):
    """As a KeyboardInterrupt is: not to be caught."""


def stop_at(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> list[str]:
    """The file `count` is written to its middle. The names of those that were begun."""
    begun: list[str] = []
    write = convert_module.write_tensor_file

    def stopping(path: Path, tensors: Any) -> None:
        begun.append(path.name)
        write(path, tensors)
        if len(begun) == count + 1:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            raise error

    monkeypatch.setattr(convert_module, "write_tensor_file", stopping)
    return begun


@pytest.mark.parametrize("count", range(len(NAMES)))
@pytest.mark.parametrize("error", [Stopped(), OSError(errno.ENOSPC, "No space left on device")])
def test_goes_on_where_it_was_stopped(
    error: BaseException, count: int, checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    """By a kill or a full disk at any file: what is there is whole, and is not made again."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, count, error)
        with pytest.raises(type(error)):
            convert_checkpoint(checkpoint, out, CONFIG, **PACKED)
    expected = files_of(whole)
    found = files_of(out)
    assert set(found) == {MANIFEST, *NAMES[:count]}
    assert all(found[name] == expected[name] for name in NAMES[:count])
    with pytest.raises(CheckpointError, match=f"{count} of 4 files are done, {NAMES[count]} is"):
        InteractionModel.load(out)
    (out / f".{NAMES[count]}.123.partial").write_bytes(b"of a process that was killed")
    with pytest.MonkeyPatch.context() as patch:
        begun = stop_at(patch, -1, error)
        seen: list[tuple] = []
        convert_checkpoint(
            checkpoint, out, CONFIG, **PACKED, progress=lambda *args: seen.append(args)
        )
    assert len(begun) == len(NAMES) - count
    assert seen == [(name, i + 1, len(NAMES), i >= count) for i, name in enumerate(NAMES)]
    assert files_of(out) == expected


def test_goes_on_where_the_manifest_was_not_written(
    checkpoint: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is there, but nothing says that it is whole: it is made again."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        write, calls = convert_module.Manifest.write, []

        def stopping(self: Any, folder: Path) -> None:
            calls.append(folder)
            if len(calls) == 3:
                raise Stopped
            write(self, folder)

        patch.setattr(convert_module.Manifest, "write", stopping)
        with pytest.raises(Stopped):
            convert_checkpoint(checkpoint, out, CONFIG, **PACKED)
    assert set(files_of(out)) == {MANIFEST, *NAMES[:2]}
    begun = stop_at(monkeypatch, -1, Stopped())
    convert_checkpoint(checkpoint, out, CONFIG, **PACKED)
    assert len(begun) == 3
    assert files_of(out) == files_of(whole)


@pytest.mark.parametrize("damage", ["altered", "cut", "gone"])
def test_a_damaged_file_is_made_again_and_no_other(
    damage: str, checkpoint: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    path = out / layer_file(1)
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-1] + (b"" if damage == "cut" else bytes([data[-1] ^ 1])))
    begun = stop_at(monkeypatch, -1, Stopped())
    convert_checkpoint(checkpoint, out, CONFIG, **PACKED)
    assert len(begun) == 1 and layer_file(1) in begun[0]
    assert files_of(out) == files_of(whole)


def test_a_disk_without_room_is_known_before_the_first_file(
    checkpoint: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = sum(len(data) for name, data in files_of(whole).items() if name != MANIFEST)
    for free, fits in ((sizes, False), (sizes + 2_000_000, True)):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path, u=usage: u)
        out = tmp_path / str(fits)
        if fits:
            convert_checkpoint(checkpoint, out, CONFIG, **PACKED)
            continue
        with pytest.raises(OSError, match=r"still to be written, 0\.0 GB are free") as caught:
            convert_checkpoint(checkpoint, out, CONFIG, **PACKED)
        assert caught.value.errno == errno.ENOSPC
        assert set(files_of(out)) == {MANIFEST}


def test_one_part_is_there_at_a_time(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In plain form and packed, and nothing of the ones before."""
    parts: list[weakref.ref] = []
    most: list[tuple[int, int]] = []

    def alive() -> int:
        return sum(ref() is not None for ref in parts)

    def spy(function: Any, argument: int) -> Any:
        def packed(*args: Any, **options: Any) -> Any:
            plain: LayerWeights | ModelWeights = args[argument]
            parts.append(weakref.ref(_large(plain)))
            before = alive()
            result = function(*args, **options)
            parts.append(weakref.ref(_large(result)))
            most.append((before, alive()))
            return result

        return packed

    monkeypatch.setattr(load_module, "pack_layer", spy(load_module.pack_layer, 1))
    monkeypatch.setattr(load_module, "pack_ends", spy(load_module.pack_ends, 0))
    begun = stop_at(monkeypatch, -1, Stopped())
    convert_checkpoint(checkpoint, tmp_path / "out", CONFIG, **PACKED)
    assert most == [(1, 2)] * len(NAMES) == [(1, 2)] * len(begun)
    assert alive() == 0


def _large(part: LayerWeights | ModelWeights) -> torch.Tensor:
    """A tensor that is packed."""
    matrix = part.unembed_V_D if isinstance(part, ModelWeights) else part.attention.out_D_I
    return matrix if isinstance(matrix, torch.Tensor) else matrix.data


def damaged(checkpoint: Path, folder: Path, name: str) -> Iterator[tuple[str, str]]:
    """A copy with something wrong in it; (tensor, reason)."""
    shutil.copytree(checkpoint, folder)
    file = folder / SINGLE
    if name == "truncated":
        file.write_bytes(file.read_bytes()[:-4])
        yield "", "truncated"
    elif name == "header":
        edit_header(file, lambda header: header[W2].update(shape=[3, 1, 2]))
        yield W2, r"F32 \(3, 1, 2\) takes 24 bytes"
    elif name == "integers":
        tensors = load_file(file)
        tensors[W2] = tensors[W2].to(torch.int32)
        save_file(tensors, file)
        yield W2, "dtype I32 is not one of F32, BF16, F16"
    else:
        tensors = load_file(file)
        tensors[W2][2, 3, 1] = float(name)
        save_file(tensors, file)
        yield W2, "holds NaN or Inf as torch.float32"


@pytest.mark.parametrize("name", ["truncated", "header", "integers"])
def test_a_wrong_shard_is_named_before_anything_is_written(
    name: str, checkpoint: Path, tmp_path: Path
) -> None:
    for tensor, reason in damaged(checkpoint, tmp_path / "bad", name):
        with pytest.raises(CheckpointError, match=reason) as caught:
            convert_checkpoint(tmp_path / "bad", tmp_path / "out", CONFIG, **PACKED)
        assert caught.value.file == tmp_path / "bad" / SINGLE
        assert not tensor or caught.value.tensor == tensor
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("experts", ["int4", None])
def test_numbers_that_are_not_finite_are_named(
    value: str, experts: str | None, checkpoint: Path, tmp_path: Path
) -> None:
    """Packed or not; the files before it are whole and stay."""
    for tensor, reason in damaged(checkpoint, tmp_path / "bad", value):
        with pytest.raises(CheckpointError, match=reason) as caught:
            convert_checkpoint(
                tmp_path / "bad", tmp_path / "out", CONFIG, **(PACKED | {"experts": experts})
            )
        assert (caught.value.file, caught.value.tensor) == (tmp_path / "bad" / SINGLE, tensor)
    assert set(files_of(tmp_path / "out")) == {MANIFEST, *NAMES[:3]}


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"experts": "mxfp4"}, "experts 'int4', not 'mxfp4'"),
    "rest": ({"rest": None}, "rest 'fp8', not None"),
    "dtype": ({"dtype": torch.bfloat16}, r"dtype torch.float32, not torch.bfloat16"),
    "seed": ({"seed": 1}, "seed 0, not 1"),
    "config": ({"config": small_config(tau_floor=17)}, "config.tau_floor 16, not 17"),
    "checkpoint": ({"checkpoint": None}, r"shards \{'model.safetensors': "),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_folder_of_another_conversion_is_refused(
    name: str, checkpoint: Path, whole: Path
) -> None:
    change, reason = CHANGES[name]
    arguments = {"checkpoint": checkpoint, "out": whole, "config": CONFIG, **PACKED, **change}
    before = files_of(whole)
    with pytest.raises(CheckpointError, match=f"was made with {reason}.*remove this one"):
        convert_checkpoint(**arguments)
    assert files_of(whole) == before


def test_a_folder_in_which_nothing_was_made_is_free_for_another_conversion(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("tml_runtime.model.convert.write_tensor_file", refuse)
        with pytest.raises(MemoryError):
            convert_checkpoint(checkpoint, out, CONFIG, **PACKED)
    assert list(files_of(out)) == ["manifest.json"]
    other = {**PACKED, **CHANGES["experts"][0]}
    assert convert_checkpoint(checkpoint, out, CONFIG, **other).packing.experts == other["experts"]


def test_a_moved_checkpoint_is_the_same_and_a_changed_one_is_not(
    checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    out, moved = tmp_path / "out", tmp_path / "moved"
    shutil.copytree(whole, out)
    shutil.copytree(checkpoint, moved)  # keeps the time of change
    convert_checkpoint(moved, out, CONFIG, **PACKED)
    (moved / SINGLE).write_bytes((moved / SINGLE).read_bytes())
    with pytest.raises(CheckpointError, match="was made with shards"):
        convert_checkpoint(moved, out, CONFIG, **PACKED)


def test_other_peoples_folders_are_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / f".{ENDS}.1.partial").write_text("mine too")
    before = files_of(tmp_path)
    with pytest.raises(CheckpointError, match="is not empty and no converted model"):
        convert_checkpoint(checkpoint, tmp_path, CONFIG, **PACKED)
    assert files_of(tmp_path) == before
    with pytest.raises(OSError):
        convert_checkpoint(checkpoint, tmp_path / "notes.txt", CONFIG, **PACKED)
