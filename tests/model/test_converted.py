"""A converted folder as it is read: mapped, copied, and refused where anything is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import small_config
from test_packed import CASES

from tml_kernels.testing import assert_bitwise
from tml_runtime import cli
from tml_runtime.errors import InputTypeError
from tml_runtime.model import CheckpointError, InteractionModel, ModelConfig, TurnLayout
from tml_runtime.model import convert as convert_module
from tml_runtime.model.checkpoint import SINGLE
from tml_runtime.model.config import from_data
from tml_runtime.model.convert import convert_checkpoint
from tml_runtime.model.converted import ENDS, MANIFEST, ConvertedModel, layer_file, tensors_of
from tml_runtime.model.load import random_weights, save_weights
from tml_runtime.model.packing import Packing
from tml_runtime.parallel import share
from tml_runtime.random_model import load_model

CONFIG = small_config()
NAMES = [ENDS, *(layer_file(layer) for layer in CONFIG.layers)]
PACKED: dict[str, Any] = {"experts": "int4", "rest": "fp8", "dtype": torch.float32}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    convert_checkpoint(None, out, CONFIG, **PACKED)
    return out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def edit_manifest(folder: Path, edit: Callable[[dict], object]) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    edit(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def test_a_rank_takes_its_share_of_it(tmp_path: Path) -> None:
    ranks: Any = SimpleNamespace(
        share_layer=lambda config, layer, w: share.share_layer(config, layer, w, 1, 2),
        share_ends=lambda weights: share.share_ends(weights, 1, 2),
    )
    names: dict[str, Any] = {"experts": "int4", "rest": "fp8_channel", "dtype": torch.float32}
    convert_checkpoint(None, tmp_path / "out", CONFIG, **names)
    converted = ConvertedModel.open(tmp_path / "out")
    assert converted is not None
    shared = tensors_of(converted.weights("cpu", ranks))
    expected, _ = random_weights(
        CONFIG, seed=0, device="cpu", dtype=torch.float32,
        packing=Packing("int4", "fp8_channel"), ranks=ranks,
    )  # fmt: skip
    for name, tensor in tensors_of(expected).items():
        assert_bitwise(shared[name], tensor)


def test_nothing_is_left_mapped_that_a_change_of_the_file_would_change(folder: Path) -> None:
    model = InteractionModel.load(folder)
    before = {name: t.clone() for name, t in tensors_of(model.weights).items()}
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
    for name, tensor in tensors_of(model.weights).items():
        assert_bitwise(tensor, before[name])


def test_the_manifest_says_what_is_there(made: Path) -> None:
    data = json.loads((made / MANIFEST).read_text())
    assert data["format"] == "tml-converted/1"
    assert data["packing"] == {"experts": "int4", "rest": "fp8", "search": False}
    assert data["report"]["source"] == "no checkpoint" and len(data["report"]["random"]) == 90
    assert list(data["files"]) == NAMES
    for name, facts in data["files"].items():
        tensors = load_file(made / name)  # the safetensors package can read it
        assert {n: list(t.shape) for n, t in tensors.items()} == {
            n: shape for n, (_, shape) in facts["tensors"].items()
        }
        assert facts["size"] == (made / name).stat().st_size
    layer = data["files"][layer_file(1)]["tensors"]
    assert layer["mlp.experts.w13.data"] == ["I16", [4, 2, 64, 32]]
    assert layer["mlp.experts.shared.w2.scale"] == ["F32", [1, 1, 1]]


def test_shapes_are_known_without_packing() -> None:
    """Those that files are checked against, and that memory is planned with."""
    for experts, rest in CASES:
        packing = Packing(experts, rest)
        weights, _ = random_weights(
            CONFIG, seed=0, device="cpu", dtype=torch.bfloat16, packing=packing
        )
        parts = (replace(weights, layers=()), *weights.layers)
        known = convert_module.templates(CONFIG, torch.bfloat16, packing).values()
        for part, template in zip(parts, known, strict=True):
            shapes = {name: (t.dtype, t.shape) for name, t in tensors_of(template).items()}
            assert shapes == {name: (t.dtype, t.shape) for name, t in tensors_of(part).items()}


def test_arguments_that_agree_are_welcome_and_others_are_refused(made: Path) -> None:
    model = InteractionModel.load(made, config=CONFIG, **PACKED, seed=0)
    assert model.report.seed == 0
    for arguments, reason in [
        ({"dtype": torch.bfloat16}, "dtype is torch.float32, and torch.bfloat16 was asked for"),
        ({"seed": 99}, "seed is 0, and 99 was asked for"),
        ({"experts": "nvfp4"}, "experts is int4, and nvfp4 was asked for"),
        ({"rest": "int4"}, "rest is fp8, and int4 was asked for"),
        ({"config": small_config(norm_eps=1e-5)}, "config.norm_eps is 1e-06, and 1e-05 was"),
        ({"config": small_config(tau_floor=None)}, "config.tau_floor is 16, and None was"),
        ({"config": ModelConfig.preset("tiny")}, "config.name is small, and tiny was asked"),
    ]:
        with pytest.raises(CheckpointError, match=reason) as caught:
            InteractionModel.load(made, **arguments)
        assert caught.value.file == made / MANIFEST


def test_a_folder_of_before_there_was_search_is_opened(folder: Path) -> None:
    expected = InteractionModel.load(folder)
    edit_manifest(folder, lambda data: data["packing"].pop("search"))
    model = InteractionModel.load(folder, **PACKED)
    for name, tensor in tensors_of(expected.weights).items():
        assert_bitwise(tensors_of(model.weights)[name], tensor)
    with pytest.raises(CheckpointError, match="search is False, and True was asked for"):
        InteractionModel.load(folder, **PACKED, search=True)


def test_a_search_is_said_in_the_manifest_and_goes_on_as_such(tmp_path: Path) -> None:
    names: dict[str, Any] = {"experts": "int4", "rest": "int4_f16", "dtype": torch.float32}
    convert_checkpoint(None, tmp_path / "out", CONFIG, **names, search=True)
    model = InteractionModel.load(tmp_path / "out", search=True)
    plain = InteractionModel.random(CONFIG)
    searched = plain.packed(experts="int4", rest="int4_f16", search=True)
    unsearched = tensors_of(plain.packed(experts="int4", rest="int4_f16").weights)
    for name, tensor in tensors_of(searched.weights).items():
        assert_bitwise(tensors_of(model.weights)[name], tensor)
        if name.endswith(".error_E"):  # routed, shared, attention, dense and unembedding
            assert (tensor < unsearched[name]).all(), name
    with pytest.raises(CheckpointError, match="was made with search True, not False"):
        convert_checkpoint(None, tmp_path / "out", CONFIG, **names)


def test_a_published_checkpoint_still_needs_a_configuration(tmp_path: Path) -> None:
    save_weights(tmp_path / SINGLE, CONFIG, InteractionModel.random(CONFIG).weights)
    with pytest.raises(InputTypeError, match=r"config: .* is no converted model, so it needs one"):
        InteractionModel.load(tmp_path)


def change_one(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """A tensor of the ends; the manifest's size follows."""
    tensors = load_file(folder / ENDS)
    change(tensors)
    save_file(tensors, folder / ENDS)
    size = (folder / ENDS).stat().st_size
    edit_manifest(folder, lambda data: data["files"][ENDS].update(size=size))


def cut_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


BROKEN: dict[str, tuple[Callable[[Path], object], str, str | None, str]] = {
    "version": (
        lambda p: edit_manifest(p, lambda d: d.update(format="tml-converted/2")),
        MANIFEST, "", "has format 'tml-converted/2', not 'tml-converted/1'; convert the checkpoint",
    ),
    "no version": (
        lambda p: edit_manifest(p, lambda d: d.pop("format")), MANIFEST, "", "not a manifest"
    ),
    "no JSON": (lambda p: (p / MANIFEST).write_text("{"), MANIFEST, "", "not a manifest"),
    "no text": (lambda p: (p / MANIFEST).write_bytes(b"\xff"), MANIFEST, "", "not a manifest"),
    "a list": (lambda p: (p / MANIFEST).write_text("[]"), MANIFEST, "", "not a manifest"),
    "not done": (
        lambda p: edit_manifest(p, lambda d: d["files"].pop(NAMES[2])),
        MANIFEST, "", "3 of 4 files are done, layer-001.safetensors is not",
    ),
    "gone": (lambda p: (p / NAMES[2]).unlink(), NAMES[2], "", "cannot be read"),
    "cut": (lambda p: cut_last_byte(p / NAMES[1]), NAMES[1], None, "truncated"),
    "longer": (
        lambda p: (p / NAMES[1]).write_bytes((p / NAMES[1]).read_bytes() + b"x"),
        NAMES[1], "", r"has \d+ bytes, manifest.json says \d+",
    ),
    "another's": (lambda p: shutil.copy(p / NAMES[1], p / NAMES[2]), NAMES[2], "", "has .* bytes"),
    "renamed": (
        lambda p: change_one(p, lambda t: t.update(norm_E=t.pop("norm_D"))),
        ENDS, "norm_D", r"missing; expected F32 \(64,\)",
    ),
    "extra": (
        lambda p: change_one(p, lambda t: t.update(stray=torch.ones(1))), ENDS, "stray", "unknown"
    ),
    "shape": (
        lambda p: change_one(p, lambda t: t.update(norm_D=torch.ones(63))),
        ENDS, "norm_D", r"is F32 \(63,\), expected F32 \(64,\)",
    ),
    "dtype": (
        lambda p: change_one(p, lambda t: t.update(norm_D=torch.ones(64).half())),
        ENDS, "norm_D", r"is F16 \(64,\), expected F32 \(64,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_named_with_file_and_tensor(name: str, folder: Path) -> None:
    damage, file, tensor, reason = BROKEN[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=reason) as caught:
        InteractionModel.load(folder)
    assert caught.value.file == folder / file
    assert tensor is None or caught.value.tensor == tensor


@pytest.mark.parametrize("value", [None, 7, -1.5, "F64", [], [[1]], {}, {"x": 1}], ids=str)
def test_a_damaged_manifest_is_refused_whatever_is_in_it(value: object, folder: Path) -> None:
    """Every field in turn, and those of the tables in it. Whatever loads no model raises
    CheckpointError, and what is no field's type is never taken."""
    good = json.loads((folder / MANIFEST).read_text())
    paths = [(key,) for key in good]
    for key in ("config", "packing", "report"):
        paths += [(key, field) for field in good[key]]
    paths += [("files", ENDS), ("files", ENDS, "size"), ("config", "experts", "top_k")]
    paths += [("config", "patch", "mean"), ("config", "layout", "dmel")]
    for path in paths:
        data = json.loads(json.dumps(good))
        table = data
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = value
        (folder / MANIFEST).write_text(json.dumps(data))
        try:
            InteractionModel.load(folder)
        except CheckpointError:
            continue
        assert value not in ([[1]], {"x": 1}) or path == ("shards",), path
        assert path != ("config", "patch", "mean"), value


def test_checksums_are_looked_at_on_request(folder: Path) -> None:
    path = folder / NAMES[3]
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    InteractionModel.load(folder)
    with pytest.raises(CheckpointError, match="is altered: its checksum") as caught:
        InteractionModel.load(folder, verify=True)
    assert caught.value.file == path


@pytest.mark.parametrize("preset", ["tiny", "slice", "inkling-small"])
def test_a_configuration_comes_back_from_json(preset: str) -> None:
    for layout in ("ms200", "ms160", "ms80"):
        config = ModelConfig.preset(preset, layout=TurnLayout.preset(layout))
        assert from_data(ModelConfig, json.loads(json.dumps(asdict(config))), "config") == config


def test_the_command_writes_what_the_service_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ["convert", str(out), "--preset", "tiny", "--experts", "int4", "--search"]
    arguments += ["--random-weights", "7"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[0] == f"1 of 5: {ENDS} written"
    assert len(said.err.splitlines()) == 5
    assert "113 random from seed 7" in said.out and "5 files" in said.out
    model = load_model(out, "tiny", device="cpu")
    expected = InteractionModel.random(
        model.config, seed=7, dtype=torch.bfloat16, experts="int4", search=True
    )
    for name, tensor in tensors_of(expected.weights).items():
        assert_bitwise(tensors_of(model.weights)[name], tensor)
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, a terminal
    assert cli.main(arguments) == 0
    assert "layer-003.safetensors" in capsys.readouterr().err


DRAWN = ["out", "--random-weights", "0"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([*DRAWN, "--preset", "huge"], 2, "model 'huge' is not one of"),
        ([*DRAWN, "--preset", "tiny", "--experts", "int3"], 2, "experts: 'int3' is not"),
        ([*DRAWN, "--preset", "tiny", "--rest", "mxfp4"], 2, "rest: 'mxfp4' is not"),
        (
            [*DRAWN, "--preset", "tiny", "--rest", "fp8", "--dtype", "fp16"],
            2,
            "dtype: torch.float16 rows are not multiplied with packed weights",
        ),
        (
            [*DRAWN, "--preset", "tiny", "--experts", "fp8", "--search"],
            2,
            "search: int4 and int4_f16 scales are searched for, and neither",
        ),
        ([*DRAWN, "--preset", "tiny", "--device", "tpu"], 2, ""),
        ([*DRAWN, "--preset", "tiny", "--device", "meta"], 2, "--device meta is not cpu"),
        ([*DRAWN, "--preset", "tiny", "--device", "cuda"], 2, "--device cuda: there is no GPU"),
        (["out", "--preset", "tiny"], 2, "out alone: give CHECKPOINT too, or --random-weights"),
        (["nowhere", "out", "--preset", "tiny"], 1, "nowhere: cannot be read"),
        (
            [".", "--preset", "tiny", "--random-weights", "0"],
            1,
            ".: is not empty and no converted model",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_one_line(
    arguments: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["convert", *arguments]) == status
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.gpu
@pytest.mark.parametrize(("experts", "rest"), CASES)
def test_gpu_what_was_packed_there_or_here_comes_to_it_as_it_was(
    experts: str | None, rest: str | None, made: Path, tmp_path: Path
) -> None:
    """Packed on the GPU it is the model that packs while it is filled there; from a folder that a
    CPU packed, the GPU has the CPU's bits."""
    names: dict[str, Any] = {"experts": experts, "rest": rest}
    convert_checkpoint(None, tmp_path / "out", CONFIG, **names, device="cuda")
    model = InteractionModel.load(tmp_path / "out", device="cuda", verify=True)
    expected = InteractionModel.random(CONFIG, device="cuda", dtype=torch.bfloat16, **names)
    assert model.device.type == "cuda"
    for name, tensor in tensors_of(expected.weights).items():
        assert_bitwise(tensors_of(model.weights)[name], tensor)
    here = tensors_of(InteractionModel.load(made).weights)
    there = tensors_of(InteractionModel.load(made, device="cuda").weights)
    assert all(there[name].is_cuda for name in here)
    for name, tensor in here.items():
        assert_bitwise(there[name].cpu(), tensor)


def test_a_folder_of_before_there_were_mtp_layers_is_opened(folder: Path) -> None:
    expected = InteractionModel.load(folder)
    edit_manifest(folder, lambda data: data["config"].pop("mtp_layers"))
    model = InteractionModel.load(folder, config=CONFIG)
    for name, tensor in tensors_of(expected.weights).items():
        assert_bitwise(tensors_of(model.weights)[name], tensor)
