"""What a session holds after a while, drawn: every page, by class and position. No model runs.

The cache's own books are kept for as many ticks, on pools a few bytes wide.
"""

# Dimension key: T tokens, K layer groups.

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from tml_kernels.kv_cache import PageClass, RollingKVCache, Session

from ..metrics import CLASS_NAMES
from ..model import ModelConfig
from ..model.parts import PAGE_ROWS, cache_groups
from ..model.state import Run
from .prepare import Options, make_budget, tokens_per_tick

LOCAL = "local layers"
LANES = (*CLASS_NAMES, LOCAL)
PROMPT = 48  # anchor tokens that the session begins with
TEXT, TEXT_EVERY_S = 24, 9.0  # tokens of a message, and how often one comes


class Page(NamedTuple):
    position_T: np.ndarray  # int64, of its tokens
    is_open: bool  # the class's next token goes here


def _lanes() -> dict[str, list[Page]]:
    return {lane: [] for lane in LANES}


@dataclass(frozen=True)
class Memory:
    """A session's pages by lane, the oldest first."""

    preset: str
    seconds: float
    window: int  # of the local layers
    rewind: int  # positions that they keep before it
    start_N: np.ndarray  # int64, the position at which each tick began, and the next one
    budget: dict[str, int]  # pages of each class
    held: dict[str, list[Page]] = field(default_factory=_lanes)
    dropped: dict[str, list[Page]] = field(default_factory=_lanes)

    @property
    def length(self) -> int:
        return int(self.start_N[-1])


def simulate_memory(options: Options) -> Memory:
    """A session of `options.seconds` that hears, sees, replies, and reads a message now and then.

    In whole ticks; deterministic.
    """
    config = ModelConfig.preset(options.preset)
    budget, layout = make_budget(options, config), config.layout
    specs = cache_groups(config, 1, budget, layout.max_tokens_per_tick)
    thin = [replace(spec, num_layers=1, num_kv_heads=1, head_width=1) for spec in specs]
    cache = RollingKVCache(thin, max_sessions=1, page_dtype=torch.float16)
    session = cache.open(budget.pages())
    num_ticks = math.ceil(options.seconds * 1000 / layout.period_ms)
    start_N = np.zeros(num_ticks + 1, np.int64)
    tokens: dict[str, list[np.ndarray]] = {lane: [np.empty(0, np.int64)] for lane in LANES}
    used: dict[str, dict[int, int]] = {lane: {} for lane in LANES}  # rows of every page, by base
    for tick in range(num_ticks):
        runs = _runs(options, config, tick)
        rows_K_T = np.empty((len(specs), sum(count for _, count in runs)), np.int64)
        cache.reserve(session, runs)
        for page_class, count in runs:
            position_T = cache.append(session, page_class, count, rows_K_T) + np.arange(count)
            tokens[_name(page_class)].append(position_T)
            tokens[LOCAL].append(position_T)
        cache.commit(session)
        cache.tick()
        start_N[tick + 1] = cache.length(session)
        for lane, base, count in _pages(cache, session):
            used[lane][base] = count
    held = {(lane, base) for lane, base, _ in _pages(cache, session)}
    local = next(spec for spec in specs if spec.window is not None)
    span = next(spec.span for spec in specs if spec.window is None)
    assert local.window is not None and span is not None
    memory = Memory(
        preset=options.preset,
        seconds=num_ticks * layout.period_ms / 1000,
        window=local.window,
        rewind=local.history,
        start_N=start_N,
        budget={_name(page_class): pages for page_class, pages in budget.pages().items()},
    )
    for lane in LANES:
        all_T = np.concatenate(tokens[lane])
        for base, count in sorted(used[lane].items()):
            first = int(np.searchsorted(all_T, base))
            is_near = lane == LOCAL or memory.length - base < span
            page = Page(all_T[first : first + count], count < PAGE_ROWS and is_near)
            (memory.held if (lane, base) in held else memory.dropped)[lane].append(page)
    return memory


def _pages(cache: RollingKVCache, session: Session) -> Iterator[tuple[str, int, int]]:
    """(lane, base, rows used) of all that the session holds."""
    for g, group in enumerate(cache.groups):
        for ref in cache.pages(session, g):
            lane = _name(ref.page_class) if group.spec.window is None else LOCAL
            yield lane, ref.base, ref.used


def _runs(options: Options, config: ModelConfig, tick: int) -> list[Run]:
    layout = config.layout
    every = max(1, round(TEXT_EVERY_S * 1000 / layout.period_ms))
    counts = tokens_per_tick(options, config) | {"text": TEXT if tick % every == every // 2 else 0}
    runs = [(PageClass.ANCHOR, PROMPT)] if tick == 0 else []
    runs += [(_class(block), counts[block]) for block in (*layout.blocks, "reply")]
    return [(page_class, count) for page_class, count in runs if count > 0]


def _class(name: str) -> PageClass:
    return getattr(PageClass, name.upper())


def _name(page_class: PageClass) -> str:
    return page_class.name.lower()
