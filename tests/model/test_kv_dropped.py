"""Pages that sessions lose, against a count of every page that they were ever seen to hold."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import torch
from small_model import small_config

from tml_kernels.kv_cache import CLASSES, PageClass
from tml_runtime.model import InteractionModel, KvBudget, ModelState, TickInput

CONFIG = small_config()
BUDGET = KvBudget(anchor=64, text=64, audio=130, video=70, reply=64)


def make_state(num_slots: int) -> ModelState:
    return InteractionModel.random(CONFIG).new_state(num_slots, budget=BUDGET)


def global_group(state: ModelState) -> int:
    return next(g for g, group in enumerate(state.groups) if group.window is None)


def append(state: ModelState, slot: int, page_class: PageClass, tokens: int) -> None:
    rows_K_T = np.empty((len(state.groups), tokens), np.int64)
    state.reserve(slot, [(page_class, tokens)])
    state.cache.append(state.session(slot), page_class, tokens, rows_K_T)


def test_what_was_seen_and_is_not_held_was_dropped() -> None:
    dice, state = random.Random(7), make_state(2)
    seen: list[set[tuple[PageClass, int]]] = [set(), set()]
    total = np.zeros(len(CLASSES), int)
    for tick in range(120):
        slots = [slot for slot in range(2) if dice.random() < 0.8]
        for slot in slots:
            append(state, slot, dice.choice(CLASSES[1:]), dice.randint(1, 40))
            refs = state.cache.pages(state.session(slot), global_group(state))
            seen[slot] |= {(ref.page_class, ref.base) for ref in refs}
        if tick % 9 == 4:  # pages that were begun in vain are nobody's loss
            state.roll_back(slots)
            for slot in slots:
                seen[slot] = {ref for ref in seen[slot] if ref[1] < state.length(slot)}
        else:
            state.commit(slots)
        total += state.take_dropped()
    ever = [sum(c == page_class for pages in seen for c, _ in pages) for page_class in CLASSES]
    assert (total == np.subtract(ever, state.kv_pages(range(2)))).all()
    assert (total[1:] > 5).all()
    assert state.take_dropped() == [0] * len(CLASSES)


def test_room_that_a_tick_made_for_itself_counts() -> None:
    model, budget = InteractionModel.random(CONFIG), KvBudget(video=400)
    state = model.new_state(1, budget=budget, max_append=300, global_pages=6)
    append(state, 0, PageClass.VIDEO, 300)
    state.commit([0])
    assert state.take_dropped() == [0] * len(CLASSES)
    append(state, 0, PageClass.TEXT, 256)
    assert state.take_dropped() == [0, 0, 0, 4, 0]
    state.roll_back([0])
    assert state.kv_pages([0]) == [0, 0, 0, 1, 0]
    assert state.take_dropped() == [0] * len(CLASSES)


def test_a_session_that_ends_has_dropped_nothing() -> None:
    state = make_state(1)
    append(state, 0, PageClass.AUDIO, 150)
    state.commit([0])
    state.reset(0)
    assert state.kv_pages([0]) == state.take_dropped() == [0] * len(CLASSES)


def test_ticks_say_what_they_dropped() -> None:
    layout = CONFIG.layout
    tiny = replace(BUDGET, audio=1, reply=1)  # a page each, and the open one
    model = InteractionModel.random(CONFIG)
    state = model.new_state(1, budget=tiny)
    silence = torch.zeros(1, layout.samples_per_tick)
    dropped = []
    for _ in range(50):  # 200 tokens of each: four pages, of which two stay
        tick = TickInput(
            slot_S=torch.zeros(1, dtype=torch.int32),
            pcm_S_W=silence,
            missing_S=torch.zeros(1, dtype=torch.bool),
        )
        out = model.tick(state, tick)
        dropped.append(out.kv_dropped)
        assert max(out.kv_pages) <= 2
    assert np.sum(dropped, axis=0).tolist() == [0, 0, 2, 0, 2]
    assert [tick for tick, pages in enumerate(dropped) if any(pages)] == [32, 48]
