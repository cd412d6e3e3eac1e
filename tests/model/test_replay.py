"""Replaying what passed: the same state as if it had happened so, and what cannot be done."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_model import small_config
from torch import Tensor

from tml_kernels.kv_cache import NoSnapshot
from tml_kernels.kv_cache.slot_state import NUM_SNAPSHOTS
from tml_kernels.testing import assert_bitwise, assert_matches
from tml_runtime.model import InteractionModel, ModelState, PastTick, TickInput, TickOutput

CONFIG = small_config()
LAYOUT = CONFIG.layout
SILENCE = CONFIG.vocab.silence
MODEL = InteractionModel.random(CONFIG)


def heard(seed: int, slot: int = 0) -> TickInput:
    """With text, and in every other tick with pictures and a marker of something missing."""
    random = np.random.default_rng(seed)
    pcm = random.uniform(-0.5, 0.5, LAYOUT.samples_per_tick).astype(np.float32)
    frames = random.integers(0, 256, (1, 2, 16, 8, 3), dtype=np.uint8) if seed % 2 else None
    return TickInput(
        torch.tensor([slot], dtype=torch.int32),
        torch.from_numpy(pcm)[None],
        torch.tensor([seed % 2 == 1]),
        [frames],
        [random.integers(0, 90, seed % 4).tolist()],
    )


def past(tick: TickInput, said: TickOutput) -> PastTick:
    frames = tick.frames[0]
    return PastTick(
        tick.pcm_S_W[0].numpy(),
        bool(tick.missing_S[0]),
        None if frames is None else np.asarray(frames),
        list(tick.text[0]),
        said.token_S_K[0].numpy(),
        said.mel_S_K_B[0].numpy(),
    )


def cut(tick: PastTick, steps: int) -> PastTick:
    """Nothing said from output step `steps` on."""
    token_K, mel_M_B = tick.token_K.copy(), tick.mel_M_B.copy()
    token_K[steps:] = SILENCE
    mel_M_B[steps * LAYOUT.mel_frames_per_step :] = LAYOUT.dmel.level_min
    return tick._replace(token_K=token_K, mel_M_B=mel_M_B)


def contents(state: ModelState, slot: int = 0) -> dict[str, Tensor]:
    """All that a slot holds, wherever its pages lie."""
    cache, session = state.cache, state.session(slot)
    held = {name: row.clone()[None] for name, row in cache.slot_rows(slot).items()}
    for g, group in enumerate(state.groups):
        keys, values = group.pages.k_pages_L_P_G_R_C, group.pages.v_pages_L_P_G_R_C
        positions = cache.positions(session, g)
        for ref, at in zip(cache.pages(session, g), positions, strict=True):
            for name, pages in {"k": keys, "v": values}.items():
                held[f"{g}.{at[0]}.{name}"] = pages[:, ref.page, :, : len(at)].clone()
    return held


def assert_same(left: ModelState, right: ModelState) -> None:
    """Within float32 rounding: a pass of five tokens multiplies in another order than five of one.
    All that is no sum, such as draws and the audio tail, is the same."""
    one, two = contents(left), contents(right)
    assert one.keys() == two.keys()
    for name, value in one.items():
        if name.startswith(("tail", "seed")) or not value.is_floating_point():
            assert_bitwise(value, two[name])
        elif value.any():
            assert_matches(value, two[name], limit=1e-5)


def test_a_replayed_tick_leaves_the_state_of_the_tick_itself() -> None:
    state, twin = MODEL.new_state(2), MODEL.new_state(2)
    positions, ticks = [0], []
    for seed in range(6):
        tick = heard(seed)
        ticks.append(past(tick, MODEL.tick(state, tick)))
        MODEL.tick(twin, tick)
        positions.append(state.length(0))
    assert MODEL.replay(state, 0, positions[2], ticks[2:]) == positions[3:]
    assert_same(state, twin)
    for seed in range(6, 9):  # and goes on as if nothing had been
        ours, theirs = MODEL.tick(state, heard(seed)), MODEL.tick(twin, heard(seed))
        assert_bitwise(ours.token_S_K, theirs.token_S_K)
        assert_matches(ours.mel_S_K_B, theirs.mel_S_K_B, limit=1e-4)
    state.cache.check_invariants()


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_what_was_not_heard_was_never_said(steps: int) -> None:
    """Two ways to the same state: cut off after the fact, or as it was said."""
    state, twin = MODEL.new_state(1), MODEL.new_state(1)
    ticks = []
    for seed in range(4):
        tick = heard(seed)
        ticks.append(past(tick, MODEL.tick(state, tick)))
        if seed < 2:
            MODEL.tick(twin, tick)
    position = twin.length(0)
    cuts = [cut(ticks[2], steps), cut(ticks[3], 0)]
    MODEL.replay(state, 0, position, cuts)
    MODEL.replay(twin, 0, position, cuts)
    assert_same(state, twin)
    ours = MODEL.tick(state, heard(9))
    with_it = MODEL.new_state(1)
    for seed in range(4):
        MODEL.tick(with_it, heard(seed))
    assert not torch.equal(ours.mel_S_K_B, MODEL.tick(with_it, heard(9)).mel_S_K_B)


def test_a_replay_disturbs_no_other_session() -> None:
    state, alone = MODEL.new_state(2), MODEL.new_state(2)
    first = heard(1)
    said = MODEL.tick(state, first)
    for seed in range(3):
        MODEL.tick(state, heard(seed, slot=1))
        MODEL.tick(alone, heard(seed, slot=1))
    MODEL.replay(state, 0, 0, [cut(past(first, said), 0)])
    ours, theirs = MODEL.tick(state, heard(5, slot=1)), MODEL.tick(alone, heard(5, slot=1))
    assert_bitwise(ours.token_S_K, theirs.token_S_K)
    assert_bitwise(ours.mel_S_K_B, theirs.mel_S_K_B)


def test_replays_and_prompts_take_no_tick_from_what_others_can_go_back_to() -> None:
    state = MODEL.new_state(2)
    ticks, ends, others = [], [0], [0]
    for seed in range(4):
        MODEL.tick(state, heard(seed, slot=1))
        others.append(state.length(1))
        tick = heard(seed)
        ticks.append(past(tick, MODEL.tick(state, tick)))
        ends.append(state.length(0))
    for _ in range(5):  # 20 ticks, with the prompts more than twice as many as are remembered
        assert MODEL.replay(state, 0, 0, ticks) == ends[1:]
    for _ in range(NUM_SNAPSHOTS):
        MODEL.read(state, 0, [5, 6, 7])
    for slot, known in enumerate((ends, others)):  # the replayed one to each of its own too
        for end in reversed(known[:-1]):
            assert state.cache.rewind(state.session(slot), end) == end
    state.cache.check_invariants()


def test_what_cannot_be_rewound_changes_nothing() -> None:
    state = MODEL.new_state(1)
    MODEL.tick(state, heard(1))
    before = contents(state)
    with pytest.raises(NoSnapshot):
        MODEL.replay(state, 0, state.length(0) - 1, [])
    for seed in range(18):  # sixteen ends of ticks are remembered
        MODEL.tick(state, replace(heard(seed), frames=[None]))
        if seed == 0:
            early = state.length(0)
    before = contents(state)
    with pytest.raises(NoSnapshot):
        MODEL.replay(state, 0, early, [])
    after = contents(state)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert_bitwise(value, after[name])


def test_a_prompt_is_read_and_answered_to() -> None:
    state, twin = MODEL.new_state(1), MODEL.new_state(1)
    MODEL.read(state, 0, [1, 2, 3])
    for token in (1, 2, 3):  # in any pieces
        MODEL.read(twin, 0, [token])
    assert_same(state, twin)
    assert not torch.equal(
        MODEL.tick(state, heard(1)).mel_S_K_B, MODEL.tick(MODEL.new_state(1), heard(1)).mel_S_K_B
    )
    with pytest.raises(ValueError, match="100"):
        MODEL.read(state, 0, [CONFIG.vocab.num_valid])
