"""Small Llama-like models, and what they say by StreamingLLM's rule, written out in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from small_models import SIZES, randomise
from torch import Tensor

LIKE_LLAMA = {**SIZES, "num_hidden_layers": 3, "intermediate_size": 96, "head_dim": 16}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_yarn": ("Llama", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {}),
    "qwen3_sliding": (
        "Qwen3", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
    ),
    "mistral": ("Mistral", {"sliding_window": 20}),
    "gemma2": ("Gemma2", {"sliding_window": 20, "attn_logit_softcapping": 3.0}),
}  # fmt: skip


def make_model(name: str, **given: Any) -> Any:
    family, own = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**LIKE_LLAMA, **own, **given})
    return randomise(getattr(transformers, f"{family}ForCausalLM")(config).eval())


class Streaming:
    """A Llama or Qwen3 that keeps the un-rotated keys of all tokens. Every query of a layer of full
    attention sees the sinks, the window and its own forward's tokens before it, at positions 0, 1,
    2... within them; pages of the window are dropped after a forward, when over `num_pages`."""

    def __init__(self, model: Any, *, num_sinks: int, num_pages: int, page_rows: int) -> None:
        self.model = copy.deepcopy(model).double()
        self.num_sinks, self.num_pages, self.page_rows = num_sinks, num_pages, page_rows
        self.past: list[list[Tensor]] = [[] for _ in model.model.layers]  # [key, value]
        self.length = self.num_dropped = 0

    def forward(self, ids_B_T: Tensor) -> Tensor:
        base = self.model.model
        h_B_T_D = base.embed_tokens(ids_B_T)
        for layer, past in zip(base.layers, self.past, strict=True):
            h_B_T_D = h_B_T_D + self._attention(
                layer.self_attn, past, layer.input_layernorm(h_B_T_D)
            )
            h_B_T_D = h_B_T_D + layer.mlp(layer.post_attention_layernorm(h_B_T_D))
        self.length += ids_B_T.shape[1]
        pages = -(-(self.length - self.num_sinks) // self.page_rows)
        self.num_dropped = max(0, pages - self.num_pages) * self.page_rows
        return self.model.lm_head(base.norm(h_B_T_D))

    def _attention(self, attention: Any, past: list[Tensor], x_B_T_D: Tensor) -> Tensor:
        q, k, v = (
            project(x_B_T_D).unflatten(-1, (-1, attention.head_dim))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        past[:] = (
            [torch.cat(pair, 1) for pair in zip(past, (k, v), strict=True)] if past else [k, v]
        )
        place_L, window = torch.arange(past[0].shape[1]), getattr(attention, "sliding_window", None)
        if window is None:  # else at its place in the text
            kept_L = (place_L < self.num_sinks) | (place_L >= self.num_sinks + self.num_dropped)
            k, v = (x[:, kept_L] for x in past)
            place_L = torch.arange(k.shape[1])
        else:
            k, v = past
        place_T = place_L[-q.shape[1] :]
        distance_T_L = place_T[:, None] - place_L
        hidden_T_L = distance_T_L < 0
        if window is not None:
            hidden_T_L |= distance_T_L >= window
        groups = q.shape[2] // k.shape[2]
        q_B_H_T_C = self._rotate(q, place_T).transpose(1, 2)
        k_B_H_L_C = self._rotate(k, place_L).transpose(1, 2).repeat_interleave(groups, 1)
        v_B_H_L_C = v.transpose(1, 2).repeat_interleave(groups, 1)
        logit_B_H_T_L = q_B_H_T_C @ k_B_H_L_C.transpose(2, 3) * attention.scaling
        weight_B_H_T_L = logit_B_H_T_L.masked_fill(hidden_T_L, float("-inf")).softmax(-1)
        return attention.o_proj((weight_B_H_T_L @ v_B_H_L_C).transpose(1, 2).flatten(2))

    def _rotate(self, x_B_L_H_C: Tensor, place_L: Tensor) -> Tensor:
        rotary = self.model.model.rotary_emb
        angle_L_1_B = place_L[:, None, None] * rotary.inv_freq.double()
        cos, sin = angle_L_1_B.cos(), angle_L_1_B.sin()
        low, high = x_B_L_H_C.chunk(2, -1)
        turned = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
        return turned * rotary.attention_scaling
