"""The multi-token-prediction layers of a checkpoint: read where the configuration asks for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import small_config

from tml_kernels.testing import assert_bitwise
from tml_runtime.errors import InputValueError
from tml_runtime.model import CheckpointError, InteractionModel, ModelState, TickInput
from tml_runtime.model.checkpoint import SINGLE
from tml_runtime.model.convert import convert_checkpoint
from tml_runtime.model.converted import tensors_of
from tml_runtime.model.load import save_weights
from tml_runtime.model.weights import MTP_PREFIX, named_tensors
from tml_runtime.parallel.share import check_sizes

PLAIN = small_config()
CONFIG = small_config(mtp_layers=("local", "global", "local"))
SECOND = f"{MTP_PREFIX}layers.1."


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model = InteractionModel.random(CONFIG, seed=3)
    save_weights(folder / SINGLE, CONFIG, model.weights)
    return folder


def assert_same(actual: InteractionModel, expected: InteractionModel) -> None:
    found = tensors_of(actual.weights)
    assert set(found) == set(tensors_of(expected.weights))
    for name, tensor in tensors_of(expected.weights).items():
        assert_bitwise(found[name], tensor)


def test_a_tick_is_the_same_with_them_as_without() -> None:
    """To the bit, and in a state of the same size: a tick does not draft unless it is told to."""
    models = [InteractionModel.random(config, seed=3) for config in (CONFIG, PLAIN)]
    states = [model.new_state(2) for model in models]
    held = [{name: t.shape for name, t in tensors_of_state(state).items()} for state in states]
    assert held[0] == held[1]
    for number in range(3):
        pcm_S_W = torch.randn(2, PLAIN.layout.samples_per_tick)
        slot_S = torch.tensor([1, 0], dtype=torch.int32)
        tick = TickInput(slot_S, pcm_S_W, torch.tensor([number == 1, False]))
        ours, theirs = (model.tick(s, tick) for model, s in zip(models, states, strict=True))
        assert_bitwise(ours.token_S_K, theirs.token_S_K)
        assert_bitwise(ours.mel_S_K_B, theirs.mel_S_K_B)


def tensors_of_state(state: ModelState) -> dict[str, torch.Tensor]:
    found = {name: t for name, t in vars(state).items() if isinstance(t, torch.Tensor)}
    for g, group in enumerate(state.groups):
        found |= {f"{g}.{name}": t for name, t in group.pages.contents().items()}
        found[f"{g}.conv"] = group.conv_L_N_2_3_W
    return found


def test_every_other_weight_has_the_bits_of_a_model_without_them() -> None:
    """So that drawing them changes nothing else."""
    ours = dict(named_tensors(CONFIG, InteractionModel.random(CONFIG, seed=3).weights))
    for name, view in named_tensors(PLAIN, InteractionModel.random(PLAIN, seed=3).weights):
        assert_bitwise(ours.pop(name), view)
    assert ours and all(name.startswith(MTP_PREFIX) for name in ours)
    assert all(view.float().std() > 0 for view in ours.values() if view.numel() > 1)


def test_they_come_back_whole(saved: Path) -> None:
    loaded = InteractionModel.load(saved, config=CONFIG, seed=4)
    assert_same(loaded, InteractionModel.random(CONFIG, seed=3))
    assert loaded.report.random == loaded.report.ignored == ()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_as_many_are_read_as_there_are_in_the_configuration(saved: Path, count: int) -> None:
    config = replace(CONFIG, mtp_layers=CONFIG.mtp_layers[:count])
    loaded = InteractionModel.load(saved, config=config)
    assert_same(loaded, InteractionModel.random(config, seed=3))
    layers = {name.split(".")[3] for name in loaded.report.ignored}
    assert layers == {"0", "1", "2"} - set("012"[:count])


@pytest.mark.parametrize(
    ("tensors", "name", "reason"),
    [
        ({SECOND + "input_proj.weight": None}, SECOND + "input_proj.weight", "missing"),
        (
            {SECOND + "input_proj.weight": torch.ones(64, 64)},
            SECOND + "input_proj.weight",
            r"has shape \(64, 64\), expected \(64, 128\)",
        ),
        ({SECOND + "norm.weight": torch.ones(64)}, SECOND + "norm.weight", "unknown to this"),
        # Of checkpoints whose layers chain in another way.
        ({f"{MTP_PREFIX}chain_norm.weight": torch.ones(64)}, "chain_norm.weight", "unknown to"),
    ],
    ids=["missing", "shape", "unknown", "chain norm"],
)
def test_what_does_not_fit_is_named(
    saved: Path, tmp_path: Path, tensors: dict, name: str, reason: str
) -> None:
    changed = load_file(saved / SINGLE) | tensors
    save_file({n: t for n, t in changed.items() if t is not None}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=reason) as caught:
        InteractionModel.load(tmp_path, config=CONFIG)
    assert caught.value.tensor.endswith(name)
    InteractionModel.load(tmp_path, config=PLAIN)  # which has nothing to do with them


def test_packing_leaves_them_plain_and_a_converted_folder_keeps_them(tmp_path: Path) -> None:
    plain = InteractionModel.random(CONFIG, seed=3)
    packed = plain.packed(experts="int4", rest="fp8")
    for name, tensor in tensors_of(packed.weights).items():
        if name.startswith("mtp."):
            assert tensor is tensors_of(plain.weights)[name]
    convert_checkpoint(
        None, tmp_path / "out", CONFIG, experts="int4", rest="fp8", dtype=torch.float32, seed=3
    )
    assert_same(InteractionModel.load(tmp_path / "out", config=CONFIG), packed)
    with pytest.raises(CheckpointError, match=r"config\.mtp_layers is"):
        InteractionModel.load(tmp_path / "out", config=PLAIN)


def test_ranks_refuse_them() -> None:
    check_sizes(PLAIN, 2)
    with pytest.raises(InputValueError, match=r"mtp_layers=.'local', 'global', 'local'. of model"):
        check_sizes(CONFIG, 2)
