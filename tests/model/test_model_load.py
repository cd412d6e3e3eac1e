"""Checkpoints: transformers' own as the published layout, ours as a round trip, broken ones."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from inkling_oracle import random_inkling
from safetensors.torch import load_file, save_file
from small_model import BIG, small_config

from tml_kernels.testing import assert_bitwise
from tml_runtime.errors import TmlRuntimeError
from tml_runtime.model import CheckpointError, InteractionModel
from tml_runtime.model.checkpoint import INDEX, SINGLE
from tml_runtime.model.load import save_weights
from tml_runtime.model.weights import FLOW_PREFIX, named_tensors

CONFIG = small_config()


def assert_same_weights(actual: InteractionModel, expected: InteractionModel) -> None:
    pairs = zip(
        named_tensors(CONFIG, actual.weights), named_tensors(CONFIG, expected.weights), strict=True
    )
    for ours, theirs in pairs:
        assert_bitwise(ours.view, theirs.view)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that transformers wrote."""
    folder = tmp_path_factory.mktemp("published")
    random_inkling(CONFIG).save_pretrained(folder)
    return folder


def test_every_published_tensor_is_where_it_belongs(published: Path) -> None:
    """The names and bits of transformers' file are those of our views, and nothing else is."""
    tensors = load_file(published / SINGLE)
    model = InteractionModel.load(published, config=CONFIG)
    ours = dict(named_tensors(CONFIG, model.weights))
    assert set(model.report.loaded) == set(tensors)
    assert set(model.report.random) == set(ours) - set(tensors)
    assert all(name.startswith(FLOW_PREFIX) for name in model.report.random)
    for name, tensor in tensors.items():
        assert_bitwise(ours[name].contiguous(), tensor)


def test_a_file_a_folder_and_shards_are_the_same(published: Path, tmp_path: Path) -> None:
    tensors = load_file(published / SINGLE)
    names = sorted(tensors)
    shards = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    weight_map = {name: shards[i % 3] for i, name in enumerate(names)}
    for shard in shards:
        save_file({n: tensors[n] for n in names if weight_map[n] == shard}, tmp_path / shard)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    expected = InteractionModel.load(published, config=CONFIG)
    assert_same_weights(InteractionModel.load(published / SINGLE, config=CONFIG), expected)
    assert_same_weights(InteractionModel.load(tmp_path, config=CONFIG), expected)


def test_shards_that_transformers_writes(published: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    oracle = random_inkling(CONFIG)
    oracle.save_pretrained(tmp_path / "one")
    oracle.save_pretrained(tmp_path / "many", max_shard_size="200KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert_same_weights(
        InteractionModel.load(tmp_path / "many", config=CONFIG),
        InteractionModel.load(tmp_path / "one", config=CONFIG),
    )


def test_our_own_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    """The speech head included, and readable by the safetensors package."""
    model = InteractionModel.random(CONFIG, seed=3)
    save_weights(tmp_path / SINGLE, CONFIG, model.weights)
    loaded = InteractionModel.load(tmp_path, config=CONFIG, seed=4)
    assert_same_weights(loaded, model)
    assert loaded.report.random == () and loaded.report.ignored == ()
    theirs = load_file(tmp_path / SINGLE)
    for name, view in named_tensors(CONFIG, model.weights):
        assert_bitwise(theirs[name], view.contiguous())


def test_dtypes_are_converted_once(published: Path, tmp_path: Path) -> None:
    tensors = load_file(published / SINGLE)
    save_file({name: t.bfloat16() for name, t in tensors.items()}, tmp_path / SINGLE)
    model = InteractionModel.load(tmp_path, config=CONFIG, dtype=torch.bfloat16)
    for name, view in named_tensors(CONFIG, model.weights):
        if name in tensors:
            assert_bitwise(view.float().contiguous(), tensors[name].bfloat16().float())
    assert model.weights.norm_D.dtype == torch.float32
    assert model.weights.unembed_V_D.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="float64"):
        InteractionModel.load(tmp_path, config=CONFIG, dtype=torch.float64)


def test_what_is_random_or_ignored_is_said(
    published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = load_file(published / SINGLE) | {"model.mtp.layers.0.norm.weight": torch.ones(4)}
    save_file(tensors, tmp_path / SINGLE)
    first = InteractionModel.load(tmp_path, config=CONFIG, seed=5)
    assert first.report.ignored == ("model.mtp.layers.0.norm.weight",)
    assert "19 random from seed 5 (model.flow.cond" in caplog.text
    assert "1 ignored" in caplog.text
    again = InteractionModel.load(tmp_path, config=CONFIG, seed=5)
    other = InteractionModel.load(tmp_path, config=CONFIG, seed=6)
    assert_same_weights(first, again)
    assert not torch.equal(first.weights.flow.cond_W_D, other.weights.flow.cond_W_D)
    assert InteractionModel.random(CONFIG).report.loaded == ()


NORM = "model.llm.norm.weight"
LAST = "model.flow.output_bias"


def edit_header(path: Path, edit: Callable[[dict], None]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit_entry(path: Path, **fields: object) -> None:
    edit_header(path, lambda header: header[NORM].update(fields))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


BROKEN: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing": (lambda p: rewrite(p, lambda t: t.pop(NORM)), NORM, "missing; expected shape"),
    "extra": (
        lambda p: rewrite(p, lambda t: t.update(stray=torch.ones(2))),
        "stray",
        "unknown to this model",
    ),
    "half a speech head": (lambda p: rewrite(p, lambda t: t.pop(LAST)), LAST, "other parts"),
    "shape": (
        lambda p: rewrite(p, lambda t: t.update({NORM: torch.ones(63)})),
        NORM,
        r"has shape \(63,\), expected \(64,\)",
    ),
    "transposed": (
        lambda p: rewrite(p, lambda t: t.update({NORM: torch.ones(1, 64)})),
        NORM,
        r"has shape \(1, 64\)",
    ),
    "integers": (
        lambda p: rewrite(p, lambda t: t.update({NORM: torch.ones(64, dtype=torch.int32)})),
        NORM,
        "dtype I32 is not one of",
    ),
    "cut in the data": (lambda p: p.write_bytes(p.read_bytes()[:-4]), LAST, "truncated: "),
    "cut in the header": (lambda p: p.write_bytes(p.read_bytes()[:99]), "", "truncated: "),
    "cut in the length": (lambda p: p.write_bytes(p.read_bytes()[:7]), "", "7 bytes"),
    "empty": (lambda p: p.write_bytes(b""), "", "cannot be read"),
    "absent": (lambda p: p.unlink(), "", "cannot be read"),
    "not this format": (lambda p: p.write_bytes(b"PK" + bytes(100)), "", "header"),
    "not JSON": (lambda p: p.write_bytes(struct.pack("<Q", 4) + b"{]{]"), "", "not JSON"),
    "a list": (lambda p: p.write_bytes(struct.pack("<Q", 2) + b"[]"), "", "not a table"),
    "no shape": (
        lambda p: edit_header(p, lambda h: h[NORM].pop("shape")),
        NORM,
        "malformed",
    ),
    "negative shape": (lambda p: edit_entry(p, shape=[-64]), NORM, "malformed"),
    "offsets": (lambda p: edit_entry(p, data_offsets=[8, 4]), NORM, "takes 256 bytes, it has -4"),
    "far offsets": (lambda p: edit_entry(p, data_offsets=[0, 2**60]), NORM, "truncated"),
    "wrong size": (lambda p: edit_entry(p, shape=[65]), NORM, "takes 260 bytes, it has 256"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_tensor_and_reason(name: str, tmp_path: Path) -> None:
    damage, tensor, reason = BROKEN[name]
    file = tmp_path / SINGLE
    save_weights(file, CONFIG, InteractionModel.random(CONFIG).weights)
    damage(file)
    with pytest.raises(CheckpointError, match=reason) as caught:
        InteractionModel.load(tmp_path, config=CONFIG)
    assert isinstance(caught.value, (TmlRuntimeError, ValueError))
    assert caught.value.tensor == tensor
    assert caught.value.file in (file, tmp_path)
    assert str(caught.value.file) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda index: index.pop("weight_map"), "not an index of shards"),
        (lambda index: index["weight_map"].update({NORM: "../a.safetensors"}), "not beside"),
        (lambda index: index["weight_map"].update({NORM: "a.safetensors"}), "cannot be read"),
        (lambda index: index["weight_map"].update(stray="model.safetensors"), "the index says"),
        (lambda index: index["weight_map"].pop(NORM), f"{NORM}: not in {INDEX}"),
        (lambda index: index.update(weight_map=[1]), "not an index of shards"),
    ],
    ids=["no map", "elsewhere", "no shard", "not in shard", "not in index", "a list"],
)
def test_a_broken_index_is_named(change: Callable, reason: str, tmp_path: Path) -> None:
    model = InteractionModel.random(CONFIG)
    save_weights(tmp_path / SINGLE, CONFIG, model.weights)
    names = [name for name, _ in named_tensors(CONFIG, model.weights)]
    index = {"weight_map": dict.fromkeys(names, SINGLE)}
    (tmp_path / INDEX).write_text(json.dumps(index))
    InteractionModel.load(tmp_path, config=CONFIG)
    change(index)
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=reason):
        InteractionModel.load(tmp_path, config=CONFIG)


LOAD_IN_LITTLE_MEMORY = """
import resource, sys, torch
from small_model import BIG
from tml_runtime.model import InteractionModel

torch.set_num_threads(1)  # their stacks would count
status = open("/proc/self/status").read().split()
used = 1024 * int(status[status.index("VmData:") + 1])
limit = used + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
InteractionModel.load(sys.argv[1], config=BIG)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux alone")
@pytest.mark.parametrize(("megabytes", "fits"), [(130, True), (90, False)])
def test_loading_takes_the_memory_of_the_weights_once(
    megabytes: int, fits: bool, tmp_path: Path
) -> None:
    """103 MB of weights, and not one large tensor more; the second limit shows that it binds."""
    path = tmp_path / "big.safetensors"
    save_weights(path, BIG, InteractionModel.random(BIG).weights)
    done = subprocess.run(
        [sys.executable, "-c", LOAD_IN_LITTLE_MEMORY, str(path), str(megabytes * 1_000_000)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode == 0) == fits, done.stderr[-2000:]
    assert fits or "alloc" in done.stderr
