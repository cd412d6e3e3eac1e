"""The speech of all slots of a tick: a vocoder for each, or on a GPU one for all of them."""

# Dimension key: N slots, S rows, K mel frames of a tick, B mel bands, Q frequency bins, H hop,
# L samples of a Fourier transform, W = K * H samples of a tick.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tml_kernels.ops.dmel import DmelSpec
from tml_kernels.ops.dmel.constants import mel_filters

from .graph_launch import capture
from .model.layout import TurnLayout
from .vocoder import (
    LOG_CEILING,
    LOG_FLOOR,
    MEL_UPDATES,
    MOMENTUM,
    TINY,
    StreamingVocoder,
    Vocoder,
    mel_inverse,
    start_phases,
    window_halves,
)

ITERATIONS = 12  # of every frame, as of StreamingVocoder by default


class Voices(Protocol):
    """For the tick thread."""

    def reset(self, slot: int) -> None:
        """The slot's next frame is the first one of a stream."""
        ...

    def speak(self, slots: Sequence[int], mel_S_K_B: Tensor) -> Sequence[np.ndarray | Exception]:
        """float32 [W] samples of each row, or what its vocoder raised. On the host, as the frames
        are. The samples are good until the next call."""
        ...


@dataclass(frozen=True)
class Levels:
    """Brings untrained frames near the mean, spread and maximum of speech's log10 mel.

    Untrained weights draw it with mean 0 and spread 1.7, which is noise far beyond full scale.
    """

    mean: float = -2.65  # the demo's recording has mean -2.65, spread 1.2
    scale: float = 0.5
    maximum: float = -1.0

    def __call__(self, mel: Any) -> Any:
        return (self.mean + self.scale * mel).clip(max=self.maximum)


@dataclass(frozen=True)
class GriffinLim:
    """The runtime's own vocoder: what `Runtime` takes as `vocoder`, and takes by default."""

    spec: DmelSpec
    levels: Levels | None = None

    def __call__(self) -> Vocoder:
        return LevelledVocoder(self)


class LevelledVocoder(StreamingVocoder):
    def __init__(self, made_by: GriffinLim) -> None:
        super().__init__(made_by.spec, iterations=ITERATIONS)
        self._levels = made_by.levels

    def push(self, mel_K_B: np.ndarray | Tensor) -> np.ndarray:
        return super().push(mel_K_B if self._levels is None else self._levels(mel_K_B))


def make_voices(
    vocoder: Callable[[], Vocoder] | None,
    layout: TurnLayout,
    num_slots: int,
    device: torch.device,
) -> Voices:
    """vocoder: makes a slot's; GriffinLim, or None, makes one of all slots where there is a GPU."""
    if vocoder is None:
        vocoder = GriffinLim(layout.dmel)
    if device.type == "cuda" and isinstance(vocoder, GriffinLim):
        return DeviceVoices(vocoder, layout.mel_frames, num_slots, device)
    return HostVoices(vocoder, num_slots)


class HostVoices:
    def __init__(self, make_vocoder: Callable[[], Vocoder], num_slots: int) -> None:
        self._vocoders = [make_vocoder() for _ in range(num_slots)]

    def reset(self, slot: int) -> None:
        self._vocoders[slot].reset()

    def speak(self, slots: Sequence[int], mel_S_K_B: Tensor) -> Sequence[np.ndarray | Exception]:
        return [self._push(slot, mel) for slot, mel in zip(slots, mel_S_K_B, strict=True)]

    def _push(self, slot: int, mel_K_B: Tensor) -> np.ndarray | Exception:
        try:
            return self._vocoders[slot].push(mel_K_B)
        except Exception as error:  # a plugged-in vocoder may raise anything
            return error


class DeviceVoices:
    """`StreamingVocoder` for all slots at once, a CUDA graph on a GPU.

    Every slot is computed in every call, so that all calls are alike; the state of those that do
    not speak stays. A slot's samples do not depend on the others. Allocates nothing after it was
    made.
    """

    def __init__(
        self, vocoder: GriffinLim, num_frames: int, num_slots: int, device: torch.device
    ) -> None:
        spec = vocoder.spec
        self._spec, self._vocoder, self._device = spec, vocoder, device
        self._shape = (num_slots, num_frames, spec.num_bands)

        def made(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        def const(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        # State, and what a call brings and takes: frames, then which slots begin, then who speaks.
        self._played_N_H, self._tail_N_H = made(num_slots, spec.hop), made(num_slots, spec.hop)
        self._magnitude_N_Q = made(num_slots, spec.num_bins)
        num_values = num_slots * (num_frames * spec.num_bands + 2)
        pinned = device.type == "cuda"
        self._host_in = torch.zeros(num_values, pin_memory=pinned)
        self._device_in = made(num_values)
        self._host_out_N_W = torch.zeros(num_slots, num_frames * spec.hop, pin_memory=pinned)
        self._mel_N_K_B, self._begins_N, self._speaks_N = (
            part.numpy() for part in self._parts(self._host_in)
        )
        self._pcm_N_W = self._host_out_N_W.numpy()

        rise, fall, rise_share, fall_share = window_halves(spec)
        self._window_2_H = const(np.stack([fall, rise]))  # of what two frames share
        self._share_2_H = const(np.stack([fall_share, rise_share]))
        self._rise_H = const(rise)
        self._start_phase_Q = const(start_phases(spec))
        self._filters_Q_B = const(mel_filters(spec).astype(np.float32))
        guess_Q_B, update_Q_B = mel_inverse(spec)
        self._guess_B_Q, self._update_B_Q = const(guess_Q_B.T), const(update_Q_B.T)
        self._graph = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._graph = self._capture()

    def reset(self, slot: int) -> None:
        self._begins_N[slot] = 1.0

    def speak(self, slots: Sequence[int], mel_S_K_B: Tensor) -> Sequence[np.ndarray | Exception]:
        self._speaks_N[:] = 0.0
        for row, slot in enumerate(slots):
            self._mel_N_K_B[slot] = mel_S_K_B[row].numpy()
            self._speaks_N[slot] = 1.0
        if self._graph is None:
            self._run()
        else:
            with torch.cuda.device(self._device):
                self._graph.replay()
                self._done.record()
                self._done.synchronize()
        for slot in slots:
            self._begins_N[slot] = 0.0
        return [self._pcm_N_W[slot] for slot in slots]

    @torch.inference_mode()
    def _capture(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream(priority=-1)  # as ticks
        self._done = torch.cuda.Event(blocking=True)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run()  # nobody speaks; makes the plans of the Fourier transforms
        torch.cuda.current_stream().wait_stream(side)
        with capture("the vocoder", stream=side) as graph:
            self._run()
        return graph

    def _parts(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        num_slots = self._shape[0]
        mel, begins_N, speaks_N = flat.split([flat.numel() - 2 * num_slots, num_slots, num_slots])
        return mel.view(self._shape), begins_N, speaks_N

    @torch.inference_mode()
    def _run(self) -> None:
        """Everything between the copy to the device and the copy back."""
        self._device_in.copy_(self._host_in, non_blocking=True)
        mel_N_K_B, begins_N, speaks_N = self._parts(self._device_in)
        begins_N_1, speaks_N_1 = (x[:, None] > 0 for x in (begins_N, speaks_N))
        kept = (self._played_N_H, self._tail_N_H, self._magnitude_N_Q)
        state = tuple(x.masked_fill(begins_N_1, 0.0) for x in kept)
        magnitude_N_K_Q = self._magnitudes(mel_N_K_B)
        spoken = []
        for magnitude_N_Q in magnitude_N_K_Q.unbind(1):
            played_N_H, tail_N_H, older_N_Q = state
            state = self._frame(played_N_H, tail_N_H, older_N_Q, magnitude_N_Q)
            spoken.append(state[0])
        for x, new in zip(kept, state, strict=True):
            x.copy_(torch.where(speaks_N_1, new, x))
        pcm_N_W = torch.stack(spoken, dim=1).flatten(1).clamp(-1.0, 1.0)
        self._host_out_N_W.copy_(pcm_N_W, non_blocking=True)

    def _magnitudes(self, mel_N_K_B: Tensor) -> Tensor:
        """[N, K, Q] whose mel energies are those given, as far as non-negative ones can be."""
        if self._vocoder.levels is not None:
            mel_N_K_B = self._vocoder.levels(mel_N_K_B)
        log = mel_N_K_B.nan_to_num(LOG_FLOOR).clamp(LOG_FLOOR, LOG_CEILING)
        mel = torch.where(log > LOG_FLOOR, torch.pow(10.0, log), 0.0)
        magnitude = mel @ self._guess_B_Q
        for _ in range(MEL_UPDATES):
            reached = magnitude @ self._filters_Q_B
            magnitude = magnitude * ((mel / reached.clamp(min=TINY)) @ self._update_B_Q)
        return magnitude

    def _frame(
        self, played_N_H: Tensor, tail_N_H: Tensor, older_N_Q: Tensor, newest_N_Q: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(samples, tail, magnitudes) after one frame; see `StreamingVocoder`."""
        spec, hop = self._spec, self._spec.hop
        magnitude_N_2_Q = torch.stack([older_N_Q, newest_N_Q], dim=1)
        pending_N_H = tail_N_H * self._share_2_H[0]
        frames_N_2_L = played_N_H.new_zeros(len(played_N_H), 2, spec.fft)
        frames_N_2_L[:, 0, :hop] = played_N_H * self._rise_H
        shared = (frames_N_2_L[:, 0, hop : 2 * hop], frames_N_2_L[:, 1, :hop])
        last = None
        for _ in range(ITERATIONS):
            for part, window_H in zip(shared, self._window_2_H, strict=True):
                torch.mul(pending_N_H, window_H, out=part)
            found = torch.fft.rfft(frames_N_2_L)
            ahead = found if last is None else found + float(MOMENTUM) * (found - last)
            last = found
            fitted_N_2_L = torch.fft.irfft(self._fit(ahead, magnitude_N_2_Q), spec.fft)
            older, newest = fitted_N_2_L[:, 0, hop : 2 * hop], fitted_N_2_L[:, 1]
            pending_N_H = older * self._share_2_H[0] + newest[:, :hop] * self._share_2_H[1]
            frames_N_2_L[:, 1, hop : 2 * hop] = newest[:, hop : 2 * hop]
        return pending_N_H, frames_N_2_L[:, 1, hop : 2 * hop], newest_N_Q

    def _fit(self, spectrum_N_2_Q: Tensor, magnitude_N_2_Q: Tensor) -> Tensor:
        """The spectrum's phases and the wanted magnitudes."""
        size = spectrum_N_2_Q.abs()
        fitted = spectrum_N_2_Q * (magnitude_N_2_Q / size.clamp(min=TINY))
        return torch.where(size <= TINY, magnitude_N_2_Q * self._start_phase_Q, fitted)
