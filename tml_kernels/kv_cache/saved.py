"""What a saved session's file holds, and the checks before any of it is believed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._core import PageTable, Session, SessionImage
from .._tensor_file import TensorFile
from .session_file import SessionFileError, write_session_file
from .transfer import Contents

if TYPE_CHECKING:
    from .cache import RollingKVCache

SIZED = ("pages", "columns", "history")  # fields of a group that may differ between caches


def write_session(
    cache: RollingKVCache, path: Path, slot: int, image: SessionImage, contents: Contents
) -> None:
    """One file of a session's books, the contents of its pages, and its slot's rows."""
    named = [(f"{g}.{name}", x) for g, part in enumerate(contents) for name, x in part.items()]
    named += [(f"state.{name}", x) for name, x in cache.slot_rows(slot).items()]
    write_session_file(path, named, describe(cache, image))


def describe(cache: RollingKVCache, image: SessionImage) -> dict[str, Any]:
    """All but the tensors. The mark stays behind: its snapshot is not saved."""
    return {
        "page_dtype": str(cache.page_dtype),
        "groups": _shapes(cache),
        "image": image._replace(mark=None),
    }


def read_contents(
    cache: RollingKVCache, file: TensorFile, description: dict[str, Any]
) -> tuple[Contents, dict[str, Tensor]]:
    """(contents of pages, rows of slot tensors), copied out of the file. SessionFileError names
    what does not fit."""
    expected = {"page_dtype": str(cache.page_dtype), "groups": _shapes(cache)}
    for name, value in expected.items():
        if description.get(name) != value:
            raise SessionFileError(
                file.path, "", f"{name} is {description.get(name)}, here it is {value}"
            )
    num_pages = _pages_per_group(cache, file, description)
    contents = [
        {
            name: _take(file, f"{g}.{name}", (x.shape[0], num_pages[g], x.shape[2]), x.dtype)
            for name, x in group.contents().items()
        }
        for g, group in enumerate(cache.groups)
    ]
    state = {
        name: _take(file, f"state.{name}", tuple(row.shape), row.dtype)
        for name, row in cache.slot_rows(0).items()
    }
    if cache.device.type == "cuda":
        contents = [{name: x.pin_memory() for name, x in part.items()} for part in contents]
    return contents, state


def restore_image(
    table: PageTable, path: Path, description: dict[str, Any], priority: int | None
) -> Session:
    """A suspended session with the saved pages. SessionFileError for books that contradict
    themselves, OutOfSessions."""
    try:
        image = list(description["image"])
        if priority is not None:
            image[SessionImage._fields.index("priority")] = priority
        return table.restore(SessionImage(*image))
    except (KeyError, TypeError, ValueError) as error:
        raise SessionFileError(path, "", f"its pages contradict themselves: {error}") from None


def check_positions(path: Path, contents: Contents, positions: list[list[list[int]]]) -> None:
    """Rows hold what the books of a restored session say: positions of each page of each group, in
    their order. SessionFileError."""
    for g, (part, pages) in enumerate(zip(contents, positions, strict=True)):
        rows = part["row_position"][0] if "row_position" in part else []
        for page, (row_R, expected) in enumerate(zip(rows, pages, strict=False)):
            if row_R[: len(expected)].tolist() != expected:
                raise SessionFileError(
                    path, f"{g}.row_position", f"page {page} contradicts the list of pages"
                )


def _shapes(cache: RollingKVCache) -> list[dict[str, Any]]:
    specs = [asdict(group.spec) for group in cache.groups]
    return [{name: x for name, x in spec.items() if name not in SIZED} for spec in specs]


def _pages_per_group(
    cache: RollingKVCache, file: TensorFile, description: dict[str, Any]
) -> list[int]:
    counts = [0] * len(cache.groups)
    try:
        for page in SessionImage(*description["image"]).pages:
            counts[page[0]] += 1
    except (IndexError, KeyError, TypeError):
        raise SessionFileError(file.path, "", "its list of pages cannot be read") from None
    return counts


def _take(file: TensorFile, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if name not in file.entries:
        raise SessionFileError(file.path, name, "is missing")
    tensor = file.tensor(name)
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise SessionFileError(
            file.path,
            name,
            f"expected {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}",
        )
    return tensor.clone()
