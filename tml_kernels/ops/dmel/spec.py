"""What a dMel front end is: its sizes and ranges, and the two presets."""

from __future__ import annotations

from dataclasses import astuple, dataclass

# Floors of `InklingFeatureExtractor`: of the power of a frequency bin and of a mel band's energy.
# The first decides the level of silence; log10 of the second is below every level.
POWER_FLOOR = 1e-10
MEL_FLOOR = 1e-10


@dataclass(frozen=True)
class DmelSpec:
    """Rates in Hz; window, fft and hop in samples; levels in log10 of mel energy.

    A frame is the last `fft` samples up to its end, so nothing is heard ahead of time, with a
    periodic Hann window of `window` samples in its middle. `num_levels` level centres lie evenly on
    level_min..level_max. The first frame needs the `tail` samples before the stream.
    """

    sample_rate: int
    window: int
    fft: int
    hop: int
    num_bands: int
    f_min: float
    f_max: float
    num_levels: int
    level_min: float
    level_max: float

    def __post_init__(self) -> None:
        if not 0 < self.hop <= self.fft or not 0 < self.window <= self.fft or self.fft % 2:
            raise ValueError(
                f"DmelSpec: hop and window must be in 1..fft and fft even; got "
                f"hop={self.hop}, window={self.window}, fft={self.fft}"
            )
        if (self.fft - self.window) % 2:
            raise ValueError(f"DmelSpec: window={self.window} has no middle in fft={self.fft}")
        if not 0 <= self.f_min < self.f_max <= self.sample_rate / 2:
            raise ValueError(
                f"DmelSpec: f_min < f_max must be in 0..{self.sample_rate / 2} Hz; got "
                f"{self.f_min}, {self.f_max}"
            )
        if self.num_bands < 1:
            raise ValueError(f"DmelSpec: num_bands={self.num_bands} is not positive")
        if not 2 <= self.num_levels <= 256:
            raise ValueError(f"DmelSpec: num_levels={self.num_levels} is not in 2..256 (uint8)")
        if not self.level_min < self.level_max:
            raise ValueError(
                f"DmelSpec: level_min={self.level_min} is not below level_max={self.level_max}"
            )

    @property
    def tail(self) -> int:
        """Samples kept between calls."""
        return self.fft - self.hop

    @property
    def num_bins(self) -> int:
        """Frequency bins of one frame."""
        return self.fft // 2 + 1

    @property
    def table_rows(self) -> int:
        return self.num_bands * self.num_levels

    def pack(self) -> list[float]:
        """The fields as torch ops take them; `unpack` inverts it exactly."""
        return [float(value) for value in astuple(self)]

    @staticmethod
    def unpack(packed: list[float]) -> DmelSpec:
        rate, window, fft, hop, bands, f_min, f_max, levels, level_min, level_max = packed
        return DmelSpec(
            sample_rate=int(rate),
            window=int(window),
            fft=int(fft),
            hop=int(hop),
            num_bands=int(bands),
            f_min=f_min,
            f_max=f_max,
            num_levels=int(levels),
            level_min=level_min,
            level_max=level_max,
        )


DMEL_20HZ = DmelSpec(
    sample_rate=16_000,
    window=1600,
    fft=1600,
    hop=800,
    num_bands=80,
    f_min=0.0,
    f_max=8000.0,
    num_levels=16,
    level_min=-7.0,
    level_max=2.0,
)
DMEL_40HZ = DmelSpec(
    sample_rate=16_000,
    window=800,
    fft=1024,
    hop=400,
    num_bands=80,
    f_min=80.0,
    f_max=7600.0,
    num_levels=16,
    level_min=-7.0,
    level_max=2.0,
)
