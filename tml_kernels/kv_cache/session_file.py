"""A session on disk: a safetensors file whose every byte is covered by one checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from .._tensor_file import TensorFile, TensorFileError, replacing, write_tensor_file

FORMAT = "tml-session/1"
_ZEROS = "0" * 64
_KEY = b'"sha256": "'
_CHUNK = 1 << 24


class SessionFileError(TensorFileError):
    """A file that is no session, is truncated or altered, or is of a cache of another shape."""


def write_session_file(
    path: Path, tensors: Iterable[tuple[str, Tensor]], description: dict[str, Any]
) -> None:
    """Write beside `path` first and then into its place: a reader sees all of it or the old one.

    The checksum is the SHA-256 of the file as it is with 64 zeros in the checksum's own place.
    """
    metadata = {"format": FORMAT, "sha256": _ZEROS, "session": json.dumps(description)}
    with replacing(path) as partial:
        write_tensor_file(partial, tensors, metadata)
        file = TensorFile(partial)
        place = _place_of_checksum(file)
        digest = _digest(file, place)
        with partial.open("r+b") as out:
            out.seek(place)
            out.write(digest.encode())


def read_session_file(path: Path) -> tuple[TensorFile, dict[str, Any]]:
    """The tensors, mapped, and the description. Raises SessionFileError for anything altered."""
    file = TensorFile(path, SessionFileError)
    if file.metadata.get("format") != FORMAT:
        found = file.metadata.get("format")
        raise SessionFileError(path, "", f"not a saved session: format {found!r}, not {FORMAT!r}")
    if _digest(file, _place_of_checksum(file)) != file.metadata.get("sha256"):
        raise SessionFileError(path, "", "altered or truncated: its checksum does not match")
    try:
        description = json.loads(file.metadata["session"])
        assert isinstance(description, dict)
    except (KeyError, ValueError, RecursionError, AssertionError):
        raise SessionFileError(path, "", "its description cannot be read") from None
    return file, description


def _place_of_checksum(file: TensorFile) -> int:
    """Byte of the first digit. The format's name goes before it, so nothing else can be found."""
    at = file.bytes.find(_KEY)
    if at < 0 or at + len(_KEY) + len(_ZEROS) > len(file.bytes):
        raise SessionFileError(file.path, "", "altered: it has no checksum")
    return at + len(_KEY)


def _digest(file: TensorFile, place: int) -> str:
    sha = hashlib.sha256(file.bytes[:place])
    sha.update(_ZEROS.encode())
    for begin in range(place + len(_ZEROS), len(file.bytes), _CHUNK):
        sha.update(file.bytes[begin : begin + _CHUNK])
    return sha.hexdigest()
