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

_changes: dict[str, dict[str, Any]] = {}  # by op; empty but within `changed`


def chooser(choose: Callable[[Problem], Config]) -> Callable[[Problem], Config]:
    """Remembers the answers of a pure chooser; TML_PRINT_CONFIGS=1 prints each of them once."""
    op = choose.__module__.split(".")[-2:][0]

    @functools.lru_cache(maxsize=4096)
    def choose_once(problem: Problem) -> Config:
        config = choose(problem)
        if print_configs():
            print(f"{op}: {choose.__name__}({problem}) = {config}", file=sys.stderr)
        return config

    @functools.wraps(choose)
    def choose_now(problem: Problem) -> Config:
        config = choose_once(problem)
        changes = _changes.get(op)
        return dataclasses.replace(config, **changes) if changes else config  # type: ignore

    return choose_now


@contextlib.contextmanager
def changed(op: str, **fields: Any) -> Iterator[None]:
    """For tuning: within it the op's choosers answer with these fields of their configurations
    replaced. For this process, not for other threads' calls beside it."""
    before = _changes.get(op)
    _changes[op] = fields
    try:
        yield
    finally:
        _changes.pop(op)
        if before is not None:
            _changes[op] = before
