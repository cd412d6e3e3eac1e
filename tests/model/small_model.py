"""A model small enough for every test, with every kind of layer."""

from __future__ import annotations

from dataclasses import replace

from tml_kernels.ops.patch_embed import PatchSpec
from tml_runtime.model import ModelConfig
from tml_runtime.model.config import ExpertSpec, FlowSpec, HeadSpec, Vocabulary

# What transformers plans for 8x8 patches in three layers: narrow enough for every test.
PATCH_8 = PatchSpec(patch=8, folds=(2, 4), widths=(64, 192))


def small_config(**changes: object) -> ModelConfig:
    """A global and two local layers, one of the three dense; `changes` are fields of it."""
    config = ModelConfig(
        name="small",
        width=64,
        num_layers=3,
        local_heads=HeadSpec(num_heads=4, num_kv_heads=2, head_width=16, extent=8, window=8),
        global_heads=HeadSpec(num_heads=4, num_kv_heads=2, head_width=16, extent=12),
        global_layers=(1,),
        d_rel=4,
        dense_layers=(0,),
        dense_width=96,
        experts=ExpertSpec(num_experts=4, top_k=2, num_shared=1, width=32, route_scale=2.5),
        vocab=Vocabulary(
            size=128, num_valid=100, silence=96, missing=97, delegate=98, yield_turn=99
        ),
        logits_divisor=2.0,
        patch=PATCH_8,
        flow=FlowSpec(width=32, depth=1, num_steps=2),
        tau_floor=16,
    )
    return replace(config, **changes)


# Two tensors of 51 MB, in the embedding and the unembedding; everything else is 1 MB.
BIG = small_config(vocab=Vocabulary(200_000, 200_000, 0, 1, 2, 3))
