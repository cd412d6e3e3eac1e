"""How many tokens the seconds are that a session is to remember."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .errors import InputValueError
from .model import KvBudget, ModelConfig

TIMED = ("audio", "video", "reply")  # what comes with the clock
MAX_KEEP_S = 86_400.0  # a day


def kept_seconds(keep_s: float | None, keep_video_s: float | None) -> dict[str, float]:
    """What `budget_for` takes of the options --keep and --keep-video: all of TIMED, and pictures
    alone. Raises InputValueError."""
    seconds: dict[str, float] = {}
    for flag, kept_s, names in (
        ("--keep", keep_s, TIMED),
        ("--keep-video", keep_video_s, ("video",)),
    ):
        if kept_s is None:
            continue
        if not 0 < kept_s <= MAX_KEEP_S:  # also refuses nan
            raise InputValueError(f"{flag} {kept_s:g} is not in 0..{MAX_KEEP_S:g} (above 0)")
        seconds.update(dict.fromkeys(names, float(kept_s)))
    return seconds


def tokens_per_tick(config: ModelConfig, frame: tuple[int, int] | None) -> dict[str, int]:
    """What a session appends in every tick, by class of TIMED. frame: height and width of what it
    sees, None: nothing. Raises ValueError for a frame that cannot be cut in patches."""
    rows, columns = (0, 0) if frame is None else config.patch.grid(*frame)
    counts = (config.layout.audio_tokens, rows * columns, config.layout.num_steps)
    return dict(zip(TIMED, counts, strict=True))


def budget_for(
    config: ModelConfig, seconds: Mapping[str, float], frame: tuple[int, int] | None
) -> KvBudget:
    """Room for so many seconds of classes of TIMED; those without, text and anchors have the
    default."""
    rates = tokens_per_tick(config, frame)
    tokens = {
        # 10.2 s are 51 ticks of 200 ms, though 10.2 / 0.2 is not 51 to the last bit
        name: max(1, math.ceil(round(kept_s * 1000 / config.layout.period_ms * rates[name], 6)))
        for name, kept_s in seconds.items()
    }
    return KvBudget(**tokens)
