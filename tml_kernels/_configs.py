"""What every op's configuration chooser shares."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

from ._env import print_configs

Problem = TypeVar("Problem", bound=Hashable)
Config = TypeVar("Config")

_ops: set[str] = set()  # that have a chooser
_changes: dict[str, dict[str, Any]] = {}  # by op; empty but within `changed`


def chooser(
    choose: Callable[[Problem], Config], *, ops: tuple[str, ...] = ()
) -> Callable[[Problem], Config]:
    """Remembers the answers of a pure chooser; TML_PRINT_CONFIGS=1 prints each of them once.

    ops: whose it is, by default of the op in whose folder it stands.
    """
    ops = ops or (choose.__module__.split(".")[-2:][0],)
    _ops.update(ops)

    @functools.lru_cache(maxsize=4096)
    def choose_once(problem: Problem) -> Config:
        config = choose(problem)
        if print_configs():
            print(f"{', '.join(ops)}: {choose.__name__}({problem}) = {config}", file=sys.stderr)
        return config

    @functools.wraps(choose)
    def choose_now(problem: Problem) -> Config:
        config = choose_once(problem)
        for op in ops if _changes else ():
            config = dataclasses.replace(config, **_changes.get(op, {}))  # type: ignore
        return config

    return choose_now


def tile_of(size: int) -> int:
    """The least tile of a dot that holds `size`."""
    return max(16, 1 << (size - 1).bit_length())


@contextlib.contextmanager
def changed(op: str, **fields: Any) -> Iterator[None]:
    """For tuning: within it the op's choosers answer with these fields of their configurations
    replaced. For this process, not for other threads' calls beside it. ValueError for an op that
    has no chooser."""
    if op not in _ops:
        raise ValueError(f"op: expected one of {', '.join(sorted(_ops))}, got {op!r}")
    before = _changes.get(op)
    _changes[op] = fields
    try:
        yield
    finally:
        _changes.pop(op)
        if before is not None:
            _changes[op] = before
