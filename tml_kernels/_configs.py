"""What every op's configuration chooser shares."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Hashable
from typing import TypeVar

from ._env import print_configs

Problem = TypeVar("Problem", bound=Hashable)
Config = TypeVar("Config")


def chooser(choose: Callable[[Problem], Config]) -> Callable[[Problem], Config]:
    """Remembers the answers of a pure chooser; TML_PRINT_CONFIGS=1 prints each of them once."""
    op = choose.__module__.split(".")[-2:][0]

    @functools.lru_cache(maxsize=4096)
    def choose_once(problem: Problem) -> Config:
        config = choose(problem)
        if print_configs():
            print(f"{op}: {choose.__name__}({problem}) = {config}", file=sys.stderr)
        return config

    functools.update_wrapper(choose_once, choose)
    return choose_once
