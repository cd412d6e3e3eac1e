"""Our two paths against transformers' Inkling with the same weights, loaded from its checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inkling_oracle import (
    IDS,
    inkling_logits,
    inkling_pixels,
    norm_once,
    random_inkling,
)
from small_model import small_config
from torch import Tensor
from transformers import InklingForCausalLM

from tml_kernels.ops.patch_embed import PATCH_40
from tml_kernels.testing import assert_matches, relative_l2
from tml_runtime.model import InteractionModel, ModelConfig
from tml_runtime.model.config import ExpertSpec, HeadSpec, Vocabulary

LIMIT = 1e-4
ALL_TOKENS = Vocabulary(size=100, num_valid=100, silence=0, missing=1, delegate=2, yield_turn=3)

CONFIGS = {
    # Window and extents shorter than the sequence, the scaling grows from token 16 on.
    "short": small_config(),
    # Window and extents longer than the sequence; no grouping of heads; no dense layer.
    "long": small_config(
        local_heads=HeadSpec(num_heads=2, num_kv_heads=2, head_width=32, extent=200, window=200),
        global_heads=HeadSpec(num_heads=4, num_kv_heads=4, head_width=16, extent=300),
        dense_layers=(),
        experts=ExpertSpec(num_experts=8, top_k=3, num_shared=2, width=16, route_scale=8.0),
        tau_floor=None,
    ),
    # One KV head for all; head counts and widths that differ by layer, no powers of two.
    "grouped": small_config(
        local_heads=HeadSpec(num_heads=6, num_kv_heads=1, head_width=8, extent=5, window=5),
        global_heads=HeadSpec(num_heads=3, num_kv_heads=1, head_width=24, extent=40),
        d_rel=3,
        experts=ExpertSpec(num_experts=5, top_k=5, num_shared=3, width=48, route_scale=1.0),
    ),
    # Only global layers, an extent of one, a scaling from the first token on, no padding rows.
    "global": small_config(
        global_heads=HeadSpec(num_heads=4, num_kv_heads=2, head_width=16, extent=1),
        global_layers=(0, 1, 2),
        vocab=ALL_TOKENS,
        logits_divisor=24.0,
        tau_floor=1,
        tau_alpha=0.7,
    ),
    # Only local layers, a window of one: every token sees itself alone.
    "local": small_config(
        local_heads=HeadSpec(num_heads=4, num_kv_heads=4, head_width=16, extent=1, window=1),
        global_layers=(),
        num_layers=2,
    ),
    # Only dense layers, wider than deep.
    "dense": small_config(
        width=96, num_layers=4, global_layers=(1, 3), dense_layers=(0, 1, 2, 3), dense_width=64
    ),
    # One expert of many for each token.
    "sparse": small_config(
        dense_layers=(1,),
        experts=ExpertSpec(num_experts=16, top_k=1, num_shared=1, width=24, route_scale=2.5),
    ),
}


class Sequence:
    """Text, two frame pairs, text, sound, text; as transformers and as we take it."""

    def __init__(self, config: ModelConfig) -> None:
        self.side = config.patch.patch
        self.frames = torch.randint(0, 256, (2, 2, self.side, 2 * self.side, 3), dtype=torch.uint8)
        dmel = config.layout.dmel
        self.levels = torch.randint(0, dmel.num_levels, (30, dmel.num_bands), dtype=torch.uint8)
        self.texts = [torch.randint(12, 90, (n,)).tolist() for n in (7, 5, 11)]

    def expected(self, config: ModelConfig, oracle: torch.nn.Module) -> Tensor:
        pixels = inkling_pixels(self.frames, config.patch)
        pixels = pixels.unflatten(0, (2, 3))[:, :2].flatten(0, 1)  # without the extra column
        first, second, third = self.texts
        image, audio = [IDS.image] * len(pixels), [IDS.audio] * len(self.levels)
        ids = [*first, *image, *second, *audio, *third]
        return inkling_logits(oracle, ids, levels_T_B=self.levels, pixels=pixels)

    def tokens(self, model: InteractionModel) -> Tensor:
        first, second, third = (model.embed_text(ids) for ids in self.texts)
        image, audio = model.embed_frames(self.frames), model.embed_levels(self.levels)
        return torch.cat([first, image, second, audio, third])


def our_logits(model: InteractionModel, x_T_D: Tensor) -> list[Tensor]:
    """Of both paths: the whole sequence at once, and streamed in several passes."""
    state = model.new_state(3, max_append=24)
    start = torch.tensor([0, len(x_T_D)], dtype=torch.int32)
    h_T_D = model.append(state, x_T_D, start, torch.tensor([1], dtype=torch.int32))
    both = [model.forward(x_T_D), model.logits(h_T_D)]
    num_valid = model.config.vocab.num_valid
    for logits in both:
        assert (logits[:, num_valid:] == float("-inf")).all()
    return [logits[:, :num_valid] for logits in both]


def check(config: ModelConfig, folder: Path) -> None:
    oracle = random_inkling(config)
    oracle.save_pretrained(folder)
    sequence = Sequence(config)
    norm_once(oracle)
    expected = sequence.expected(config, oracle)
    model = InteractionModel.load(folder, config=config)
    for ours in our_logits(model, sequence.tokens(model)):
        assert_matches(ours, expected, limit=LIMIT)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Text, sound and pictures in one sequence."""
    check(CONFIGS[name], tmp_path)


def test_text_logits_are_those_of_the_text_only_class(tmp_path: Path) -> None:
    config = CONFIGS["short"]
    oracle = random_inkling(config)
    oracle.save_pretrained(tmp_path)
    text_only = InklingForCausalLM(oracle.config.text_config).eval()
    text_only.set_attn_implementation("eager")
    text_only.model, text_only.lm_head = oracle.model.language_model, oracle.lm_head
    ids = torch.randint(12, 90, (40,))
    expected = text_only(input_ids=ids[None], use_cache=False).logits[0]
    model = InteractionModel.load(tmp_path, config=config)
    for ours in our_logits(model, model.embed_text(ids.tolist())):
        assert_matches(ours, expected, limit=LIMIT)


@pytest.mark.slow
def test_true_patch_tower(tmp_path: Path) -> None:
    check(replace(CONFIGS["short"], patch=PATCH_40), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"tau_floor": None},
        {"tau_alpha": 0.2},
        {"logits_divisor": 2.01},
        {"norm_eps": 1e-2},
        {"global_layers": (2,)},
        {"experts": replace(CONFIGS["short"].experts, route_scale=2.6)},
        {"experts": replace(CONFIGS["short"].experts, top_k=1)},
    ],
    ids=str,
)
def test_the_comparison_sees_a_wrong_field(change: dict) -> None:
    """Each field that no weight's shape shows moves the logits by more than the limit."""
    config = replace(
        CONFIGS["short"], global_heads=replace(CONFIGS["short"].global_heads, extent=8)
    )
    model = InteractionModel.random(config)
    x_T_D = Sequence(config).tokens(model)
    expected = model.forward(x_T_D)[:, : config.vocab.num_valid]
    other = InteractionModel(replace(config, **change), model.weights, model.report)
    moved = other.forward(x_T_D)[:, : config.vocab.num_valid]
    assert relative_l2(moved, expected) > 10 * LIMIT
