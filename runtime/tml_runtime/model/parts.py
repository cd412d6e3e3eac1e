"""What a state is made of: pages by group, and tensors by slot."""

# Dimension key: L layers of a group, N slots, D model width, F mel frames of an output step, B mel
# bands.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tml_kernels.kv_cache import CacheGroup, PageClass, SlotTensor

from .config import CONV_TAPS, HeadSpec, ModelConfig

PAGE_ROWS = 64


@dataclass(frozen=True)
class KvBudget:
    """How many tokens of each class a session's global layers keep at least, in whole pages.

    When a class has more, its oldest page goes; anchors stay, and more of them are refused. Local
    layers keep their window and `rewind` tokens before it, which bounds how far a rewind can go.
    """

    anchor: int = 64
    text: int = 1024
    audio: int = 1536
    video: int = 1024
    reply: int = 1536
    rewind: int = 256

    def __post_init__(self) -> None:
        for name, tokens in vars(self).items():
            if type(tokens) is not int or tokens < 1:
                raise ValueError(f"{name}={tokens!r}: expected a positive number of tokens")

    def pages(self) -> dict[PageClass, int]:
        """One page more than the tokens fill: the newest is still being filled."""
        tokens = {
            PageClass.ANCHOR: self.anchor,
            PageClass.TEXT: self.text,
            PageClass.AUDIO: self.audio,
            PageClass.VIDEO: self.video,
            PageClass.REPLY: self.reply,
        }
        return {page_class: -(-n // PAGE_ROWS) + 1 for page_class, n in tokens.items()}


def slot_tensors(
    config: ModelConfig,
    specs: Sequence[CacheGroup],
    num_slots: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    num_drafts: int = 0,
) -> dict[str, SlotTensor]:
    """All that slots hold beside their pages: `ModelState`'s tensors by name, and the taps of each
    group's K and V. specs: with the layers that draft. On device "meta" they take no memory."""
    layout = config.layout

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    taps = (config.num_layers + num_drafts, num_slots, CONV_TAPS, config.width)
    speech = (num_slots, layout.mel_frames_per_step, layout.dmel.num_bands)
    by_slot = {
        "attn_conv_L_N_3_D": SlotTensor(zeros(*taps), axis=1),
        "mlp_conv_L_N_3_D": SlotTensor(zeros(*taps), axis=1),
        "tail_N_W": SlotTensor(zeros(num_slots, layout.dmel.tail, dtype=torch.float32)),
        "token_N": SlotTensor(zeros(num_slots, dtype=torch.int64), reset=config.vocab.silence),
        "levels_N_F_B": SlotTensor(zeros(*speech, dtype=torch.uint8)),
        "draws_N": SlotTensor(zeros(num_slots, dtype=torch.int64)),
        "temperature_N": _setting(zeros(num_slots, dtype=torch.float32), 1.0),
        "top_k_N": _setting(zeros(num_slots, dtype=torch.int32), 0),
        "top_p_N": _setting(zeros(num_slots, dtype=torch.float32), 1.0),
        "min_p_N": _setting(zeros(num_slots, dtype=torch.float32), 0.0),
        "seed_N": _setting(zeros(num_slots, dtype=torch.int64), 0),
    }
    for g, spec in enumerate(specs):
        width = spec.num_kv_heads * spec.head_width
        conv = zeros(spec.num_layers, num_slots, 2, CONV_TAPS, width)
        by_slot[conv_name(g)] = SlotTensor(conv, axis=1)
    if num_drafts:
        by_slot["carry_L_N_D"] = SlotTensor(zeros(num_drafts, num_slots, config.width), axis=1)
    return by_slot


def conv_name(group: int) -> str:
    return f"conv_{group}"


def _setting(tensor: Tensor, reset: float) -> SlotTensor:
    return SlotTensor(tensor, reset=reset, is_setting=True)


def places_of(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """Of each layer: its group, in the order of `cache_groups`, and its place there."""
    by_group = [[i for i in config.layers if (i in config.global_layers) == g] for g in (0, 1)]
    place = {
        layer: (g, i)
        for g, layers in enumerate(filter(None, by_group))
        for i, layer in enumerate(layers)
    }
    return tuple(place[layer] for layer in config.layers)


def cache_groups(
    config: ModelConfig,
    num_slots: int,
    budget: KvBudget,
    longest: int,
    global_pages: int | None = None,
) -> list[CacheGroup]:
    """Of the local and the global layers, where there are any; in the order of `places_of`.
    longest: the most tokens that one session appends in one transaction."""
    num_global = len(config.global_layers)
    budgets = budget.pages()
    appended = -(-longest // PAGE_ROWS)
    window = config.local_heads.window
    assert window is not None
    reach = -(-(window + budget.rewind) // PAGE_ROWS)
    shapes: list[tuple[HeadSpec, int, int]] = [
        (config.local_heads, config.num_layers - num_global, reach + appended + 2),
        (config.global_heads, num_global, sum(budgets.values()) + appended + len(budgets)),
    ]
    return [
        CacheGroup(
            num_layers=num_layers,
            num_kv_heads=heads.num_kv_heads,
            head_width=heads.head_width,
            pages=global_pages
            if global_pages and heads.window is None
            else 1 + num_slots * columns,
            columns=columns,
            window=heads.window,
            history=0 if heads.window is None else budget.rewind,
            page_rows=PAGE_ROWS,
        )
        for heads, num_layers, columns in shapes
        if num_layers > 0
    ]
