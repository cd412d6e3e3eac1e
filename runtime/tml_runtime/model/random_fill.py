"""Random weights: the same for a seed, of the scale that each tensor is for."""

# Dimension key: R rows of a matrix, K columns.

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from .config import ModelConfig
from .weights import FLOW_PREFIX, Named, is_routed


def fill_random(config: ModelConfig, named: Named, seed: int, begin: int = 0) -> None:
    """Overwrite a tensor with random values: the same for a name, seed, shape and kind of device.

    Every routed expert is drawn by itself, so that some of a layer's are what they are among all.
    begin: the number of the first of them in the view.

    Matrices keep the scale of what they are given, so hidden states stay near one and sampling
    meets a spread of logits. Residual branches are shortened as the depth grows. Router biases are
    small, so that tokens take different experts, as balanced training has them do: with a tenth of
    a score's range, 32 tokens of `inkling-small` took 78 of 256 instead of 136.
    """
    name, view = named
    mean, std = _random_scale(config, name, view)
    generator = torch.Generator(view.device)

    def draw(part: Tensor, what: str) -> None:
        # One hash for both: torch's CPU generator takes 32 bits of a seed and drops the others.
        generator.manual_seed(zlib.crc32(f"{seed} {what}".encode()))
        part.normal_(mean, std, generator=generator)

    if not is_routed(name):
        draw(view, name)
        return
    for expert, matrix_R_K in enumerate(view, begin):
        draw(matrix_R_K, f"{name} {expert}")


def _random_scale(config: ModelConfig, name: str, view: Tensor) -> tuple[float, float]:
    """(mean, standard deviation) by what the tensor is for."""
    if "norm" in name or name.endswith("global_scale"):
        return 1.0, 0.05
    if name.endswith("_sconv.weight"):
        return 0.0, 0.2
    if name.endswith("gate.bias"):
        return 0.0, 0.01
    if name.endswith("rel_logits_proj.proj"):
        return 0.0, 0.25
    if name.endswith(("embed.weight", "audio.encoder.weight")) and "unembed" not in name:
        return 0.0, 1.0
    if name.startswith(FLOW_PREFIX) and (name.endswith("bias") or view.ndim == 1):
        return 0.0, 0.02
    std = view.shape[-1] ** -0.5
    if name.endswith("unembed.weight"):
        return 0.0, 2.0 * config.logits_divisor * std
    if name.endswith(("wo_ud.weight", "w2_md.weight", "w2_weight")):
        return 0.0, std * (2 * config.num_layers) ** -0.5
    return 0.0, std
