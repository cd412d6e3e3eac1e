"""The vocoder of all slots at once: what one for each would say, whoever else speaks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_vocoder import convergence, log_mel, vowel

from tml_kernels.ops.dmel import DMEL_20HZ, DMEL_40HZ, DmelSpec
from tml_kernels.testing import assert_bitwise
from tml_runtime.model import TurnLayout
from tml_runtime.voices import DeviceVoices, GriffinLim, HostVoices, Levels, make_voices

CPU = torch.device("cpu")
NUM_SLOTS, NUM_FRAMES, NUM_TICKS = 5, 4, 6
HOP = 400  # the least of those used


def mels(seed: int, num_ticks: int = NUM_TICKS) -> torch.Tensor:
    """[ticks, slots, K, B], with silence, absurd values and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    mel = -3.0 + 1.2 * torch.randn(num_ticks, NUM_SLOTS, NUM_FRAMES, 80, generator=generator)
    mel[1, 2] = -20.0
    mel[2, 3, 1, 7] = float("nan")
    mel[3, 0, 2] = 50.0
    return mel


def make(vocoder: GriffinLim, device: torch.device = CPU) -> DeviceVoices:
    return DeviceVoices(vocoder, NUM_FRAMES, NUM_SLOTS, device)


def said(voices: HostVoices | DeviceVoices, slots: list[int], mel: torch.Tensor) -> np.ndarray:
    pieces = voices.speak(slots, mel)
    return np.stack([np.array(piece) for piece in pieces])  # of their own: they are overwritten


def check_follows_the_host(host: HostVoices, device: DeviceVoices, seed: int) -> None:
    """In the first frame of a stream. Phases of weak bins are chaos from there on: 1e-6 in the mel
    is 2 % of the waveform three frames later, with one iteration as with twelve."""
    for tick, mel in enumerate(mels(seed)):
        slots = [0, 1, 2, 3, 4] if tick % 2 else [3, 0, 2]
        for slot in slots:
            host.reset(slot)
            device.reset(slot)
        expected, actual = (said(x, slots, mel[slots])[:, :HOP] for x in (host, device))
        error = np.linalg.norm(actual - expected)
        assert error <= 1e-3 * np.linalg.norm(expected), (tick, error)


@pytest.mark.parametrize("levels", [None, Levels()], ids=["plain", "levels"])
@pytest.mark.parametrize("spec", [DMEL_20HZ, DMEL_40HZ], ids=["20Hz", "40Hz"])
def test_says_what_one_for_each_says(spec: DmelSpec, levels: Levels | None) -> None:
    vocoder = GriffinLim(spec, levels)
    check_follows_the_host(HostVoices(vocoder, NUM_SLOTS), make(vocoder), seed=1)


def test_voice_is_resynthesised_as_well_as_on_the_host() -> None:
    mel = log_mel(vowel(3.2)).astype(np.float32)
    voices = make(GriffinLim(DMEL_20HZ))
    ticks = np.split(mel, len(mel) // NUM_FRAMES)
    pcm = np.concatenate([said(voices, [1], torch.from_numpy(each)[None])[0] for each in ticks])
    again = log_mel(np.concatenate([pcm[800:], np.zeros(800, np.float32)]))[:-1]
    error = convergence(again, mel[:-1])
    assert error <= 0.08, f"spectral convergence {error:.3f}"  # measured: 0.056; the host's 0.058


def test_who_else_speaks_does_not_matter() -> None:
    mel, vocoder = mels(2), GriffinLim(DMEL_20HZ)
    alone, among = make(vocoder), make(vocoder)
    for tick in range(NUM_TICKS):
        others = [slot for slot in (4, 0, 3) if (slot + tick) % 3]
        all_said = said(among, [*others, 2], mel[tick, [*others, 2]])
        assert_bitwise(
            torch.from_numpy(said(alone, [2], mel[tick, [2]])[0]), torch.from_numpy(all_said[-1])
        )


def test_a_silent_slot_goes_on_where_it_was() -> None:
    mel, vocoder = mels(3), GriffinLim(DMEL_20HZ)
    steady, paused = make(vocoder), make(vocoder)
    for tick in range(NUM_TICKS):
        expected = said(steady, [1], mel[tick, [1]])
        said(paused, [0, 2], mel[tick, [0, 2]])
        np.testing.assert_array_equal(said(paused, [1], mel[tick, [1]]), expected)


def test_a_reset_slot_begins_anew_once() -> None:
    mel, vocoder = mels(4), GriffinLim(DMEL_20HZ)
    used, new = make(vocoder), make(vocoder)
    said(used, [1], mel[0, [1]])
    used.reset(1)
    said(used, [0], mel[0, [0]])  # it waits for the slot to speak
    for tick in range(2):
        np.testing.assert_array_equal(
            said(used, [1], mel[tick, [1]]), said(new, [1], mel[tick, [1]])
        )


def test_a_broken_vocoder_is_its_rows_alone() -> None:
    class Broken:
        def push(self, mel_K_B: torch.Tensor) -> np.ndarray:
            raise OSError("no voice")

        def reset(self) -> None: ...

    made = [Broken(), GriffinLim(DMEL_20HZ)()]
    voices = HostVoices(lambda: made.pop(0), 2)
    broken, good = voices.speak([0, 1], mels(5)[0, :2])
    assert isinstance(broken, OSError) and isinstance(good, np.ndarray)


def test_on_a_cpu_every_slot_has_its_own() -> None:
    assert isinstance(make_voices(None, TurnLayout(), 2, CPU), HostVoices)


@pytest.mark.gpu
def test_gpu_graph_says_what_the_host_says() -> None:
    device = torch.device("cuda")
    vocoder = GriffinLim(TurnLayout().dmel)
    check_follows_the_host(HostVoices(vocoder, NUM_SLOTS), make(vocoder, device), seed=6)
    voices = make_voices(None, TurnLayout(), NUM_SLOTS, device)
    assert isinstance(voices, DeviceVoices)
    alone = make(vocoder, device)
    for tick, mel in enumerate(mels(7)):
        slots = [0, 1, 2, 3, 4] if tick % 2 else [3, 2, 0]
        among = said(voices, slots, mel[slots])[slots.index(2)]
        np.testing.assert_array_equal(said(alone, [2], mel[[2]])[0], among)
    assert np.abs(among).max() > 1e-3
