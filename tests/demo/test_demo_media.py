"""Fetching recordings, and decoding files of many kinds to what the model hears and sees."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from demo_recordings import write_film

from tml_runtime.demo import media
from tml_runtime.demo.decode import load_audio, load_video
from tml_runtime.demo.media import MediaError


def tone_hz(pcm: np.ndarray) -> float:
    """Frequency of the strongest component, to about half a hertz a second of sound."""
    power = np.abs(np.fft.rfft(pcm * np.hanning(len(pcm)), 8 * len(pcm)))
    return float(power.argmax() * 16_000 / (8 * len(pcm)))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TML_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "media"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> media.Wheel:
    """A wheel of our own that pip finds on disk, with one file in it; known to the module."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    path, info = folder / "tml_sample-1.0-py3-none-any.whl", "tml_sample-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tml_sample/a.txt", "what was said")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tml-sample\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    wheel = media.Wheel("tml-sample==1.0", 0.0, sha256, "none")
    digest = hashlib.sha256(b"what was said").hexdigest()
    file = media.MediaFile("a.txt", wheel, "tml_sample/a.txt", digest, "a sentence")
    monkeypatch.setattr(media, "FILES", (file,))
    monkeypatch.setattr(media, "_BY_NAME", {"a.txt": file})
    return wheel


def test_file_is_fetched_once_and_kept(wheel: media.Wheel, cache: Path) -> None:
    said: list[str] = []
    path = media.media_path("a.txt", say=said.append)
    assert path == cache / "a.txt"
    assert path.read_text() == "what was said"
    assert said == ["fetching tml-sample==1.0 (0.0 MB)"]
    assert media.media_path("a.txt", say=said.append) == path
    assert len(said) == 1
    assert media.describe(path) == "a.txt from tml-sample==1.0 (none)"


def test_main_prints_sources_and_licences(
    wheel: media.Wheel, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert media.main([]) == 0
    out = capsys.readouterr().out
    assert f"media in {cache}" in out
    assert "a.txt: a sentence; from tml-sample==1.0, none" in out


def test_damaged_file_is_refused(wheel: media.Wheel) -> None:
    media.media_path("a.txt").write_text("something else")
    with pytest.raises(MediaError, match=r"a\.txt is damaged .* delete it"):
        media.media_path("a.txt")


@pytest.mark.parametrize("part", ["wheel", "file"])
def test_wrong_checksum_keeps_nothing(
    part: str, wheel: media.Wheel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = media.FILES[0]
    if part == "wheel":
        wrong = replace(file, wheel=replace(wheel, sha256="0" * 64))
    else:
        wrong = replace(file, sha256="0" * 64)
    monkeypatch.setattr(media, "FILES", (wrong,))
    monkeypatch.setattr(media, "_BY_NAME", {"a.txt": wrong})
    with pytest.raises(MediaError, match=r"has SHA-256|is not the expected file"):
        media.media_path("a.txt")
    assert not (cache / "a.txt").exists()


def test_without_a_network_the_error_says_what_to_do(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert media.main([]) == 1
    error = capsys.readouterr().err
    assert "cannot fetch pyannote.audio==4.0.7" in error
    assert f"copy its cache to {cache}" in error
    assert "--audio and --video" in error


def test_a_cache_that_cannot_be_is_one_line_before_anything_is_fetched(
    wheel: media.Wheel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/below", "x" * 300):
        monkeypatch.setenv("TML_CACHE", str(tmp_path / name))
        assert media.main([]) == 1
        shown = capsys.readouterr()
        assert shown.err.startswith("error: ") and len(shown.err.splitlines()) == 1
        assert name in shown.err and "fetching" not in shown.out


def test_cache_of_a_checkout_is_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TML_CACHE", raising=False)
    root = Path(__file__).parents[2]
    assert media.cache_dir() == root / ".cache" / "media"


def test_every_file_has_a_wheel_and_checksums() -> None:
    for file in media.FILES:
        assert "==" in file.wheel.requirement
        assert len(file.sha256) == len(file.wheel.sha256) == 64
        assert Path(file.member).name == file.name


@pytest.mark.parametrize("rate", [16_000, 8_000, 44_100, 48_000])
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg"])
def test_sound_becomes_16_khz_mono(rate: int, kind: str, tmp_path: Path) -> None:
    t = np.arange(rate) / rate
    left = 0.5 * np.sin(2 * np.pi * 440 * t)
    path = tmp_path / f"tone.{kind}"
    soundfile.write(path, np.stack([left, np.zeros_like(left)], axis=1), rate)
    pcm = load_audio(path)
    assert pcm.dtype == np.float32
    assert abs(len(pcm) - 16_000) <= 32  # a resampler may keep a millisecond or two
    assert abs(tone_hz(pcm) - 440) < 2
    assert pcm[2000:14000].std() == pytest.approx(0.25 / 2**0.5, rel=0.03)  # channels averaged


def test_sound_of_a_film(tmp_path: Path) -> None:
    pcm = load_audio(write_film(tmp_path / "film.mp4", tone_hz=600.0))
    assert len(pcm) == pytest.approx(32_000, abs=3_000)  # AAC pads its first and last packet
    assert abs(tone_hz(pcm[4000:28000]) - 600) < 2


def test_seconds_limits_what_is_decoded(talk: Path, tmp_path: Path) -> None:
    np.testing.assert_array_equal(load_audio(talk, seconds=0.5), load_audio(talk)[:8000])
    film = write_film(tmp_path / "film.mp4", tone_hz=600.0)
    assert len(load_audio(film, seconds=0.5)) == 8000
    assert len(load_video(film, fps=10, size=(80, 80), seconds=0.5).frames) == 5


@pytest.mark.parametrize("fps", [5.0, 10.0, 25.0, 50.0])
def test_frames_are_those_on_screen_at_their_times(film: Path, fps: float) -> None:
    clip = load_video(film, fps=fps, size=(80, 80))
    assert clip.frames.shape[1:] == (80, 80, 3)
    assert abs(clip.seconds - 2.0) <= 0.04 + 1 / fps
    red = clip.frames[:, :, :30, 0].mean(axis=(1, 2))
    shown = np.floor(np.arange(len(red)) / fps * 25 + 1e-6).clip(max=49)  # the film has 25 a second
    np.testing.assert_allclose(red, 16 + 200 * shown / 49, atol=2.0)  # half a frame; YUV rounds


@pytest.mark.parametrize("size", [(40, 40), (80, 120), (240, 320)])
def test_picture_covers_its_size_and_keeps_its_middle(film: Path, size: tuple[int, int]) -> None:
    frame = load_video(film, fps=5, size=size).frames[-1].astype(int)
    assert frame.shape == (*size, 3)
    middle = size[1] // 2
    left, right = frame[:, : middle - 4], frame[:, middle + 4 :]
    assert left[..., 0].mean() > 150 > 60 > left[..., 2].mean()  # red left
    assert right[..., 2].mean() > 150 > 60 > right[..., 0].mean()  # blue right, of one width


@pytest.mark.parametrize("size", [(80, 81), (0, 80), (-40, 80), (79, 80)])
def test_size_must_be_whole_patches(film: Path, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"video size {size[0]}x{size[1]} is not a multiple of 40"):
        load_video(film, fps=10, size=size)


def test_unusable_files_are_named(film: Path, talk: Path, tmp_path: Path) -> None:
    missing = tmp_path / "nothing.wav"
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(bytes(range(256)) * 8)
    text = tmp_path / "text.wav"
    text.write_text("not a sound")
    empty = tmp_path / "empty.wav"
    soundfile.write(empty, np.zeros(0), 16_000)
    with pytest.raises(MediaError, match=r"no such file: .*nothing\.wav"):
        load_audio(missing)
    with pytest.raises(MediaError, match=r"no such file: .*nothing\.wav"):
        load_video(missing, fps=10, size=(80, 80))
    for path in (noise, text):
        with pytest.raises(MediaError, match=rf"cannot decode sound from .*{path.name}"):
            load_audio(path)
    with pytest.raises(MediaError, match=r"cannot decode video from .*noise\.mp4"):
        load_video(noise, fps=10, size=(80, 80))
    with pytest.raises(MediaError, match=r"film\.mp4 has no sound track"):
        load_audio(film)
    with pytest.raises(MediaError, match=r"talk\.wav has no video stream"):
        load_video(talk, fps=10, size=(80, 80))
    with pytest.raises(MediaError, match=r"empty\.wav holds no sound"):
        load_audio(empty)
