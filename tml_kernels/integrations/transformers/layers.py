"""What a model's layers remember, found by asking it rather than its configuration's many names."""

# Dimension key: D model width, G KV heads, C head width, B = C / 2 rotary frequencies.

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._rope import rotate_ref
from .attention import PAGES, attend_alone
from .layerless import LayerlessCache
from .names import NAME

try:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
except ImportError as error:
    raise ImportError(
        "TmlCache needs transformers' DynamicCache, DynamicLayer and DynamicSlidingWindowLayer: "
        "pip install 'transformers>=5.17'"
    ) from error

_POSITION = 97  # far enough to turn every frequency that matters, exact in float32 and near
# Of `_turn_error`. In bfloat16 either key is rounded by 2^-9, cosines and sines included; another
# rotation is off by about 1, or by a thousandth where the two differ in the longest waves alone.
_TURN_LIMIT = 2e-2
_SERVED = ("full_attention", "sliding_attention")
# Their frequencies change with the length of the text.
_MOVING = ("dynamic", "longrope")


class LayerShape(NamedTuple):
    heads: tuple[int, int]  # KV heads, head width
    window: int | None
    dtype: torch.dtype
    device: torch.device


class _Recorder(LayerlessCache):
    """As a TmlCache that holds nothing yet, for one forward of one token."""

    def __init__(self, windows: Sequence[int | None]) -> None:
        super().__init__(windows)
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.attended: set[int] = set()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        self.seen[layer_idx] = key_states, value_states
        setattr(key_states, PAGES, _Arrival(self, layer_idx))
        return key_states, value_states


class _Arrival(NamedTuple):
    """Goes with the keys of a layer, as a TmlCache's pages do, and sees whether they come to the
    attention function."""

    recorder: _Recorder
    layer: int

    def arrive(self) -> None:
        self.recorder.attended.add(self.layer)

    def attend(self, *attention: Any) -> Tensor:
        return attend_alone(*attention)


def text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def layer_shapes(model: Any) -> list[LayerShape]:
    """Of every layer, from a forward of one token. Raises NotImplementedError for layers that are
    not full or sliding-window attention with keys as wide as values, for a model that reads the
    cache's layers and, where it attends by "tml", for one that gives attention other keys."""
    windows = _windows(model)
    recorder = _recorded(model, 0)
    seen = recorder.seen
    if sorted(seen) != list(range(len(windows))):
        raise _refusal(model, f"of {len(windows)} layers, those with keys are {sorted(seen)}")
    unread = sorted(seen.keys() - recorder.attended)
    if unread and text_config(model)._attn_implementation == NAME:
        raise _refusal(model, f"layers {unread} give attention other keys than the cache returned")
    shapes = []
    for layer, window in enumerate(windows):
        key_1_G_1_C, value_1_G_1_C = seen[layer]
        if key_1_G_1_C.shape != value_1_G_1_C.shape:
            shape = tuple(value_1_G_1_C.shape[1::2])
            raise _refusal(
                model,
                f"layer {layer} has keys of {tuple(key_1_G_1_C.shape[1::2])} heads and columns, "
                f"values of {shape}",
            )
        heads = (key_1_G_1_C.shape[1], key_1_G_1_C.shape[3])
        shapes.append(LayerShape(heads, window, key_1_G_1_C.dtype, key_1_G_1_C.device))
    kinds = {(shape.dtype, shape.device) for shape in shapes}
    if len(kinds) > 1:
        raise _refusal(
            model, f"its keys are of several dtypes or devices: {sorted(map(str, kinds))}"
        )
    return shapes


def _windows(model: Any) -> list[int | None]:
    """Of every layer, as the model's configuration has them; None for full attention."""
    config = text_config(model)
    types = getattr(config, "layer_types", None) or ()
    for layer, kind in enumerate(types):
        if kind not in _SERVED:
            raise _refusal(model, f"layer {layer} is {kind!r}, not one of {', '.join(_SERVED)}")
    windows: list[int | None] = []
    for layer, kept in enumerate(DynamicCache(config=config).layers):
        if type(kept) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise _refusal(model, f"layer {layer} keeps a {type(kept).__name__}")
        windows.append(getattr(kept, "sliding_window", None))
    if not types and getattr(config, "attention_chunk_size", None) is not None:
        raise _refusal(model, f"attention_chunk_size={config.attention_chunk_size}")
    return windows


def rope_phase(model: Any, layers: list[int]) -> Tensor:
    """int64 [B]: turns per position times 2^64 with which the keys of all `layers` are rotated.

    From the model's own frequencies, scaled or not, in float64; a token at two positions shows
    which of them are what turns its keys, those that come closest. Raises NotImplementedError where
    none do.
    """
    at_0, at_n = _recorded(model, 0).seen, _recorded(model, _POSITION).seen
    head_width = at_0[layers[0]][0].shape[-1]
    phases = [_as_phase(x_B) for x_B in _frequencies(model) if 2 * x_B.numel() == head_width]
    errors = [
        max(_turn_error(at_0[layer][0], at_n[layer][0], phase_B) for layer in layers)
        for phase_B in phases
    ]
    if not errors or min(errors) > _TURN_LIMIT:
        raise _refusal(
            model,
            f"num_sinks: the keys of layers {layers} are not rotated as rotary halves of all "
            "columns by frequencies that the model keeps, so sinks cannot be moved",
        )
    return phases[errors.index(min(errors))]


def _refusal(model: Any, why: str) -> NotImplementedError:
    return NotImplementedError(f"{type(model).__name__} is not served by TmlCache: {why}")


@torch.no_grad()
def _recorded(model: Any, position: int) -> _Recorder:
    """With (key, value) [1, G, 1, C] of each layer, of one token, which attends to itself alone, so
    that its position makes no difference but to the keys' rotation."""
    weight_V_D = model.get_input_embeddings().weight
    device, width = weight_V_D.device, weight_V_D.shape[-1]
    spread_D = torch.arange(1, width + 1, dtype=torch.float64, device=device) * 5.0**0.5 % 1.0
    recorder = _Recorder(_windows(model))
    named = {cache_argument(model): recorder}
    model(
        inputs_embeds=(2.0 * spread_D - 1.0).to(weight_V_D.dtype)[None, None],
        position_ids=torch.tensor([[position]], device=device),
        use_cache=True,
        **named,
    )
    return recorder


def cache_argument(model: Any) -> str:
    """past_key_values, which later versions call cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _frequencies(model: Any) -> list[Tensor]:
    """inv_freq [B] of every rotary embedding; raises where one changes with the text's length."""
    found = []
    for name, tensor in model.named_buffers():
        path, _, attribute = name.rpartition(".")
        if not attribute.endswith("inv_freq") or "original" in attribute or tensor.ndim != 1:
            continue
        kinds = getattr(model.get_submodule(path), "rope_type", None) or "default"
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        for kind in kinds:
            if any(moving in kind for moving in _MOVING):
                raise _refusal(
                    model, f"num_sinks: rope_type={kind!r} changes with the text's length"
                )
        found.append(tensor)
    return found


def _as_phase(inv_freq_B: Tensor) -> Tensor:
    turns_B = inv_freq_B.double() / (2.0 * math.pi)
    # A whole turn is none; what is left fits int64.
    return ((turns_B - turns_B.round()) * 2.0**64).round().to(torch.int64)


def _turn_error(key_1_G_1_C: Tensor, turned_1_G_1_C: Tensor, phase_B: Tensor) -> float:
    """Relative L2 of the second to the first turned by _POSITION; infinite where it is NaN."""
    position_1 = torch.tensor([_POSITION], device=phase_B.device)
    expected = rotate_ref(key_1_G_1_C[0].transpose(0, 1).double(), phase_B, position_1)
    error = (turned_1_G_1_C[0].transpose(0, 1).double() - expected).norm()
    error = error / expected.norm().clamp(min=1e-300)  # keys of zeros are turned by anything
    return float(error.nan_to_num(nan=math.inf))
