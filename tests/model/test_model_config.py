from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from small_model import small_config

from tml_kernels.ops.dmel import DMEL_40HZ
from tml_runtime.model import ModelConfig, TurnLayout
from tml_runtime.model.config import MTP_LAYERS, ExpertSpec, FlowSpec, HeadSpec, Vocabulary
from tml_runtime.model.weights import FLOW_PREFIX, empty_weights, named_tensors

LAYOUT = TurnLayout()
CONFIG = small_config()


def num_parameters(config: ModelConfig, *, flow: bool = False) -> int:
    named = named_tensors(config, empty_weights(config, device="meta", dtype=torch.bfloat16))
    return sum(view.numel() for name, view in named if name.startswith(FLOW_PREFIX) == flow)


def test_inkling_small_has_the_published_size() -> None:
    """257.7 B routed and 5.95 B other parameters, the multi-token-prediction layers aside."""
    config = ModelConfig.preset("inkling-small")
    experts = config.experts
    num_moe = config.num_layers - len(config.dense_layers)
    routed = num_moe * experts.num_experts * 3 * config.width * experts.width
    assert routed == 257_698_037_760
    assert abs((num_parameters(config) - routed) / 1e9 - 5.95) < 0.1
    assert len(config.global_layers) == 7 and config.num_layers - 7 == 35
    assert config.heads(5) is config.global_heads and config.heads(6) is config.local_heads


def test_the_published_mtp_layers() -> None:
    """Eight of 279 M parameters each, which no preset has unless it is asked for them."""
    config = ModelConfig.preset("inkling-small")
    assert config.mtp_layers == () and len(MTP_LAYERS) == 8
    before = num_parameters(config)
    for layers in (MTP_LAYERS[:1], MTP_LAYERS):
        more = num_parameters(replace(config, mtp_layers=layers)) - before
        assert abs(more / len(layers) / 1e6 - 279) < 1
    blocks = replace(config, mtp_layers=MTP_LAYERS).mtp_blocks
    assert blocks.global_layers == (1, 3) and blocks.dense_layers == tuple(range(8))
    assert blocks.heads(0) == config.local_heads and blocks.heads(1) == config.global_heads


def test_slice_differs_in_depth_alone() -> None:
    full, part = ModelConfig.preset("inkling-small"), ModelConfig.preset("slice")
    depth = {name: getattr(full, name) for name in ("name", "num_layers")}
    depth |= {name: getattr(full, name) for name in ("global_layers", "dense_layers")}
    assert replace(part, **depth) == full
    assert 2 <= part.num_layers <= 4 and len(part.global_layers) == 1


def test_tiny_is_small() -> None:
    config = ModelConfig.preset("tiny")
    assert 1e6 < num_parameters(config) + num_parameters(config, flow=True) < 3e6
    rows, columns = config.patch.grid(80, 80)
    assert rows * columns == 4
    assert all(token >= 256 for token in config.vocab.specials.values())  # bytes come first


@pytest.mark.parametrize(
    ("name", "samples", "tokens", "steps", "step_ms"),
    [("ms200", 3200, 4, 4, 50), ("ms160", 2560, 4, 4, 40), ("ms80", 1280, 2, 2, 40)],
)
def test_layout_presets(name: str, samples: int, tokens: int, steps: int, step_ms: int) -> None:
    layout = TurnLayout.preset(name)
    assert (layout.samples_per_tick, layout.audio_tokens) == (samples, tokens)
    assert (layout.num_steps, layout.step_ms, layout.mel_frames) == (steps, step_ms, steps)
    assert layout.max_tokens_per_tick == 1 + 64 + 256 + tokens + steps
    assert ModelConfig.preset("tiny", layout=layout).layout == layout


def test_the_40_hz_front_end_fits_a_200_ms_tick() -> None:
    layout = TurnLayout(dmel=DMEL_40HZ, num_steps=4, mel_frames_per_step=2)
    assert (layout.audio_tokens, layout.mel_frames, layout.step_ms) == (8, 8, 50)


def test_configurations_are_frozen_and_compare_by_value() -> None:
    assert TurnLayout.preset("ms200") == TurnLayout()
    assert hash(ModelConfig.preset("tiny")) == hash(ModelConfig.preset("tiny"))
    with pytest.raises(FrozenInstanceError):
        CONFIG.width = 3  # pyright: ignore


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ModelConfig.preset("huge"), "'huge' is not one of inkling-small, slice, tiny"),
        (lambda: TurnLayout.preset("ms100"), "'ms100' is not one of ms200, ms160, ms80"),
        (lambda: replace(LAYOUT, period_ms=80), "period_ms=80 .* 50 ms"),
        (lambda: replace(LAYOUT, period_ms=0), "period_ms=0"),
        (lambda: replace(LAYOUT, num_steps=5), "num_steps=5 .* = 5 output frames, .* holds 4"),
        (lambda: replace(LAYOUT, num_steps=0), "num_steps=0"),
        (lambda: replace(LAYOUT, mel_frames_per_step=2), "= 8 output frames"),
        (lambda: replace(LAYOUT, blocks=("text", "audio")), "blocks="),
        (lambda: replace(LAYOUT, blocks=("text", "audio", "audio")), "blocks="),
        (lambda: replace(LAYOUT, max_text_tokens=0), "max_text_tokens=0"),
        (lambda: replace(LAYOUT, max_video_tokens=-1), "max_video_tokens=-1"),
        (lambda: HeadSpec(3, 2, 16, 8), "num_heads=3 is not a multiple of num_kv_heads=2"),
        (lambda: HeadSpec(2, 0, 16, 8), "num_kv_heads=0"),
        (lambda: HeadSpec(2, 1, 16, 0), "extent=0"),
        (lambda: HeadSpec(2, 1, 16, 8, window=0), "window=0"),
        (lambda: ExpertSpec(4, 5, 1, 32, 1.0), "top_k=5 is over num_experts=4"),
        (lambda: ExpertSpec(4, 2, 0, 32, 1.0), "num_shared=0"),
        (lambda: ExpertSpec(4, 2, 1, 32, float("nan")), "route_scale=nan"),
        (lambda: FlowSpec(32, 2, 0), "num_steps=0"),
        (lambda: FlowSpec(31, 2, 1), "width=31 is odd"),
        (lambda: FlowSpec(32, 2, 1, guidance=float("inf")), "guidance=inf"),
        (lambda: Vocabulary(10, 11, 0, 1, 2, 3), "num_valid=11 is not in 1..size=10"),
        (lambda: Vocabulary(10, 8, 0, 1, 2, 8), "yield_turn=8 is not a token"),
        (lambda: Vocabulary(10, 8, 0, 1, 2, 2), "share an id"),
        (lambda: replace(CONFIG, width=0), "width=0"),
        (lambda: replace(CONFIG, global_layers=(3,)), "global_layers=.3,. is not ascending"),
        (lambda: replace(CONFIG, global_layers=(2, 1)), "global_layers="),
        (lambda: replace(CONFIG, dense_layers=(-1,)), "dense_layers="),
        (lambda: replace(CONFIG, local_heads=CONFIG.global_heads), "local_heads.window is None"),
        (lambda: replace(CONFIG, global_heads=CONFIG.local_heads), "global_heads.window=8"),
        (lambda: replace(CONFIG, tau_floor=0), "tau_floor=0"),
        (lambda: replace(CONFIG, tau_alpha=-0.1), "tau_alpha=-0.1"),
        (lambda: replace(CONFIG, logits_divisor=0.0), "logits_divisor=0.0"),
        (lambda: replace(CONFIG, norm_eps=0.0), "norm_eps=0.0"),
        (lambda: replace(CONFIG, mtp_layers=("near",)), "mtp_layers=.'near',.: expected 'local'"),
        (lambda: CONFIG.mtp_blocks, "num_layers=0 is not positive"),
    ],
)
def test_a_wrong_field_is_named(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
