"""Routed experts packed a few at a time: the bits of all at once, and how little is ever there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import small_config
from test_packed import CASES

from tml_kernels.testing import LiveBytes, assert_bitwise
from tml_runtime.model import InteractionModel
from tml_runtime.model import packing as packing_module
from tml_runtime.model.checkpoint import SINGLE
from tml_runtime.model.convert import convert_checkpoint
from tml_runtime.model.converted import tensors_of
from tml_runtime.model.load import (
    Source,
    filled_experts,
    load_weights,
    random_weights,
    save_weights,
)
from tml_runtime.model.packing import Packing
from tml_runtime.model.weights import ModelWeights, Named, is_routed

CONFIG = small_config(experts=replace(small_config().experts, num_experts=7))
# A layer's routed experts are most of the model, and many pieces.
NUM_EXPERTS, FEW = 16, 2
WIDE = small_config(
    width=128, experts=replace(small_config().experts, num_experts=NUM_EXPERTS, width=256)
)
EXPERT = 2 * 256 * 128  # values of one expert's w13, the larger of its two matrices


@pytest.fixture
def pieces_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda count: monkeypatch.setattr(packing_module, "PIECE", count)


def assert_same_tensors(actual: ModelWeights, expected: ModelWeights) -> None:
    ours, theirs = tensors_of(actual), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert_bitwise(tensor, theirs[name])
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("experts", "rest"), CASES[:6])
def test_is_what_packing_whole_stacks_makes(
    experts: str, rest: str | None, dtype: torch.dtype, tmp_path: Path, pieces_of: Callable
) -> None:
    """Of random weights and of a checkpoint's, whatever the size of a piece."""
    plain = InteractionModel.random(CONFIG, seed=3, dtype=dtype)
    expected = plain.packed(experts=experts, rest=rest).weights
    save_weights(tmp_path / SINGLE, CONFIG, plain.weights)
    names: dict[str, Any] = {"device": "cpu", "dtype": dtype, "packing": Packing(experts, rest)}
    for count in (1, 3, 7, 8):
        pieces_of(count)
        assert_same_tensors(random_weights(CONFIG, seed=3, **names)[0], expected)
        assert_same_tensors(load_weights(tmp_path, CONFIG, seed=9, **names)[0], expected)


def test_a_search_is_the_same_in_pieces(pieces_of: Callable) -> None:
    expected = InteractionModel.random(CONFIG).packed(experts="int4", rest="fp8", search=True)
    unsearched = InteractionModel.random(CONFIG, experts="int4", rest="fp8")
    pieces_of(2)
    actual = InteractionModel.random(CONFIG, experts="int4", rest="fp8", search=True)
    assert_same_tensors(actual.weights, expected.weights)
    name = "layers.1.mlp.experts.w13.scale"
    assert not torch.equal(tensors_of(actual.weights)[name], tensors_of(unsearched.weights)[name])


@pytest.mark.parametrize("precision", [None, "int4", "nvfp4"])
def test_some_experts_are_the_first_of_all(precision: str | None, pieces_of: Callable) -> None:
    """Each is drawn by itself: how many there are changes none of them."""
    pieces_of(2)
    source = Source.random(CONFIG, seed=5)
    names: dict[str, Any] = {"device": "cpu", "dtype": torch.bfloat16, "precision": precision}
    few, every = (filled_experts(source, 1, count, **names) for count in (3, 7))
    assert (few.num_experts, every.num_experts) == (3, 7)
    for expert in range(3):
        for one, other in zip(few.dequantize(expert), every.dequantize(expert), strict=True):
            assert_bitwise(one, other)
    first, second = every.dequantize(0)[0], every.dequantize(1)[0]
    assert not torch.equal(first, second)


def final_bytes(weights: ModelWeights) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(weights).values())


def convert(path: Path, names: dict[str, Any]) -> int:
    """The bytes of the largest part."""
    made = convert_checkpoint(path, path / "out", WIDE, **names)
    return max(facts.size for facts in made.files.values())


@pytest.mark.parametrize("kind", ["random", "load", "convert"])
def test_only_a_few_experts_are_there_in_plain_form(
    kind: str, pieces_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the model, or for `convert` its largest part, there is less than a third of a layer's
    plain experts, temporary values and all; of the experts themselves one piece of one matrix."""
    names: dict[str, Any] = {"experts": "int4", "rest": "fp8", "dtype": torch.float32}
    if kind != "random":
        save_weights(tmp_path / SINGLE, WIDE, InteractionModel.random(WIDE).weights)
    filled: list[int] = []
    fill = Source.fill

    def spy(self: Source, named: Named, begin: int = 0) -> None:
        if is_routed(named.name):
            filled.append(named.view.numel())
        fill(self, named, begin)

    monkeypatch.setattr(Source, "fill", spy)
    pieces_of(FEW)
    with LiveBytes() as counter:
        if kind == "random":
            kept = final_bytes(InteractionModel.random(WIDE, **names).weights)
        elif kind == "load":
            kept = final_bytes(InteractionModel.load(tmp_path, config=WIDE, **names).weights)
        else:
            kept = convert(tmp_path, names)
    layer = NUM_EXPERTS * 1.5 * EXPERT
    assert max(filled) == FEW * EXPERT and sum(filled) == 2 * layer
    assert counter.peak - kept < 0.3 * 4 * layer


@pytest.mark.gpu
def test_gpu_only_a_few_experts_are_there_in_plain_form(pieces_of: Callable) -> None:
    """By the allocator's own count."""
    pieces_of(FEW)
    names: dict[str, Any] = {"experts": "int4", "rest": "fp8", "device": "cuda"}
    InteractionModel.random(WIDE, **names)  # what is made once, by libraries
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = InteractionModel.random(WIDE, **names)
    beside = torch.cuda.max_memory_allocated() - before - final_bytes(model.weights)
    assert beside < 0.3 * 4 * NUM_EXPERTS * 1.5 * EXPERT
