"""What one tick holds: its length, the order of its input blocks, its output steps."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tml_kernels.ops.dmel import DMEL_20HZ, DmelSpec

BLOCKS = ("text", "video", "audio")

# 80 and 160 ms are no multiples of the 50 ms or 25 ms frames of the two published front ends. This
# one keeps the shape of the 20 Hz one (window = FFT = two hops, bands up to 8 kHz) at 40 ms a hop.
DMEL_25HZ = DmelSpec(
    sample_rate=16_000,
    window=1280,
    fft=1280,
    hop=640,
    num_bands=80,
    f_min=0.0,
    f_max=8000.0,
    num_levels=16,
    level_min=-7.0,
    level_max=2.0,
)


@dataclass(frozen=True)
class TurnLayout:
    """One tick of every session: `[text | video | audio | output step 0 .. K-1]`.

    Speech in and speech out share one dMel, and the output steps cover exactly the tick:
    `num_steps * mel_frames_per_step` output frames, as many as there are audio tokens coming in.

    ms200: 3,200 samples = 4 frames of 50 ms = 4 audio tokens; 4 steps of one token and one frame.
    """

    period_ms: int = 200
    dmel: DmelSpec = DMEL_20HZ
    blocks: tuple[str, ...] = BLOCKS
    num_steps: int = 4
    mel_frames_per_step: int = 1
    max_text_tokens: int = 64  # a tick's longest text block, a `missing` marker not counted
    max_video_tokens: int = 256  # a tick's longest video block: one 640x480 frame pair has 192

    @classmethod
    def preset(cls, name: str) -> TurnLayout:
        """ms200 (4 frames of 50 ms), ms160 (4 of 40 ms) or ms80 (2 of 40 ms)."""
        if name not in _PRESETS:
            raise ValueError(f"layout {name!r} is not one of {', '.join(_PRESETS)}")
        return _PRESETS[name]

    def __post_init__(self) -> None:
        for field in ("period_ms", "num_steps", "mel_frames_per_step", "max_text_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} is not positive")
        if self.max_video_tokens < 0:
            raise ValueError(f"max_video_tokens={self.max_video_tokens} is negative")
        if sorted(self.blocks) != sorted(BLOCKS):
            raise ValueError(f"blocks={self.blocks} is not an order of {BLOCKS}")
        samples, remainder = divmod(self.period_ms * self.dmel.sample_rate, 1000)
        hop = self.dmel.hop
        if remainder or samples % hop:
            raise ValueError(
                f"period_ms={self.period_ms} is not a whole number of dMel frames of "
                f"{1000 * hop / self.dmel.sample_rate:g} ms ({hop=} samples)"
            )
        frames = self.num_steps * self.mel_frames_per_step
        if frames * hop != samples:
            raise ValueError(
                f"num_steps={self.num_steps} * mel_frames_per_step={self.mel_frames_per_step} = "
                f"{frames} output frames, but period_ms={self.period_ms} holds {samples // hop}"
            )

    @property
    def sample_rate(self) -> int:
        """Samples a second, of the audio in and of the speech out."""
        return self.dmel.sample_rate

    @property
    def samples_per_tick(self) -> int:
        return self.period_ms * self.dmel.sample_rate // 1000

    @property
    def audio_tokens(self) -> int:
        """Audio tokens a tick takes in: one per dMel frame."""
        return self.samples_per_tick // self.dmel.hop

    @functools.cached_property
    def quiet_tokens(self) -> tuple[int, ...]:
        """Tokens that a session which only listens appends in a tick: of each input block, and of
        the output steps."""
        heard = {"text": 0, "video": 0, "audio": self.audio_tokens}
        return (*(heard[block] for block in self.blocks), self.num_steps)

    @property
    def mel_frames(self) -> int:
        """Mel frames a tick puts out."""
        return self.num_steps * self.mel_frames_per_step

    @property
    def step_ms(self) -> float:
        """Media time of one output step."""
        return self.period_ms / self.num_steps

    @property
    def max_prefill_tokens(self) -> int:
        """The most tokens of one session in the first pass of a tick: all but the later steps."""
        return self.max_tokens_per_tick - self.num_steps + 1

    @property
    def max_tokens_per_tick(self) -> int:
        """The most tokens one session can append in one tick, output steps included."""
        text = 1 + self.max_text_tokens  # `missing` goes before it
        return text + self.max_video_tokens + self.audio_tokens + self.num_steps


_PRESETS = {
    "ms200": TurnLayout(),
    "ms160": TurnLayout(period_ms=160, dmel=DMEL_25HZ, num_steps=4),
    "ms80": TurnLayout(period_ms=80, dmel=DMEL_25HZ, num_steps=2),
}
