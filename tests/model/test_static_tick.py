"""A tick in a bucket: the same bits as in the shapes it has, whatever the padding, and the same ops
on the same shapes whatever comes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_model import small_config
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tml_kernels.testing import assert_bitwise
from tml_runtime.errors import NotCaptured
from tml_runtime.graph import TickGraphs, buckets_of
from tml_runtime.model import (
    InteractionModel,
    KvBudget,
    ModelConfig,
    ModelState,
    TickInput,
    TickOutput,
    TurnLayout,
)
from tml_runtime.model.buffers import Bucket
from tml_runtime.model.tick import shapes_of

CONFIG = small_config()
SLOTS = 4
FEW = KvBudget(anchor=1, text=1, audio=1, video=1, reply=1, rewind=8)
SAMPLING = ({}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2})


class Ticks:
    """Random ticks of up to `SLOTS` sessions: mixed input, idle rows, samples that are broken."""

    def __init__(self, config: ModelConfig, seed: int, pairs: tuple[int, ...] = (0, 1, 3)) -> None:
        self.config = config
        self.pairs = pairs  # of frames
        self.count = 0
        self.dice = random.Random(seed)
        self.numbers = np.random.default_rng(seed)

    def setting(self) -> dict[str, Any]:
        return {**self.dice.choice(SAMPLING), "seed": self.dice.randrange(1000)}

    def next(self) -> TickInput:
        dice, num_rows = self.dice, self.dice.randint(1, SLOTS + 1)
        slots = dice.sample([*range(SLOTS), -1, -1], num_rows)
        pcm_S_W = 0.1 * self.numbers.standard_normal(
            (num_rows, self.config.layout.samples_per_tick), np.float32
        )
        self.count += 1
        if self.count % 3 == 0:
            broken = max(range(num_rows), key=slots.__getitem__)  # not an idle one
            pcm_S_W[broken, 77] = dice.choice([float("nan"), float("inf")])
        return TickInput(
            torch.tensor(slots, dtype=torch.int32),
            torch.from_numpy(pcm_S_W),
            torch.tensor([dice.random() < 0.2 for _ in slots]),
            [self._frames() for _ in slots],
            [[dice.randrange(90) for _ in range(dice.choice((0, 0, 1, 12)))] for _ in slots],
        )

    def _frames(self) -> np.ndarray | None:
        side, pairs = self.config.patch.patch, self.dice.choice(self.pairs)
        size = (side * self.dice.randint(1, 2), side * self.dice.randint(1, 4))
        return self.numbers.integers(0, 256, (pairs, 2, *size, 3), np.uint8) if pairs else None


def needed_for(config: ModelConfig, tick: TickInput) -> Bucket:
    """The shapes of a tick of which no row is refused."""
    return shapes_of(config, tick.counts(config)[tick.slot_S.numpy() >= 0])


def contents(state: ModelState) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in vars(state).items() if isinstance(x, Tensor)}


def assert_same(actual: TickOutput, expected: TickOutput) -> None:
    assert_bitwise(actual.token_S_K, expected.token_S_K)
    assert_bitwise(actual.mel_S_K_B, expected.mel_S_K_B)
    assert torch.equal(actual.fault_S, expected.fault_S)
    assert {r: str(e) for r, e in actual.refused.items()} == {
        r: str(e) for r, e in expected.refused.items()
    }
    assert (actual.kv_pages, actual.kv_dropped) == (expected.kv_pages, expected.kv_dropped)


class Twins:
    """Two states that the same happens to: one runs ticks in their own shapes, one in buckets."""

    def __init__(self, config: ModelConfig, ticks: Ticks, model: dict, **options: Any) -> None:
        self.model = InteractionModel.random(config, **model)
        self.exact, self.padded = (self.model.new_state(SLOTS, **options) for _ in range(2))
        TickGraphs(self.model, self.padded, mode="eager")
        self.ticks = ticks
        for slot in range(SLOTS):
            self.open(slot)

    def open(self, slot: int) -> None:
        setting = self.ticks.setting()
        for state in (self.exact, self.padded):
            state.reset(slot)
            state.set_sampling(slot, **setting)

    def tick(self) -> TickOutput:
        """Sessions that are over are replaced."""
        tick = self.ticks.next()
        expected, actual = self.model.tick(self.exact, tick), self.model.tick(self.padded, tick)
        assert_same(actual, expected)
        for name, x in contents(self.exact).items():
            assert_bitwise(getattr(self.padded, name), x)
        for slot in tick.slot_S[actual.fault_S].tolist():
            self.open(slot)
        return actual


OTHER_ORDER = TurnLayout(blocks=("audio", "text", "video"), num_steps=2, mel_frames_per_step=2)


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (CONFIG, {}),
        (replace(CONFIG, layout=TurnLayout.preset("ms80")), {}),
        (replace(CONFIG, layout=OTHER_ORDER), {}),
        (CONFIG, {"experts": "int4", "rest": "fp8", "dtype": torch.bfloat16}),
    ],
    ids=["small", "ms80", "other-order", "packed"],
)
def test_a_bucket_changes_no_bit(config: ModelConfig, model: dict) -> None:
    """Of what is said and remembered, at each size of bucket."""
    twins = Twins(config, Ticks(config, seed=1), model)
    outs = [twins.tick() for _ in range(6)]
    assert len({out.bucket for out in outs}) > 2
    assert any(out.fault_S.any() for out in outs)
    twins.padded.cache.check_invariants()


def test_a_bucket_changes_no_bit_of_fp8_pages_that_roll() -> None:
    ticks = Ticks(CONFIG, seed=2, pairs=(0, 8, 16))
    twins = Twins(CONFIG, ticks, {}, budget=FEW, page_dtype=torch.float8_e4m3fn)
    outs = [twins.tick() for _ in range(12)]
    assert np.sum([out.kv_dropped for out in outs], axis=0)[3] > 2  # video
    twins.padded.cache.check_invariants()


def test_a_bucket_refuses_the_same_rows() -> None:
    """Where pages run out; the others of the tick say the same."""
    twins = Twins(CONFIG, Ticks(CONFIG, seed=3), {}, budget=FEW, global_pages=9)
    outs = [twins.tick() for _ in range(8)]
    assert any(out.refused and not out.fault_S.all() for out in outs)
    twins.padded.cache.check_invariants()


def test_buckets_may_be_any_that_hold_the_tick() -> None:
    model, ticks = InteractionModel.random(CONFIG), Ticks(CONFIG, seed=1)
    tick = ticks.next()
    needed = needed_for(CONFIG, tick)
    expected = model.tick(model.new_state(SLOTS), tick)
    for more in (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 40, 9):
        bucket = Bucket(*(a + b for a, b in zip(needed, more, strict=True)))
        if bucket.rows <= SLOTS:
            state = model.new_state(SLOTS)
            TickGraphs(model, state, buckets=[bucket], mode="eager")
            actual = model.tick(state, tick)
            assert_same(actual, expected)
            assert actual.bucket == bucket


HOST_OPS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "lift_fresh")
HOST_READS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


class Recorder(TorchDispatchMode):
    """Every op that is called outside of our own ops, with what it takes; refuses what asks the
    host, and what makes a tensor of the host's data. Our ops do so on a CPU alone."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        assert not name.startswith(HOST_OPS), f"{func} asks the host"
        if name.startswith("index"):
            indices = [x for arg in args[1:] for x in (arg if isinstance(arg, list) else [arg])]
            assert all(not isinstance(x, Tensor) or x.dtype != torch.bool for x in indices), func
        self.calls.append((str(func), _shapes(args), _shapes(kwargs)))
        self.inside = func.namespace == "tml_kernels"
        try:
            return func(*args, **kwargs)
        finally:
            self.inside = False


class NoHostReads(TorchFunctionMode):
    """For reads that no op is called for on a CPU."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert self._recorder.inside or name not in HOST_READS, f"{func} asks the host"
        return func(*args, **(kwargs or {}))


@contextmanager
def recording() -> Iterator[Recorder]:
    with Recorder() as recorder, NoHostReads(recorder):
        yield recorder


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(_shapes(x) for x in value)
    if isinstance(value, dict):
        return tuple((name, _shapes(x)) for name, x in value.items())
    return value


@pytest.mark.parametrize("patches", [0, 30])
def test_ops_and_shapes_follow_from_the_bucket_alone(patches: int) -> None:
    """What a graph needs: the device's half asks the host nothing and does not branch on what came,
    not even on nothing at all."""
    model = InteractionModel.random(CONFIG)
    state, bucket = model.new_state(SLOTS), Bucket(SLOTS, 90, patches)
    calls = []

    class Recording(TickGraphs):
        def run(self, bucket: Bucket):
            with recording() as recorder:
                ran = super().run(bucket)
            calls.append(recorder.calls)
            return ran

    graphs = Recording(model, state, buckets=[bucket], mode="eager")
    ticks = Ticks(CONFIG, seed=2)
    for slot in range(SLOTS):
        state.set_sampling(slot, **ticks.setting())
    while len(calls) < 4:
        tick = ticks.next()
        if patches == 0:
            tick = replace(tick, frames=())
        if needed_for(CONFIG, tick).rows and bucket.holds(needed_for(CONFIG, tick)):
            model.tick(state, tick)
    state.buffers.stage_nothing(bucket)
    graphs.run(bucket)
    assert len(calls[0]) > 100
    assert all(other == calls[0] for other in calls[1:])


def test_the_recorder_sees_what_asks_the_host() -> None:
    x, mask = torch.arange(3.0), torch.tensor([True, False, True])
    for ask in (
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: x[mask],
        lambda: mask.nonzero(),
        lambda: torch.tensor([1, 2]),
        lambda: bool(mask.any()),
        lambda: x.unique(),
    ):
        with pytest.raises(AssertionError), recording():
            ask()
    with recording() as recorder:
        x.index_select(0, torch.arange(2))
    assert len(recorder.calls) == 2


def test_a_tick_of_nobody_leaves_no_trace() -> None:
    """In any bucket: so graphs can be tried out beside sessions."""
    model, ticks = InteractionModel.random(CONFIG), Ticks(CONFIG, seed=3)
    state = model.new_state(SLOTS)
    graphs = TickGraphs(model, state, mode="eager")
    for _ in range(3):
        model.tick(state, ticks.next())
    before, lengths = contents(state), [state.length(slot) for slot in range(SLOTS)]
    pages = [x.clone() for g in state.groups for x in g.pages.contents().values()]
    for bucket in graphs.buckets[::5]:
        state.buffers.stage_nothing(bucket)
        graphs.run(bucket)
    for name, x in before.items():
        assert_bitwise(getattr(state, name), x)
    after = [x for g in state.groups for x in g.pages.contents().values()]
    for actual, expected in zip(after, pages, strict=True):
        assert_bitwise(actual, expected)
    assert lengths == [state.length(slot) for slot in range(SLOTS)]
    state.cache.check_invariants()


def test_shapes_that_were_not_captured_are_an_error_that_changes_nothing() -> None:
    model, ticks = InteractionModel.random(CONFIG), Ticks(CONFIG, seed=4)
    state = model.new_state(SLOTS)
    tick = replace(ticks.next(), slot_S=torch.tensor([0, 1], dtype=torch.int32))
    TickGraphs(model, state, buckets=[Bucket(1, 99, 9)], mode="eager")
    rows = {"pcm_S_W": tick.pcm_S_W[:1].expand(2, -1).contiguous(), "text": [(1,), (2,)]}
    tick = replace(tick, missing_S=torch.tensor([False, False]), frames=(), **rows)
    before = contents(state)
    with pytest.raises(NotCaptured, match=r"no bucket holds Bucket\(rows=2, tokens=12"):
        model.tick(state, tick)
    for name, x in before.items():
        assert_bitwise(getattr(state, name), x)
    assert [state.length(slot) for slot in (0, 1)] == [0, 0]
    state.cache.check_invariants()
    alone = replace(tick, slot_S=torch.tensor([0, -1], dtype=torch.int32))
    assert model.tick(state, alone).bucket == Bucket(1, 99, 9)


@pytest.mark.parametrize("idle", [0, 2])
def test_video_goes_first_where_there_is_no_bucket_for_all(idle: int) -> None:
    """From the rows with most of it, text and sound of all rows stay; idle rows before them are
    rows too."""
    model = InteractionModel.random(CONFIG)
    side, samples = CONFIG.patch.patch, CONFIG.layout.samples_per_tick
    frames = [np.zeros((pairs, 2, side, side, 3), np.uint8) for pairs in (1, 3, 2)]
    frames = [*[None] * idle, *frames]
    tick = TickInput(
        torch.tensor([*[-1] * idle, 0, 1, 2], dtype=torch.int32),
        torch.zeros(idle + 3, samples),
        torch.zeros(idle + 3, dtype=torch.bool),
        frames,
        [*[()] * idle, (1, 2), (), ()],
    )
    state = model.new_state(SLOTS)
    TickGraphs(model, state, buckets=[Bucket(4, 21, 4)], mode="eager")
    out = model.tick(state, tick)
    assert out.shed == {idle + 1: 6}
    assert [state.length(slot) for slot in range(3)] == [4 + 4 + 2 + 1, 4 + 4, 4 + 4 + 2]
    kept = [None if row == idle + 1 else x for row, x in enumerate(frames)]
    less = model.tick(model.new_state(SLOTS), replace(tick, frames=kept))
    assert_same(out, less)


def test_video_that_goes_is_not_always_that_of_the_same_rows() -> None:
    """Of three rows with the same and room for one, in three ticks each sees something once."""
    model = InteractionModel.random(CONFIG)
    side, samples = CONFIG.patch.patch, CONFIG.layout.samples_per_tick
    tick = TickInput(
        torch.arange(3, dtype=torch.int32),
        torch.zeros(3, samples),
        torch.zeros(3, dtype=torch.bool),
        [np.zeros((1, 2, side, side, 3), np.uint8)] * 3,
        [(), (), ()],
    )
    state = model.new_state(SLOTS)
    TickGraphs(model, state, buckets=[Bucket(4, 20, 1)], mode="eager")
    shed = [set(model.tick(state, tick).shed.items()) for _ in range(3)]
    assert shed == [{(0, 2), (1, 2)}, {(2, 2), (0, 2)}, {(1, 2), (2, 2)}]


def test_debug_mode_says_the_same_and_names_what_is_not_finite() -> None:
    model, ticks = InteractionModel.random(CONFIG), Ticks(CONFIG, seed=5)
    state = model.new_state(SLOTS)
    TickGraphs(model, state, mode="debug")
    tick = replace(
        ticks.next(), slot_S=torch.tensor([2, -1, 1], dtype=torch.int32),
        pcm_S_W=torch.zeros(3, CONFIG.layout.samples_per_tick),
        missing_S=torch.zeros(3, dtype=torch.bool), frames=(), text=(),
    )  # fmt: skip
    assert_same(model.tick(state, tick), model.tick(model.new_state(SLOTS), tick))
    state.attn_conv_L_N_3_D[:, 1] = float("nan")
    lengths = [state.length(slot) for slot in range(SLOTS)]
    with pytest.raises(FloatingPointError, match=r"prefill: row 1, of slot=1, is not finite"):
        model.tick(state, tick)
    assert lengths == [state.length(slot) for slot in range(SLOTS)]
    model.weights.flow.output_bias_B[3] = float("inf")
    fresh = model.new_state(SLOTS)
    TickGraphs(model, fresh, mode="debug")
    with pytest.raises(FloatingPointError, match=r"step 0: row 0, of slot=2"):
        model.tick(fresh, tick)


@pytest.mark.parametrize("layout", [TurnLayout(), TurnLayout.preset("ms80")])
@pytest.mark.parametrize("num_slots", [1, 2, 3, 8, 33, 64])
def test_buckets_cover_every_tick_without_video(num_slots: int, layout: TurnLayout) -> None:
    buckets = buckets_of(layout, num_slots)
    assert buckets == sorted(set(buckets)) and len(buckets) <= 9 * (num_slots.bit_length() + 1)
    most = layout.max_prefill_tokens - layout.max_video_tokens
    quiet = layout.audio_tokens + 1
    for rows in range(1, num_slots + 1):
        smallest = next(b for b in buckets if b.holds(Bucket(rows, rows * quiet, 0)))
        assert smallest.rows < 2 * rows and smallest.tokens == smallest.rows * quiet
        assert any(b.holds(Bucket(rows, rows * most, 0)) for b in buckets)
    assert any(
        b.holds(Bucket(1, layout.max_prefill_tokens, layout.max_video_tokens)) for b in buckets
    )
    for bucket in buckets:
        assert bucket.patches <= bucket.tokens - quiet * bucket.rows
