"""What a Runtime is built with: its arguments checked, and the sizes that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .checks import FrameGrid, checked_ids
from .errors import InputTypeError, InputValueError
from .mailbox import MailboxSpec
from .model import ModelConfig, TurnLayout
from .model.config import Vocabulary
from .recall import PAST_TICKS
from .text import Tokenizer


def check_int(name: str, value: Any, *, at_least: int, at_most: int | None = None) -> None:
    if type(value) is not int:
        raise InputTypeError(f"{name}={value!r}: expected an int")
    if value < at_least:
        raise InputValueError(f"{name}={value} is less than {at_least}")
    if at_most is not None and value > at_most:
        raise InputValueError(f"{name}={value} is more than {at_most}")


def check_type(name: str, value: Any, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        raise InputTypeError(f"{name}={value!r}: expected a {kind.__name__}")


def checked_layout(config: ModelConfig, layout: TurnLayout | None) -> TurnLayout:
    check_type("layout", layout, TurnLayout)
    if layout is not None and layout != config.layout:
        raise InputValueError(f"{layout=} is not that of the model: {config.layout}")
    if config.patch.frames != 2:
        raise InputValueError(f"patch.frames={config.patch.frames}: video is taken in pairs")
    return config.layout


def checked_prompt(
    prompt: str | Sequence[int] | None, tokenizer: Tokenizer, vocab: Vocabulary, limit: int
) -> list[int]:
    """Token ids, at most `limit`."""
    if prompt is None:
        return []
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    ids = checked_ids(ids, vocab.num_valid).tolist()
    if len(ids) > limit:
        raise InputValueError(
            f"prompt: {len(ids)} tokens, but KvBudget.anchor={limit}: shorten "
            "it, or give the Runtime a budget with more"
        )
    return ids


def mailbox_spec(
    config: ModelConfig,
    layout: TurnLayout,
    max_frame_pairs: int,
    max_lead_ticks: int,
    output_queue_ticks: int,
) -> MailboxSpec:
    return MailboxSpec(
        window_ns=layout.period_ms * 1_000_000,
        window_samples=layout.samples_per_tick,
        num_windows=max_lead_ticks,
        grid=FrameGrid(
            patch=config.patch.patch,
            extra_columns=int(config.patch.extra_column),
            max_tokens=layout.max_video_tokens,
        ),
        max_frame_pairs=max_frame_pairs,
        video_queue_frames=6,  # a 200 ms tick of 30 frames a second
        max_text_tokens=max(1, layout.max_text_tokens - 1),  # one is the marker of missing audio
        text_queue_tokens=4096,
        output_queue_ticks=output_queue_ticks,
        max_output_samples=layout.mel_frames * layout.dmel.hop,
        max_output_tokens=layout.num_steps,
        mel_shape=(layout.mel_frames, layout.dmel.num_bands),
        past_ticks=PAST_TICKS,
        silence=config.vocab.silence,
        quiet=layout.dmel.level_min,
    )
