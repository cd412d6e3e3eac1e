"""A layer's experts made of a few: which rows they have, and that they are as much memory."""

from __future__ import annotations

import pytest
import torch
from small_model import small_config

from tml_kernels.moe import prepare_moe_weights
from tml_kernels.quant import FORMATS, dequantize
from tml_kernels.testing import assert_bitwise
from tml_runtime.model import InteractionModel
from tml_runtime.model.repeat import repeat_experts
from tml_runtime.model.weights import MoeWeights


@pytest.mark.parametrize("precision", ["bf16", *(n for n, f in FORMATS.items() if f.packed)])
def test_rows_are_moved_in_blocks(precision: str) -> None:
    generator = torch.Generator().manual_seed(1)
    w13 = torch.randn(3, 512, 96, generator=generator).bfloat16()
    w2 = torch.randn(3, 96, 256, generator=generator).bfloat16()  # not whole blocks
    few = prepare_moe_weights(w13, w2, layout="interleaved", precision=precision, inplace=False)
    many = repeat_experts(few, 8)
    assert many.num_experts == 8 and many.order == few.order
    for expert in range(8):
        turn, number = divmod(expert, 3)
        moved = dequantize(few.w13, number).roll(turn * 128, 0)
        assert_bitwise(dequantize(many.w13, expert), moved)
        assert_bitwise(dequantize(many.w2, expert), dequantize(few.w2, number))


def test_a_model_of_few_experts_has_the_shapes_of_the_whole() -> None:
    config = small_config()
    whole = InteractionModel.random(config, experts="int4")
    few = InteractionModel.random(config, experts="int4", distinct_experts=2)
    for one, other in zip(whole.weights.layers, few.weights.layers, strict=True):
        if isinstance(one.mlp, MoeWeights):
            assert isinstance(other.mlp, MoeWeights)
            assert one.mlp.experts.w13.nbytes == other.mlp.experts.w13.nbytes
            assert_bitwise(one.mlp.gate_A_D, other.mlp.gate_A_D)
            storage = other.mlp.experts.w2.data.untyped_storage()
            assert storage.nbytes() == other.mlp.experts.w2.data.nbytes


@pytest.mark.parametrize("count", [0, 10_000])
def test_a_wrong_number_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"distinct_experts={count} is not in 1\.\."):
        InteractionModel.random(small_config(), distinct_experts=count)
