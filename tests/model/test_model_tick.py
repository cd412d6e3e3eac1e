"""Whole ticks: determinism, independence of sessions, faults, and what the state remembers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_model import small_config
from torch import Tensor

from tml_kernels.testing import assert_bitwise, assert_matches
from tml_runtime.model import (
    InteractionModel,
    ModelConfig,
    ModelState,
    TickInput,
    TickOutput,
    TurnLayout,
    output,
)
from tml_runtime.model.tick import embed_rows
from tml_runtime.model.weights import named_tensors

CONFIG = small_config()
STAGES = {"stage", "frontend", "prefill", "steps"}


class Client:
    """One session's input, tick by tick: sound always, the rest now and then."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config = config
        self.dice = torch.Generator().manual_seed(seed)

    def next(self) -> dict:
        side, samples = self.config.patch.patch, self.config.layout.samples_per_tick
        num_text, num_groups = (self._roll(4), self._roll(3))
        frames = torch.randint(
            0, 256, (num_groups, 2, side, 2 * side, 3), dtype=torch.uint8, generator=self.dice
        )
        return {
            "pcm": 0.1 * torch.randn(samples, generator=self.dice),
            "missing": self._roll(4) == 0,
            "frames": frames if num_groups else None,
            "text": [self._roll(90) for _ in range(num_text)],
        }

    def _roll(self, sides: int) -> int:
        return int(torch.randint(sides, (), generator=self.dice))


def make_tick(rows: dict[int, dict]) -> TickInput:
    """One row per slot, in the order given."""
    return TickInput(
        slot_S=torch.tensor(list(rows), dtype=torch.int32),
        pcm_S_W=torch.stack([row["pcm"] for row in rows.values()]),
        missing_S=torch.tensor([row["missing"] for row in rows.values()]),
        frames=[row["frames"] for row in rows.values()],
        text=[row["text"] for row in rows.values()],
    )


def new_state(model: InteractionModel, seeds: dict[int, int]) -> ModelState:
    state = model.new_state(6)
    for slot, seed in seeds.items():
        state.set_sampling(slot, temperature=0.9, top_k=40, top_p=0.95, seed=seed)
    return state


def run_alone(model: InteractionModel, seed: int, num_ticks: int) -> list[TickOutput]:
    state, client = new_state(model, {0: seed}), Client(model.config, seed)
    return [model.tick(state, make_tick({0: client.next()})) for _ in range(num_ticks)]


def assert_row(actual: TickOutput, row: int, expected: TickOutput, expected_row: int) -> None:
    assert_bitwise(actual.token_S_K[row], expected.token_S_K[expected_row])
    assert_bitwise(actual.mel_S_K_B[row], expected.mel_S_K_B[expected_row])
    assert actual.fault_S[row] == expected.fault_S[expected_row]


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        ModelConfig.preset("tiny"),
        replace(CONFIG, layout=TurnLayout.preset("ms80")),
        replace(CONFIG, layout=TurnLayout(num_steps=2, mel_frames_per_step=2)),
    ],
    ids=["small", "tiny", "ms80", "two-frames-a-step"],
)
def test_one_session_among_five_says_what_it_says_alone(config: ModelConfig) -> None:
    """Tokens and speech, bitwise, with neighbours of other ages that come and go."""
    model = InteractionModel.random(config)
    alone = run_alone(model, seed=7, num_ticks=4)
    slots = {3: 7, 0: 1, 1: 2, 2: 3, 5: 4}
    state = new_state(model, slots)
    clients = {slot: Client(config, seed) for slot, seed in slots.items()}
    for n in range(3):  # the neighbours are older
        model.tick(state, make_tick({slot: clients[slot].next() for slot in (0, 1, 2)[: n + 1]}))
    for n, expected in enumerate(alone):
        present = [slot for i, slot in enumerate((0, 5, 3, 1, 2)) if slot == 3 or (n + i) % 3]
        out = model.tick(state, make_tick({slot: clients[slot].next() for slot in present}))
        assert_row(out, present.index(3), expected, 0)
        assert not out.fault_S.any()


def test_same_seed_same_bytes_and_other_seed_others() -> None:
    model = InteractionModel.random(CONFIG)
    first, second, other = (run_alone(model, seed, 3) for seed in (5, 5, 6))
    for a, b in zip(first, second, strict=True):
        assert_row(a, 0, b, 0)
    assert any(not torch.equal(a.mel_S_K_B, b.mel_S_K_B) for a, b in zip(first, other, strict=True))
    again = InteractionModel.random(CONFIG, seed=0)
    assert_bitwise(again.weights.unembed_V_D, model.weights.unembed_V_D)
    assert not torch.equal(
        InteractionModel.random(CONFIG, seed=1).weights.unembed_V_D, again.weights.unembed_V_D
    )


def test_noise_goes_on_from_tick_to_tick() -> None:
    """Equal input, but no two frames of speech are equal: the draws are counted."""
    model = InteractionModel.random(CONFIG)
    state, row = new_state(model, {0: 1}), Client(CONFIG, 1).next()
    frames = torch.cat([model.tick(state, make_tick({0: row})).mel_S_K_B[0] for _ in range(3)])
    assert frames.unique(dim=0).shape[0] == 12
    assert state.draws_N.tolist() == [12, 0, 0, 0, 0, 0]


def test_every_draw_has_its_own_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and speech of step k of tick n draw as number n K + k of their session."""
    model = InteractionModel.random(CONFIG)
    state = new_state(model, {0: 11, 1: 12})
    draws: dict[str, list] = {"sample": [], "flow_head": []}
    for name, counts in draws.items():
        op = getattr(output, name)

        def spy(*args, op=op, counts=counts, **options):
            seed_S, counter_S = args[-2:]
            counts.append((seed_S.tolist(), counter_S.tolist()))
            return op(*args, **options)

        monkeypatch.setattr(output, name, spy)
    rows = {slot: Client(CONFIG, slot).next() for slot in range(2)}
    model.tick(state, make_tick({1: rows[1]}))
    model.tick(state, make_tick(rows))
    expected = [([12], [k]) for k in range(4)] + [([11, 12], [k, 4 + k]) for k in range(4)]
    assert draws == {"sample": expected, "flow_head": expected}


def test_tick_is_the_full_forward_of_its_tokens() -> None:
    """Greedy tokens of two ticks equal those of the second path over the same token sequence."""
    model = InteractionModel.random(CONFIG)
    state, client = model.new_state(1), Client(CONFIG, 3)
    state.set_sampling(0, temperature=0.0)
    said, sequence, at = [], [], []
    for _ in range(2):
        row = client.next()
        twin = model.new_state(1)
        for name, tensor in vars(state).items():
            if isinstance(tensor, Tensor):
                getattr(twin, name).copy_(tensor)
        x_T_D, _ = embed_rows(model.frontend, twin, make_tick({0: row}))
        out = model.tick(state, make_tick({0: row}))
        sequence.append(x_T_D)
        at.append(sum(len(x) for x in sequence) - 1)
        levels = levels_of(out.mel_S_K_B[0])
        for k in range(CONFIG.layout.num_steps - 1):
            token = int(out.token_S_K[0, k])
            step = model.frontend.embed_text(torch.tensor([token]))
            sequence.append(step + model.embed_levels(levels[k : k + 1]))
            at.append(at[-1] + 1)
        said += out.token_S_K[0].tolist()
        assert state.token_N[0] == out.token_S_K[0, -1]
        assert_bitwise(state.levels_N_F_B[0], levels[-1:])
    logits = model.forward(torch.cat(sequence))
    assert state.length(0) == len(logits)
    assert logits[at].argmax(-1).tolist() == said


def levels_of(mel_K_B: Tensor) -> Tensor:
    """The nearest of 16 levels from -7 to 2, in float64."""
    level = (mel_K_B.double() - -7.0) / 0.6
    return level.round().clamp(0, 15).to(torch.uint8)


def test_missing_is_heard_and_text_is_read() -> None:
    model = InteractionModel.random(CONFIG)
    row = Client(CONFIG, 2).next() | {"missing": False, "text": []}
    outs = {}
    for name, change in {"plain": {}, "missing": {"missing": True}, "text": {"text": [5]}}.items():
        state = new_state(model, {0: 1})
        outs[name] = model.tick(state, make_tick({0: row | change})).mel_S_K_B
        extra = 0 if name == "plain" else 1
        tokens = 4 + 2 * (0 if row["frames"] is None else len(row["frames"])) + 4
        assert state.length(0) == tokens + extra
    assert not torch.equal(outs["plain"], outs["missing"])
    assert not torch.equal(outs["text"], outs["missing"])


def test_idle_rows_say_nothing_and_rows_may_all_be_idle() -> None:
    model = InteractionModel.random(CONFIG)
    rows = [Client(CONFIG, seed).next() for seed in range(3)]
    tick = make_tick(dict(enumerate(rows)))
    idle = replace(tick, slot_S=torch.tensor([-1, 4, -1], dtype=torch.int32))
    state = new_state(model, {4: 1})
    out = model.tick(state, idle)
    expected = model.tick(new_state(model, {4: 1}), make_tick({4: rows[1]}))
    assert_row(out, 1, expected, 0)
    assert (out.token_S_K[[0, 2]] == -1).all() and (out.mel_S_K_B[[0, 2]] == -7.0).all()
    assert set(out.stage_ns) == STAGES and min(out.stage_ns.values()) > 0
    assert [slot for slot in range(6) if state.length(slot)] == [4]

    nobody = model.tick(state, replace(tick, slot_S=torch.full((3,), -1, dtype=torch.int32)))
    assert nobody.token_S_K.shape == (3, 4) and nobody.stage_ns == {"stage": 0}
    none = model.tick(state, TickInput(idle.slot_S[:0], idle.pcm_S_W[:0], idle.missing_S[:0]))
    assert none.mel_S_K_B.shape == (0, 4, 80)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_session_with_broken_sound_is_a_fault_and_harms_no_other(bad: float) -> None:
    model = InteractionModel.random(CONFIG)
    clients = {slot: Client(CONFIG, slot) for slot in range(3)}
    rows = {slot: client.next() for slot, client in clients.items()}
    broken = rows[1]["pcm"].clone()
    broken[1000] = bad
    seeds = {0: 1, 1: 2, 2: 3}
    state, well = new_state(model, seeds), new_state(model, seeds)
    out = model.tick(state, make_tick(rows | {1: rows[1] | {"pcm": broken}}))
    expected = model.tick(well, make_tick(rows))
    assert out.fault_S.tolist() == [False, True, False]
    assert out.mel_S_K_B.isfinite().all()
    for row in (0, 2):
        assert_row(out, row, expected, row)

    state.reset(1)
    state.set_sampling(1, temperature=0.9, top_k=40, top_p=0.95, seed=2)
    fresh = new_state(model, {1: 2})
    row = {1: rows[1]}
    assert_row(model.tick(state, make_tick(row)), 0, model.tick(fresh, make_tick(row)), 0)


def test_a_session_whose_numbers_broke_is_silent_and_harms_no_other() -> None:
    model = InteractionModel.random(CONFIG)
    rows = {slot: Client(CONFIG, slot).next() for slot in range(2)}
    state, well = new_state(model, {0: 1, 1: 2}), new_state(model, {0: 1, 1: 2})
    model.tick(state, make_tick(rows))
    model.tick(well, make_tick(rows))
    state.attn_conv_L_N_3_D[:, 0] = float("nan")
    out, expected = model.tick(state, make_tick(rows)), model.tick(well, make_tick(rows))
    assert out.fault_S.tolist() == [True, False]
    assert (out.token_S_K[0] == CONFIG.vocab.silence).all()
    assert (out.mel_S_K_B[0] == CONFIG.layout.dmel.level_min).all()
    assert_row(out, 1, expected, 1)


def test_speech_that_is_not_finite_is_a_fault() -> None:
    """Though every logit is fine."""
    model = InteractionModel.random(CONFIG)
    model.weights.flow.output_bias_B[3] = float("inf")
    out = model.tick(new_state(model, {0: 1}), make_tick({0: Client(CONFIG, 1).next()}))
    assert out.fault_S.all() and (out.mel_S_K_B == CONFIG.layout.dmel.level_min).all()
    assert (out.token_S_K != CONFIG.vocab.silence).any()


def test_guided_speech_differs_from_unguided() -> None:
    config = replace(CONFIG, flow=replace(CONFIG.flow, guidance=2.0))
    plain = run_alone(InteractionModel.random(CONFIG), 1, 1)[0]
    guided = run_alone(InteractionModel.random(config), 1, 1)[0]
    assert guided.mel_S_K_B.isfinite().all()
    assert not torch.allclose(plain.mel_S_K_B, guided.mel_S_K_B, atol=1e-2)


def test_min_p_of_one_is_greedy_and_of_one_session_alone() -> None:
    """It keeps what is as likely as the best: the best."""
    model = InteractionModel.random(CONFIG)
    tick = make_tick({slot: Client(CONFIG, 1).next() for slot in (0, 1, 2)})
    said = []
    for settings in ({"min_p": 1.0}, {"temperature": 0.0}):
        state = model.new_state(6)
        state.set_sampling(0, seed=1, **settings)
        for slot in (1, 2):
            state.set_sampling(slot, seed=slot)
        said.append(model.tick(state, tick).token_S_K)
    assert torch.equal(said[0], said[1])
    assert not torch.equal(said[0][0], said[0][1])  # the others draw


@pytest.mark.gpu
def test_gpu_tick_follows_the_cpu() -> None:
    """The same weights on both; a first greedy tick, before a different token can be drawn."""
    cpu = InteractionModel.random(CONFIG)
    gpu = InteractionModel.random(CONFIG, device="cuda")

    copies = zip(
        named_tensors(CONFIG, gpu.weights), named_tensors(CONFIG, cpu.weights), strict=True
    )
    for target, source in copies:
        target.view.copy_(source.view)
    # made anew, for it reads scales of the weights once
    gpu = InteractionModel(CONFIG, gpu.weights, gpu.report)
    tick = make_tick({0: Client(CONFIG, 1).next()})
    outs = [model.tick(new_state(model, {0: 1}), tick) for model in (cpu, gpu)]
    assert_matches(outs[1].mel_S_K_B[:, 0], outs[0].mel_S_K_B[:, 0], limit=1e-3)
