"""Reads and writes safetensors files: eight bytes of header length, a JSON header, then raw data.

A file is mapped, not read: a tensor is a view of the mapping, and copying it into its place is the
only copy made. Nothing in a file is executed, and its header is believed only as far as the file's
own size bears it out. Source: the format's specification in the safetensors project's README.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
}
MAX_HEADER = 100_000_000  # bytes, the specification's own limit
MAX_ELEMENTS = 2**48  # of a tensor, one of no bytes too: strides and sizes stay within 64 bits


class TensorFileError(ValueError):
    """A file that cannot be used: which `file`, which `tensor` ("" for the file), why."""

    def __init__(self, file: Path, tensor: str, reason: str) -> None:
        super().__init__(f"{file}: {tensor + ': ' if tensor else ''}{reason}")
        self.file = file
        self.tensor = tensor
        self.reason = reason


class Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int  # of the data, counted from the file's first byte
    end: int


class TensorFile:
    """One mapped safetensors file. Its header is checked in full before a tensor is handed out.

    error: made from (file, tensor, reason) and raised for whatever is wrong with the file.
    """

    def __init__(
        self, path: Path, error: Callable[[Path, str, str], Exception] = TensorFileError
    ) -> None:
        self.path = path
        self._make_error = error
        try:
            with path.open("rb") as file:
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as caught:  # ValueError: an empty file cannot be mapped
            raise self._error("", f"cannot be read: {caught}") from None
        self.metadata: dict[str, str] = {}
        self.entries = self._read_header()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def tensor(self, name: str) -> Tensor:
        """A read-only view of the file, valid while this object lives."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise self._error(name, f"dtype {entry.dtype} is not one of {', '.join(DTYPES)}")
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        with warnings.catch_warnings():
            # torch warns that writing to a read-only mapping is undefined; nothing here writes.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(
                self.bytes,
                dtype=torch.uint8,
                count=entry.end - entry.begin,
                offset=entry.begin,
            )
        return flat.view(DTYPES[entry.dtype]).view(entry.shape)

    def _error(self, tensor: str, reason: str) -> Exception:
        return self._make_error(self.path, tensor, reason)

    def _read_header(self) -> dict[str, Entry]:
        size = len(self.bytes)
        if size < 8:
            raise self._error("", f"{size} bytes are too few for a header")
        (length,) = struct.unpack_from("<Q", self.bytes)
        if length > min(MAX_HEADER, size - 8):
            raise self._error("", f"truncated: the header has {length} bytes, the file {size}")
        try:
            header = json.loads(self.bytes[8 : 8 + length])
        except (ValueError, RecursionError) as error:
            raise self._error("", f"the header is not JSON: {error}") from None
        if not isinstance(header, dict):
            raise self._error("", "the header is not a table of tensors")
        metadata = header.pop("__metadata__", None)
        if isinstance(metadata, dict):
            self.metadata = {k: v for k, v in metadata.items() if isinstance(v, str)}
        return {name: self._entry(name, fields, 8 + length) for name, fields in header.items()}

    def _entry(self, name: str, fields: object, base: int) -> Entry:
        try:
            assert isinstance(fields, dict)
            shape = tuple(fields["shape"])
            begin, end = fields["data_offsets"]
            dtype = fields["dtype"]
            numbers = (*shape, begin, end)
            assert isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in numbers)
            assert math.prod(n for n in shape if n > 0) < MAX_ELEMENTS
        except (AssertionError, KeyError, TypeError, ValueError):
            raise self._error(name, f"its header entry is malformed: {fields!r:.100}") from None
        if base + end > len(self.bytes):
            raise self._error(
                name,
                f"truncated: its data end at byte {base + end}, the file at {len(self.bytes)}",
            )
        if dtype in DTYPES:
            needed = math.prod(shape) * DTYPES[dtype].itemsize
            if end - begin != needed:
                raise self._error(
                    name, f"{dtype} {shape} takes {needed} bytes, it has {end - begin}"
                )
        return Entry(dtype, shape, base + begin, base + end)


def write_tensor_file(
    path: Path, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors of `DTYPES`, one after the other, in the order given. Raises TensorFileError
    for another dtype, before anything is written."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, dict] = {"__metadata__": dict(metadata)} if metadata else {}
    tensors, offset = list(tensors), 0
    for name, tensor in tensors:
        if tensor.dtype not in names:
            raise TensorFileError(path, name, f"{tensor.dtype} is not one of {', '.join(DTYPES)}")
        end = offset + tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of eight, as readers expect
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in tensors:
            flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            file.write(flat.numpy().data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to. At the end that file is on the disk and goes into its
    place: a reader sees all of it or what was there before. After an error it is removed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("r+b") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
