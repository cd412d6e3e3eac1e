"""transformers' Inkling with the shape of one of our configurations, and its input processors."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import InklingConfig, InklingFeatureExtractor, InklingForConditionalGeneration
from transformers.models.inkling.processing_inkling import InklingProcessor

from bench.layer_peers import config_fields
from tml_kernels.ops.patch_embed import PATCH_40, PatchSpec
from tml_runtime.model import ModelConfig


class Ids(NamedTuple):
    """Tokens that transformers replaces by features; ours to choose, below every vocabulary."""

    audio: int = 10
    image: int = 11


IDS = Ids()


def inkling_config(config: ModelConfig) -> InklingConfig:
    return InklingConfig(
        text_config=config_fields(config)
        | {
            "vocab_size": config.vocab.size,
            "unpadded_vocab_size": config.vocab.num_valid,
            "logits_mup_width_multiplier": config.logits_divisor,
        },
        audio_config={"mel_vocab_size": config.layout.dmel.num_levels},
        vision_config={
            "patch_size": config.patch.patch,
            "num_hidden_layers": len(config.patch.folds) + 1,
        },
        image_token_id=IDS.image,
        audio_token_id=IDS.audio,
        image_bos_token_id=8,
        audio_bos_token_id=9,
    )


def random_inkling(config: ModelConfig) -> InklingForConditionalGeneration:
    """In float32 and eager, with weights that all matter: norms, biases and scales included."""
    model = InklingForConditionalGeneration(inkling_config(config)).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name or name.endswith("global_scale"):
                tensor.copy_(1.0 + 0.1 * torch.randn_like(tensor))
            elif name.endswith("e_score_correction_bias"):
                tensor.copy_(0.1 * torch.randn_like(tensor))
            elif name.endswith(("conv1d.weight", "rel_logits_proj.proj", "embed_tokens.weight")):
                tensor.copy_(0.3 * torch.randn_like(tensor))
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn_like(tensor) * tensor.shape[-1] ** -0.5)
    return model


class NormOnce(torch.nn.Module):
    """The embedding norm once, on text where it is looked up, as transformers 5.23 has it.

    5.17 calls it twice in a forward: on the text, and again on the merged input.
    """

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.norm(x) if self.calls % 2 else x


def norm_once(model: InklingForConditionalGeneration) -> None:
    """Nothing to do where the norm belongs to the embedding (5.23)."""
    backbone = model.model.language_model
    if hasattr(backbone, "embed_norm"):
        backbone.embed_norm = NormOnce(backbone.embed_norm)


def inkling_logits(
    model: InklingForConditionalGeneration,
    ids: list[int],
    *,
    levels_T_B: Tensor | None = None,
    pixels: Tensor | None = None,
) -> Tensor:
    """[T, num_valid] of one whole sequence, without a cache."""
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor([ids]),
            audio_input_ids=None if levels_T_B is None else levels_T_B.long()[None],
            pixel_values=pixels,
            use_cache=False,
        )
    return out.logits[0]


def inkling_levels(pcm: np.ndarray) -> Tensor:
    """dMel levels [T, B] by transformers' feature extractor and its processor's bins."""
    features = InklingFeatureExtractor()([pcm], sampling_rate=16_000, return_tensors="pt")
    processor = SimpleNamespace(
        bin_centers=torch.linspace(-7.0, 2.0, 16, dtype=torch.float64).float(),
        dmel_min_value=-7.0,
        dmel_max_value=2.0,
    )
    return InklingProcessor._extract_dmel_bins(processor, features["input_features"])[0]


def inkling_pixels(frames_N_L_Y_X_3: Tensor, spec: PatchSpec) -> Tensor:
    """[T, L, P, P, 3] by the steps of transformers' image processor, frame after frame.

    The processor itself needs torchvision and repeats one image in place of a second frame; its
    patch-dividing function and what follows it do not. Always has the extra column.
    """
    divide = _divide_to_patches()
    mean = torch.tensor(PATCH_40.mean)[:, None, None] * 255.0
    std = torch.tensor(PATCH_40.std)[:, None, None] * 255.0
    groups = []
    for group in frames_N_L_Y_X_3:
        frames = []
        for frame in group:
            patches = []
            for patch in divide(frame.permute(2, 0, 1), spec.patch):
                _, height, width = patch.shape
                padded = torch.full((3, spec.patch, spec.patch), -1.0)
                padded[:, :height, :width] = patch
                patches.append((padded - mean) / std)
            frames.append(torch.stack(patches))
        groups.append(torch.stack(frames, dim=1))
    return torch.cat(groups).permute(0, 1, 3, 4, 2)


def _divide_to_patches() -> Callable[[Tensor, int], list[Tensor]]:
    """The function from its source: its module cannot be imported without torchvision."""
    spec = importlib.util.find_spec("transformers.models.inkling")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "image_processing_inkling.py").read_text()
    functions = [n for n in ast.parse(source).body if getattr(n, "name", "") == "divide_to_patches"]
    assert len(functions) == 1, "transformers moved divide_to_patches"
    scope: dict = {}
    exec(ast.unparse(functions[0]), {"torch": torch}, scope)
    return scope["divide_to_patches"]
