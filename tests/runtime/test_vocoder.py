"""The streaming vocoder: what it resynthesises, and what it may never do."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from tml_kernels.ops.dmel import DMEL_20HZ, DMEL_40HZ, DmelSpec
from tml_kernels.ops.dmel.constants import frame_window, mel_filters
from tml_runtime.demo.decode import load_audio
from tml_runtime.demo.media import MediaError, speech_path
from tml_runtime.model.layout import DMEL_25HZ
from tml_runtime.vocoder import LOG_FLOOR, StreamingVocoder

RATE = 16_000


def log_mel(pcm: np.ndarray, spec: DmelSpec = DMEL_20HZ) -> np.ndarray:
    """[K, B] in float64: the causal frames of `pcm` whose ends lie inside it."""
    padded = np.concatenate([np.zeros(spec.tail), pcm.astype(np.float64)])
    count = len(pcm) // spec.hop
    frames = np.stack([padded[k * spec.hop : k * spec.hop + spec.fft] for k in range(count)])
    magnitude = np.abs(np.fft.rfft(frames * frame_window(spec)))
    return np.log10(np.maximum(magnitude @ mel_filters(spec), 1e-10))


def vowel(seconds: float, spec: DmelSpec = DMEL_20HZ) -> np.ndarray:
    """A voice-like sound: harmonics of a falling pitch under a moving formant, and noise."""
    rng = np.random.default_rng(0)
    t = np.arange(round(seconds * RATE)) / RATE
    pitch = 140 - 30 * t / seconds
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    formant = 700 + 400 * np.sin(2 * np.pi * 2 * t)
    pcm = sum(
        np.exp(-(((n * pitch - formant) / 400) ** 2)) * np.sin(n * phase) for n in range(1, 30)
    )
    loud = 0.05 * (1 + np.sin(2 * np.pi * 3 * t))
    return loud * (pcm + 0.05 * rng.standard_normal(len(t)))


def convergence(actual_K_B: np.ndarray, wanted_K_B: np.ndarray) -> float:
    """|10^actual - 10^wanted| / |10^wanted|, the spectral convergence of Griffin and Lim."""
    actual, wanted = 10.0**actual_K_B, 10.0**wanted_K_B
    return float(np.linalg.norm(actual - wanted) / np.linalg.norm(wanted))


def resynthesised_mel(mel: np.ndarray, spec: DmelSpec) -> np.ndarray:
    """The mel of the vocoder's output, without its latency and its last, unfinished frame."""
    pcm = StreamingVocoder(spec).push(mel)
    late = spec.hop
    return log_mel(np.concatenate([pcm[late:], np.zeros(late, np.float32)]), spec)[:-1]


@pytest.mark.parametrize("spec", [DMEL_20HZ, DMEL_25HZ], ids=["20Hz", "25Hz"])
def test_voice_is_resynthesised(spec: DmelSpec) -> None:
    mel = log_mel(vowel(3.2), spec)
    error = convergence(resynthesised_mel(mel, spec), mel[:-1])
    assert error <= 0.08, f"spectral convergence {error:.3f}"  # measured: 0.057 and 0.059


def test_real_speech_is_resynthesised() -> None:
    try:
        pcm = load_audio(speech_path())
    except MediaError as error:
        pytest.skip(f"needs the demo's recording: {error}")
    mel = log_mel(pcm[6 * RATE : 18 * RATE])  # from the first words on
    error = convergence(resynthesised_mel(mel, DMEL_20HZ), mel[:-1])
    assert error <= 0.09, f"spectral convergence {error:.3f}"  # measured: 0.068


def test_40_hz_frames_with_a_padded_window() -> None:
    """Their window is shorter than the FFT, so speech comes 112 samples later still."""
    spec = DMEL_40HZ
    mel = log_mel(vowel(3.2), spec)
    pcm = StreamingVocoder(spec).push(mel)
    late = spec.hop + (spec.fft - spec.window) // 2
    again = log_mel(np.concatenate([pcm[late:], np.zeros(late)]), spec)[:-2]
    error = convergence(again, mel[:-2])
    assert error <= 0.06, f"spectral convergence {error:.3f}"  # measured: 0.040


@pytest.mark.parametrize("hz", [110, 440, 1000, 3000])
def test_tone_keeps_its_frequency_and_level(hz: int) -> None:
    tone = 0.3 * np.sin(2 * np.pi * hz * np.arange(2 * RATE) / RATE)
    pcm = StreamingVocoder().push(log_mel(tone))[RATE // 2 : -RATE // 4]
    power = np.abs(np.fft.rfft(pcm * np.hanning(len(pcm)))) ** 2
    centre = float((power * np.fft.rfftfreq(len(pcm), 1 / RATE)).sum() / power.sum())
    assert abs(centre - hz) <= max(10.0, 0.01 * hz)  # bands are 37 Hz apart at the bottom
    assert 0.4 <= pcm.std() / tone.std() <= 1.2  # a tone smeared over its band beats with itself


@pytest.mark.parametrize("split", [[1] * 24, [4] * 6, [5, 0, 1, 18]], ids=str)
def test_any_split_gives_the_same_bits(split: list[int]) -> None:
    mel = log_mel(vowel(1.2))
    whole = StreamingVocoder().push(mel)
    vocoder = StreamingVocoder()
    pieces = [vocoder.push(piece) for piece in np.split(mel, np.cumsum(split)[:-1])]
    assert [len(piece) for piece in pieces] == [800 * count for count in split]
    np.testing.assert_array_equal(np.concatenate(pieces).view(np.int32), whole.view(np.int32))


def test_reset_starts_a_new_stream() -> None:
    mel = log_mel(vowel(0.8))
    vocoder = StreamingVocoder()
    first = vocoder.push(mel)
    assert not np.array_equal(vocoder.push(mel), first)  # it did carry state
    vocoder.reset()
    np.testing.assert_array_equal(vocoder.push(mel), first)


def test_streams_do_not_share_state() -> None:
    mel = log_mel(vowel(0.8))
    one, other = StreamingVocoder(), StreamingVocoder()
    other.push(np.full((3, 80), 1.0))
    expected = StreamingVocoder().push(mel)
    np.testing.assert_array_equal(one.push(mel), expected)


def test_silence_stays_silent_and_returns_after_speech() -> None:
    vocoder = StreamingVocoder()
    assert not vocoder.push(np.full((6, 80), LOG_FLOOR)).any()
    assert vocoder.push(log_mel(vowel(0.4))).any()
    quiet = vocoder.push(np.full((6, 80), LOG_FLOOR))
    assert not quiet[2 * 800 :].any()  # the hop in flight, then one faded by its window
    lowest_level = vocoder.push(np.full((6, 80), DMEL_20HZ.level_min))
    assert np.abs(lowest_level).max() < 0.5 / 32768  # silence in int16 too


def test_latency_is_one_hop() -> None:
    """An onset in the middle of the stream comes out one hop after its own sample."""
    pcm = np.zeros(16 * 800)
    pcm[8 * 800 :] = vowel(8 * 800 / RATE)
    out = StreamingVocoder().push(log_mel(pcm))
    energy = (out.reshape(-1, 800) ** 2).mean(axis=1)
    assert energy[:8].max() < 1e-3 * energy[9:].mean()  # hop 8 may hold the window's rise


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1e30, 3e38, 0.0, 2.0])
def test_any_input_gives_finite_samples_within_full_scale(value: float) -> None:
    vocoder = StreamingVocoder()
    mel = log_mel(vowel(0.4))
    mel[2:5] = value
    pcm = vocoder.push(mel)
    after = vocoder.push(np.full((4, 80), LOG_FLOOR))  # and it recovers
    for samples in (pcm, after):
        assert np.isfinite(samples).all()
        assert np.abs(samples).max() <= 1.0
    assert not after[2 * 800 :].any()


def test_one_loud_band_among_nan() -> None:
    mel = np.full((8, 80), np.nan)
    mel[:, 10] = 0.5
    pcm = StreamingVocoder().push(mel)
    assert np.isfinite(pcm).all()
    assert pcm.std() > 0.01


def test_takes_tensors_and_returns_float32() -> None:
    mel = log_mel(vowel(0.4))
    from_tensor = StreamingVocoder().push(torch.from_numpy(mel))
    assert from_tensor.dtype == np.float32
    assert from_tensor.shape == (len(mel) * 800,)
    np.testing.assert_array_equal(from_tensor, StreamingVocoder().push(mel))


def test_no_frames() -> None:
    assert StreamingVocoder().push(np.empty((0, 80))).shape == (0,)


@pytest.mark.parametrize("shape", [(80,), (4, 79), (1, 4, 80)])
def test_wrong_shape_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"mel: expected \[K, 80\], got shape"):
        StreamingVocoder().push(np.zeros(shape))


def test_wrong_spec_is_named() -> None:
    with pytest.raises(ValueError, match=r"window=1600 is not two hops of spec\.hop=400"):
        StreamingVocoder(DmelSpec(RATE, 1600, 1600, 400, 80, 0.0, 8000.0, 16, -7.0, 2.0))
    with pytest.raises(ValueError, match="iterations=0"):
        StreamingVocoder(iterations=0)


def test_memory_does_not_grow() -> None:
    vocoder = StreamingVocoder()
    mel = log_mel(vowel(0.4))
    vocoder.push(mel)
    tracemalloc.start()
    vocoder.push(mel)
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(50):
        vocoder.push(mel)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 4096, f"{grown} bytes more after 50 pushes"  # 400 frames of output are 1.3 MB
