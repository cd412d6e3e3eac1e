"""Models for the demo and the service by the name of a preset: random weights or a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .errors import InputValueError
from .model import InteractionModel, ModelConfig
from .model.converted import is_converted
from .model.packing import Packing
from .sizes import total, weight_bytes
from .voices import GriffinLim, Levels

PRESETS = ("tiny", "slice", "inkling-small")
DEVICES = ("auto", "cpu", "cuda")
PLAIN = Packing()


class ModelChoiceError(InputValueError):
    """A model that cannot be made as asked here; says why."""


def random_model(
    preset: str, *, device: str = "auto", seed: int = 0, packing: Packing = PLAIN
) -> InteractionModel:
    """One of PRESETS, bfloat16 on a GPU and float32 on a CPU. auto: a GPU if there is one.

    Raises ModelChoiceError, also when its weights would not fit.
    """
    config, device, dtype = _choose(preset, device)
    needed, free = total(weight_bytes(config, packing, dtype)), _free_bytes(device)
    if free is not None and needed > 0.9 * free:
        raise ModelChoiceError(
            f"preset {preset!r} needs {needed / 1e9:.0f} GB for its weights in {dtype}, "
            f"and {device} has {free / 1e9:.0f} GB free: use --preset tiny, or --experts and --rest"
        )
    return InteractionModel.random(config, seed=seed, device=device, dtype=dtype, **vars(packing))


def load_model(
    checkpoint: Path, preset: str, *, device: str = "auto", seed: int = 0, packing: Packing = PLAIN
) -> InteractionModel:
    """A checkpoint of the shape of one of PRESETS, packed as it is loaded, or a converted one,
    which brings its dtype and packing.

    Raises ModelChoiceError, CheckpointError.
    """
    config, device, dtype = _choose(preset, device)
    given: dict[str, Any] = {"config": config, "device": device, **vars(packing)}
    if not is_converted(checkpoint):
        given |= {"seed": seed, "dtype": dtype}
    return InteractionModel.load(checkpoint, **given)


def vocoder_for(model: InteractionModel) -> GriffinLim:
    """What `Runtime` takes as `vocoder`: untrained speech is brought to the level of speech."""
    return GriffinLim(model.config.layout.dmel, Levels() if model.report.random else None)


def device_for(device: str) -> str:
    """cpu or cuda, of one of DEVICES. Raises ModelChoiceError."""
    if device not in DEVICES:
        raise ModelChoiceError(f"device {device!r} is not one of {', '.join(DEVICES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelChoiceError(
            "device 'cuda': torch sees no GPU here; `tml-runtime info` says more"
        )
    return device


def _choose(preset: str, device: str) -> tuple[ModelConfig, str, torch.dtype]:
    if preset not in PRESETS:
        raise ModelChoiceError(f"preset {preset!r} is not one of {', '.join(PRESETS)}")
    device = device_for(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return ModelConfig.preset(preset), device, dtype


def _free_bytes(device: str) -> int | None:
    """Memory that can be taken now; None where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:  # files that were read take memory too, and give it back
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
    except (OSError, ValueError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
