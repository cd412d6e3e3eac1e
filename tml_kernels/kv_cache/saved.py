"""What a saved session's file holds, and the checks before any of it is believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .._core import PageClass, PageImage, PageTable, Session, SessionImage
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


class Saved(NamedTuple):
    """What a file holds. Nothing of `image` is believed before `restore_image`."""

    image: SessionImage
    contents: Contents  # of the image's pages
    state: dict[str, Tensor]  # rows of slot tensors


def read_contents(
    cache: RollingKVCache,
    file: TensorFile,
    description: dict[str, Any],
    budgets: Sequence[int] | None,
) -> Saved:
    """Copied out of the file, and cut to what a session of this cache holds: windows reach as far
    back as they do here, and with budgets, pages by class, classes give up their oldest ones.
    SessionFileError names what does not fit."""
    expected = {"page_dtype": str(cache.page_dtype), "groups": _shapes(cache)}
    for name, value in expected.items():
        if description.get(name) != value:
            raise SessionFileError(
                file.path, "", f"{name} is {description.get(name)}, here it is {value}"
            )
    image, pages = _image_of(cache, file, description)
    num_pages = [len(of_group) for of_group in pages]
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
    image, kept = _cut(cache, file, image, pages, budgets)
    for part, left, count in zip(contents, kept, num_pages, strict=True):
        if len(left) < count:
            part.update({name: x[:, left] for name, x in part.items()})
    if cache.device.type == "cuda":
        contents = [{name: x.pin_memory() for name, x in part.items()} for part in contents]
    return Saved(image, contents, state)


def restore_image(table: PageTable, path: Path, image: SessionImage) -> Session:
    """A suspended session with the saved pages. SessionFileError for books that contradict
    themselves, OutOfSessions."""
    try:
        return table.restore(image)
    except (TypeError, ValueError) as error:
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


def _image_of(
    cache: RollingKVCache, file: TensorFile, description: dict[str, Any]
) -> tuple[SessionImage, list[list[int]]]:
    """And, of each group, the indices of its pages."""
    pages: list[list[int]] = [[] for _ in cache.groups]
    try:
        image = SessionImage(*description["image"])
        for n, page in enumerate(image.pages):
            pages[page[0]].append(n)
    except (IndexError, KeyError, TypeError):
        raise SessionFileError(file.path, "", "its list of pages cannot be read") from None
    return image, pages


def _cut(
    cache: RollingKVCache,
    file: TensorFile,
    image: SessionImage,
    pages: list[list[int]],
    budgets: Sequence[int] | None,
) -> tuple[SessionImage, list[list[int]]]:
    """Without the pages that `PageTable.commit` would drop here; of each group, which of its pages
    are left."""
    gone: set[int] = set()
    try:
        rolled_to = list(image.rolled_to)
        for g, (group, of_group) in enumerate(zip(cache.groups, pages, strict=True)):
            oldest_first = sorted((PageImage(*image.pages[n])[1:4], n) for n in of_group)
            if group.spec.window is not None:
                needed_from = image.length - group.spec.history - group.spec.window + 1
                for (base, used, _), n in oldest_first[:-1]:
                    if base + used <= needed_from:
                        rolled_to[g] = base + used
                        gone.add(n)
            elif budgets is not None:
                gone |= _over(file, [(cls, n) for (_, _, cls), n in oldest_first], budgets)
        image = image._replace(
            rolled_to=rolled_to,
            pages=[page for n, page in enumerate(image.pages) if n not in gone],
            budgets=image.budgets if budgets is None else list(budgets),
        )
    except (IndexError, TypeError):
        raise SessionFileError(file.path, "", "its list of pages cannot be read") from None
    return image, [[i for i, n in enumerate(of) if n not in gone] for of in pages]


def _over(
    file: TensorFile, oldest_first: list[tuple[int, int]], budgets: Sequence[int]
) -> set[int]:
    """Of pages, each a class and an index, the indices of those that budgets have no room for."""
    gone: set[int] = set()
    for page_class, budget in enumerate(budgets):
        own = [n for cls, n in oldest_first if cls == page_class]
        if page_class == PageClass.ANCHOR.value and len(own) > budget:
            raise SessionFileError(
                file.path, "", f"it has {len(own)} anchor pages, more than the {budget} kept here"
            )
        gone |= set(own[: max(0, len(own) - budget)])
    return gone


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
