"""Inputs of dmel for tests and benchmarks, and what each must move at least."""

# Dimension key: S session rows, W samples of this call, N state slots, L samples of tail,
# F frames, V = bands * levels rows of the table, D model width.

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...testing import Cost, randn
from .spec import DMEL_20HZ, DMEL_40HZ, DmelSpec

NAN = float("nan")


def speech_like(num_samples: int, *, sample_rate: int = 16_000) -> Tensor:
    """float32 [num_samples] in -1..1: a voice with a gliding pitch and two formants, in syllables
    of changing loudness, over a room's noise; every fourth second is digital silence."""
    t = torch.arange(num_samples, dtype=torch.float64) / sample_rate
    pitch = 140 + 40 * torch.sin(2 * math.pi * 0.7 * t)
    phase = 2 * math.pi * torch.cumsum(pitch, 0) / sample_rate
    voice = torch.zeros_like(t)
    for harmonic in range(1, 25):
        hz = harmonic * pitch
        formants = torch.exp(-(((hz - 600) / 250) ** 2)) + 0.3 * torch.exp(
            -(((hz - 1800) / 400) ** 2)
        )
        voice += (formants + 0.02) * torch.sin(harmonic * phase)
    loudness = 0.3 * torch.sin(2 * math.pi * 2.1 * t).clamp_min(0) ** 2
    sound = loudness * voice + 2e-3 * torch.randn(num_samples, dtype=torch.float64)
    return torch.where(t % 4 < 3, sound, 0.0).clamp(-1, 1).float()


@dataclass(frozen=True)
class Case:
    """idle: the session rows whose slot is -1. Idle rows and unnamed slots hold NaN."""

    num_sessions: int
    num_frames: int
    width: int
    idle: tuple[int, ...] = ()
    spec: DmelSpec = DMEL_20HZ
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return (
            f"S{self.num_sessions}-F{self.num_frames}-D{self.width}-i{len(self.idle)}-"
            f"fft{self.spec.fft}-{str(self.dtype).removeprefix('torch.')}"
        )

    def make_inputs(self, device: str) -> dict:
        """Row s has slot S - s, so that slot 0 is never named and rows and slots differ."""
        num_samples = self.num_frames * self.spec.hop
        slots = [-1 if s in self.idle else self.num_sessions - s for s in range(self.num_sessions)]
        length = self.spec.tail + num_samples
        sound = speech_like(self.num_sessions * length).view(self.num_sessions, length)
        pcm = sound[:, self.spec.tail :].contiguous()
        tail = torch.full((self.num_sessions + 2, self.spec.tail), NAN)
        for s, slot in enumerate(slots):
            if slot < 0:
                pcm[s] = NAN
            else:
                tail[slot] = sound[s, : self.spec.tail]
        return {
            "pcm_S_W": pcm.to(device),
            "tail_N_L": tail.to(device),
            "slot_S": torch.tensor(slots, dtype=torch.int32, device=device),
            "table_V_D": randn(self.spec.table_rows, self.width, device=device, dtype=self.dtype),
            "norm_weight_D": 1 + 0.1 * randn(self.width, device=device),
            "spec": self.spec,
        }

    def cost(self) -> Cost:
        """A real FFT's operations; every table row that the frames can touch is read once."""
        frames, row = self.num_sessions * self.num_frames, self.width * self.dtype.itemsize
        rows = min(frames * self.spec.num_bands, self.spec.table_rows)
        sound = 4 * self.num_sessions * (self.num_frames * self.spec.hop + 2 * self.spec.tail)
        fft = 2.5 * self.spec.fft * math.log2(self.spec.fft)
        return Cost(
            bytes=sound + rows * row + frames * (row + self.spec.num_bands),
            flops=frames * int(fft + 4 * self.spec.num_bins + self.width * self.spec.num_bands),
        )


# Four bands of three levels over a short window: sizes that are no power of two anywhere.
SMALL = replace(DMEL_20HZ, window=90, fft=100, hop=25, num_bands=4, num_levels=3, f_min=300.0)
EDGE = [
    Case(0, 4, 128),  # no sessions
    Case(2, 0, 128),  # no samples
    Case(1, 1, 1),  # one frame, one column
    Case(3, 1, 77, idle=(1,)),  # an idle row between live ones, odd width
    Case(2, 2, 32, idle=(0, 1)),  # nobody is live
    Case(5, 7, 65, spec=SMALL),  # rows past one tile; one hop is shorter than the tail
    Case(2, 1, 130, spec=DMEL_40HZ),  # the new tail is part old tail, part new samples
]
MODEL = [
    Case(2, 4, 128),  # tiny preset, one 200 ms tick
    Case(1, 4, 4096),  # inkling-small
    Case(2, 8, 128, spec=DMEL_40HZ),
]
BENCH = [Case(s, 4, 4096, dtype=torch.bfloat16) for s in (1, 8, 32, 64)]
