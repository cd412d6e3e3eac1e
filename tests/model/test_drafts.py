"""Ticks that draft: they say what ticks say, in no more passes, and remember the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_model import small_config
from test_full_draft import heard, make_model
from test_static_tick import SLOTS, Ticks, contents, recording
from torch import Tensor

from tml_kernels.ops.dmel.reference import quantise_ref
from tml_kernels.testing import assert_bitwise, assert_matches
from tml_runtime import Runtime
from tml_runtime.graph import TickGraphs
from tml_runtime.model import (
    InteractionModel,
    ModelConfig,
    ModelState,
    PastTick,
    TickInput,
    TickOutput,
    TurnLayout,
)
from tml_runtime.model.buffers import Bucket
from tml_runtime.model.full_draft import full_steps
from tml_runtime.model.output import Drawing
from tml_runtime.model.tick import embed_rows

CONFIG = small_config(mtp_layers=("local", "global"))
K = CONFIG.layout.num_steps
THREE_STEPS = replace(
    CONFIG,
    mtp_layers=("global",),
    layout=TurnLayout(period_ms=300, num_steps=3, mel_frames_per_step=2),
)
WARM = {0: 0.0, 1: 1.0, 2: 100.0, 3: 100.0}  # at 100, draws follow the noise that drafts share
LIMIT = 1e-4  # sums of several tokens' products are made in another order


def certain(config: ModelConfig) -> InteractionModel:
    """It has one thing to say, and is silent, so that every draft is right."""
    model = make_model(config, "quiet")
    model.weights.unembed_V_D.zero_()  # pyright: ignore
    return model


class Twins:
    """Two states that the same happens to, of which the second's ticks draft."""

    def __init__(self, model: InteractionModel, **options: Any) -> None:
        self.model = model
        self.plain = model.new_state(SLOTS, **options)
        self.drafting = model.new_state(SLOTS, drafts=True, **options)
        for slot in range(SLOTS):
            self.open(slot)

    @property
    def states(self) -> tuple[ModelState, ModelState]:
        return self.plain, self.drafting

    def open(self, slot: int) -> None:
        for state in self.states:
            state.reset(slot)
            state.set_sampling(slot, seed=slot, temperature=WARM[slot])

    def each(self, verb: Callable[[ModelState], Any]) -> list[Any]:
        return [verb(state) for state in self.states]

    def tick(self, tick: TickInput) -> TickOutput:
        """What the drafting one says; sessions that are over are replaced."""
        expected, actual = self.each(lambda state: self.model.tick(state, tick))
        assert_same_words(actual, expected)
        self.assert_same_memory()
        for slot in tick.slot_S[actual.fault_S].tolist():
            self.open(slot)
        return actual

    def assert_same_memory(self) -> None:
        """Of all that both have, up to rounding; of what was said, to the bit."""
        plain, drafting = self.states
        for name, x in contents(plain).items():
            ours = getattr(drafting, name)
            if x.dtype == torch.float32 and x.ndim == 4:
                ours = ours[: len(x)]  # of the model's own layers
                assert_matches(ours.nan_to_num(), x.nan_to_num(), limit=LIMIT)
            else:
                assert_bitwise(ours, x)
        for slot in range(SLOTS):
            assert drafting.length(slot) == plain.length(slot)


def assert_same_words(actual: TickOutput, expected: TickOutput) -> None:
    assert_bitwise(actual.token_S_K, expected.token_S_K)
    assert_matches(actual.mel_S_K_B, expected.mel_S_K_B, limit=LIMIT)
    assert torch.equal(actual.fault_S, expected.fault_S)
    assert actual.tokens == expected.tokens
    assert (expected.drafts, expected.drafts_kept) == (0, 0)


def tick_of(slots: list[int], seed: int, config: ModelConfig = CONFIG) -> TickInput:
    rows = [heard(config, 10 * seed + slot) for slot in slots]
    return TickInput(
        torch.tensor(slots, dtype=torch.int32),
        torch.cat([row.pcm_S_W for row in rows]),
        torch.cat([row.missing_S for row in rows]),
    )


@pytest.mark.parametrize(
    ("config", "speech"),
    [
        *[(CONFIG, speech) for speech in ("quiet", "now and then", "loud", "its own")],
        (THREE_STEPS, "quiet"),
    ],
    ids=["quiet", "now-and-then", "loud", "own-speech", "three-steps"],
)
def test_what_is_said_is_what_is_said_without_drafts(config: ModelConfig, speech: str) -> None:
    """By sessions of different load that come and go, some of which are broken."""
    own = speech == "its own"
    model = InteractionModel.random(config) if own else make_model(config, speech)
    twins, ticks = Twins(model), Ticks(config, seed=3)
    outs = [twins.tick(ticks.next()) for _ in range(7)]
    assert any(out.fault_S.any() for out in outs)
    kept = [(out.drafts_kept, out.drafts) for out in outs if out.drafts]
    if speech == "quiet":
        assert any(0 < right < drafts for right, drafts in kept)  # mixed in one tick
        assert any(right == drafts for right, drafts in kept)
    elif speech == "loud":
        assert all(right == 0 for right, _ in kept)
    twins.drafting.cache.check_invariants()


def test_right_drafts_save_passes_and_wrong_ones_cost_none(monkeypatch: Any) -> None:
    """Counted where the layers run."""
    for model, passes in ((certain(CONFIG), 2), (make_model(CONFIG, "loud"), K)):
        twins, count = Twins(model), [0]
        run_own = model.backbone.run_own

        def counted(*args: Any, run_own: Any = run_own, count: list[int] = count) -> Tensor:
            count[0] += 1
            return run_own(*args)

        monkeypatch.setattr(model.backbone, "run_own", counted)
        for seed in range(3):
            out = twins.tick(tick_of([2, 0, 3], seed))
            assert (out.passes, out.drafts) == (passes, 6)
            assert out.drafts_kept == (6 if passes == 2 else 0)
        assert count[0] == 3 * (K + passes)


@pytest.mark.parametrize("speech", ["quiet", "now and then"])
def test_drafts_are_those_of_whole_sequences(speech: str) -> None:
    """Over ticks with right and wrong drafts, so the layers' keys, taps and carry are those of what
    was said."""
    model, slot_1 = make_model(CONFIG, speech), torch.tensor([0])
    state, other = model.new_state(1, drafts=True), model.new_state(1)
    x_T_D, kept = torch.empty(0, CONFIG.width), []
    for seed in range(7):
        state.set_sampling(0, seed=1, temperature=(100.0, 1.0, 5.0)[seed % 3])
        tick = tick_of([0], seed)
        other.token_N.copy_(state.token_N)
        other.levels_N_F_B.copy_(state.levels_N_F_B)
        new_T_D, _ = embed_rows(model.frontend, other, tick)
        x_T_D = torch.cat([x_T_D, new_T_D])
        drawing = Drawing.of(state, slot_1)
        drawing = Drawing(*(setting_S.clone() for setting_S in drawing))
        spoken = full_steps(CONFIG, model.weights, x_T_D, drawing)
        out = model.tick(state, tick)
        assert_bitwise(out.token_S_K[0], spoken.token_K)
        assert out.drafts_kept == spoken.steps_P[1] - 1
        assert out.passes == (2 if spoken.passes == 2 else K)
        kept.append(out.drafts_kept)
        said_T_D = model.frontend.embed_step(spoken.token_K[:-1], spoken.levels_K_F_B[:-1])
        x_T_D = torch.cat([x_T_D, said_T_D])
    assert len(set(kept)) > 1


def test_a_session_remembers_what_it_said_and_no_draft() -> None:
    """As one does that is told what it said: so of every layer, those that draft too, and what a
    replay leaves is a drafting session's."""
    model = make_model(CONFIG, "quiet")
    state, told = model.new_state(1, drafts=True), model.new_state(1, drafts=True)
    kept = []
    for seed in range(4):
        state.set_sampling(0, seed=1, temperature=(100.0, 1.0, 5.0)[seed % 3])
        tick = tick_of([0], seed)
        out = model.tick(state, tick)
        kept.append(out.drafts_kept)
        past = PastTick(
            tick.pcm_S_W[0].numpy(), bool(tick.missing_S[0]), None, [],
            out.token_S_K[0].numpy(), out.mel_S_K_B[0].numpy(),
        )  # fmt: skip
        model.replay(told, 0, told.length(0), [past])
        pairs = [
            *zip(state.taps(), told.taps(), strict=True),
            *((getattr(state, n), getattr(told, n)) for n in ("carry_L_N_D", "tail_N_W")),
        ]
        for ours, theirs in pairs:
            assert ours.any()
            assert_matches(ours, theirs, limit=LIMIT)
    assert min(kept) < 2 == max(kept)
    for ours, theirs in zip(state.groups, told.groups, strict=True):
        rows = (group.pages.contents().values() for group in (ours, theirs))
        for x, y in zip(*rows, strict=True):
            assert_matches(x.double().nan_to_num(), y.double().nan_to_num(), limit=LIMIT)


def test_a_bucket_changes_no_bit(monkeypatch: Any) -> None:
    """Nor does debugging it, in which every part is looked at."""
    model, ticks = make_model(CONFIG, "now and then"), Ticks(CONFIG, seed=1)
    states = [model.new_state(SLOTS, drafts=True) for _ in range(3)]
    for state, mode in zip(states[1:], ("eager", "debug"), strict=True):
        TickGraphs(model, state, mode=mode)
    for slot in range(SLOTS):
        for state in states:
            state.set_sampling(slot, seed=slot, temperature=WARM[slot])
    for _ in range(2):  # without the third, which has a broken row
        tick = ticks.next()
        expected, *others = (model.tick(state, tick) for state in states)
        for state, out in zip(states[1:], others, strict=True):
            assert_bitwise(out.token_S_K, expected.token_S_K)
            assert_bitwise(out.mel_S_K_B, expected.mel_S_K_B)
            assert (out.passes, out.drafts_kept) == (expected.passes, expected.drafts_kept)
            for name, x in contents(states[0]).items():
                assert_bitwise(getattr(state, name), x)


def test_ops_and_shapes_of_both_parts_follow_from_the_bucket_alone() -> None:
    """What two graphs need: neither part asks the host anything. Of nobody they leave no trace."""
    model = make_model(CONFIG, "now and then")
    state, bucket = model.new_state(SLOTS, drafts=True), Bucket(SLOTS, 90, 30)
    device_tick, calls = model.device_tick, []
    graphs = TickGraphs(model, state, buckets=[bucket], mode="eager")
    for seed in range(2):
        model.tick(state, tick_of([0, 2], seed))
    before = contents(state)
    for stage in (True, False):
        if stage:
            state.buffers.stage_nothing(bucket)
        parts = []
        for run in (device_tick.run, device_tick.run_rest):
            with recording() as recorder:
                run(state, bucket, lambda stage, made: None)
            parts.append(recorder.calls)
        calls.append(parts)
        if stage:
            for name, x in before.items():
                assert_bitwise(getattr(state, name), x)
            _stage(state, tick_of([1, 3], 5), bucket)
    assert len(calls[0][0]) > 100 < len(calls[0][1])
    assert calls[0] == calls[1]
    assert graphs.run(bucket).gpu_ns is None


def _stage(state: ModelState, tick: TickInput, bucket: Bucket) -> None:
    """As `run_tick` does, up to the device's half."""
    from tml_runtime.model.passes import classes_of, fill_passes

    count_S_R = tick.counts(CONFIG)
    slots = tick.slot_S.tolist()
    assert not state.reserve_all(slots, classes_of(CONFIG.layout.blocks), count_S_R)
    tick.fill(state, count_S_R, bucket)
    fill_passes(state, slots, bucket)


@pytest.mark.parametrize("part", ["run_first", "run_rest"])
def test_a_tick_that_raises_leaves_everything_as_it_was(part: str, monkeypatch: Any) -> None:
    model = make_model(CONFIG, "loud")
    twins = Twins(model)
    twins.tick(tick_of([0, 1, 2], 0))
    before = contents(twins.drafting)
    run = getattr(model.device_tick.drafter, part)

    def fail(*args: Any) -> None:
        run(*args)
        raise RuntimeError("the device was lost")

    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="was lost"):
        broken.setattr(model.device_tick.drafter, part, fail)
        model.tick(twins.drafting, tick_of([0, 1, 2], 1))
    for name, x in before.items():
        assert_bitwise(getattr(twins.drafting, name), x)
    twins.drafting.cache.check_invariants()
    twins.tick(tick_of([2, 3, 1], 1))


def test_sessions_go_back_and_part_as_they_do_without_drafts() -> None:
    model = make_model(CONFIG, "quiet")
    twins = Twins(model)
    twins.tick(tick_of([1, 2], 0))
    ends = {slot: twins.plain.length(slot) for slot in (1, 2)}
    carry = twins.drafting.carry_L_N_D
    assert carry is not None
    then = carry.clone()
    first = [twins.tick(tick_of([1, 2], seed)).drafts_kept for seed in (1, 2)]
    for state in twins.states:
        for slot in (1, 2):
            state.cache.rewind(state.session(slot), ends[slot])
    assert_bitwise(carry, then)
    assert [twins.tick(tick_of([1, 2], seed)).drafts_kept for seed in (1, 2)] == first
    twins.each(lambda state: state.fork(2, 3))
    tick = tick_of([2, 2], 3)
    out = twins.tick(replace(tick, slot_S=torch.tensor([2, 3], dtype=torch.int32)))
    assert_bitwise(out.token_S_K[0], out.token_S_K[1])
    assert_bitwise(carry[:, 2], carry[:, 3])
    twins.drafting.cache.check_invariants()


def test_a_broken_row_harms_no_other() -> None:
    model = make_model(CONFIG, "now and then")
    states = [model.new_state(3, drafts=True) for _ in range(2)]
    for state in states:
        for slot in range(3):
            state.set_sampling(slot, seed=slot, temperature=100.0)
    for seed in range(3):
        tick = tick_of([0, 1, 2], seed)
        states[1].attn_conv_L_N_3_D[seed, 1] = float("nan")
        whole, part = model.tick(states[0], tick), model.tick(states[1], tick)
        assert part.fault_S.tolist() == [False, True, False]
        for row in (0, 2):
            assert_bitwise(part.token_S_K[row], whole.token_S_K[row])
            assert_bitwise(part.mel_S_K_B[row], whole.mel_S_K_B[row])
        assert (part.token_S_K[1] == CONFIG.vocab.silence).all()
        carry = [state.carry_L_N_D for state in states]
        for slot in (0, 2):
            assert_bitwise(carry[1][:, slot], carry[0][:, slot])  # pyright: ignore
    states[1].reset(1)
    after = [model.tick(state, tick_of([0, 2], 9)) for state in states]
    assert_bitwise(after[1].token_S_K, after[0].token_S_K)
    assert model.tick(states[1], tick_of([1], 9)).fault_S.tolist() == [False]


def test_without_drafts_nothing_of_it_is_in_memory() -> None:
    plain, drafting = Twins(make_model(CONFIG, "quiet")).states
    assert plain.carry_L_N_D is None and plain.num_drafts == 0
    assert len(plain.attn_conv_L_N_3_D) == CONFIG.num_layers
    assert [len(group.conv_L_N_2_3_W) for group in plain.groups] == [2, 1]
    assert [len(group.conv_L_N_2_3_W) for group in drafting.groups] == [3, 2]
    assert len(plain.buffers.said(Bucket(2, 9, 0)).known_S) == 0


def config_of(steps: int, layers: int) -> ModelConfig:
    layout = TurnLayout(period_ms=50 * steps, num_steps=steps)
    return small_config(mtp_layers=("local",) * layers, layout=layout)


@pytest.mark.parametrize(
    ("steps", "layers", "words"),
    [
        (4, 0, r"'small' has 0 multi-token-prediction layers.*MTP_LAYERS\[:2\]"),
        (4, 1, "'small' has 1 multi-token-prediction layers, and a tick drafts with 2"),
        (2, 2, r"num_steps=2 of the layout, and a tick drafts where there are 3\.\.4"),
        (5, 8, "num_steps=5 of the layout"),
    ],
)
def test_a_model_that_cannot_draft_says_why(steps: int, layers: int, words: str) -> None:
    model = InteractionModel.random(config_of(steps, layers))
    model.new_state(1)
    with pytest.raises(ValueError, match=words):
        model.new_state(1, drafts=True)


def test_ranks_do_not_draft() -> None:
    model = InteractionModel.random(CONFIG)
    model.ranks = SimpleNamespace(size=2)  # pyright: ignore
    with pytest.raises(ValueError, match="drafts: this model is shared by 2 ranks"):
        model.new_state(1, drafts=True)


def test_a_runtime_drafts_when_it_is_told_to() -> None:
    model, said, reports = certain(CONFIG), [], []
    for drafts in (False, True):
        runtime = Runtime(model, num_slots=2, realtime=False, seed=1, drafts=drafts)
        session = runtime.open_session(prompt=[5, 6, 7])
        session.push_audio(np.zeros(3 * CONFIG.layout.samples_per_tick, np.float32), 0.0)
        runtime.run_ticks(3)
        said.append([repr(out) for out in session.poll()])
        reports.append(runtime.report())
        runtime.stop()
    assert said[0] == said[1] and len(said[0]) > 0
    ran = reports[1]["rows"]
    assert [report["drafts"] for report in reports] == [0, 2 * ran]
    assert reports[1]["drafts_kept"] == 2 * ran
    assert [report["passes"] for report in reports] == [K * ran, 2 * ran]


def test_quiet_speech_is_what_a_draft_takes_it_for() -> None:
    """The quietest level in every band, which is what `embed_step` takes as zeros."""
    quiet = torch.full((1, CONFIG.layout.dmel.num_bands), CONFIG.layout.dmel.level_min)
    assert not quantise_ref(quiet, CONFIG.layout.dmel).any()
