"""The streaming path against the full forward, itself in another batch, and its own bookkeeping."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from small_model import small_config
from torch import Tensor

from tml_kernels.kv_cache import BudgetExceeded, OutOfPages, PageClass, SessionFileError
from tml_kernels.testing import assert_bitwise, assert_matches
from tml_runtime.model import InteractionModel, KvBudget, ModelConfig, ModelState
from tml_runtime.model.config import HeadSpec

CONFIG = small_config()
# 70 crosses a page, and its extent ends inside the window.
WIDE = small_config(
    local_heads=HeadSpec(num_heads=4, num_kv_heads=2, head_width=16, extent=30, window=70),
    global_heads=HeadSpec(num_heads=2, num_kv_heads=1, head_width=32, extent=90),
)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def append(model: InteractionModel, state: ModelState, blocks: dict[int, Tensor]) -> list[Tensor]:
    """Hidden states of one block per slot, all in one call."""
    start = torch.tensor([0, *(len(x) for x in blocks.values())]).cumsum(0).to(torch.int32)
    h_T_D = model.append(state, torch.cat(list(blocks.values())), start, int32(*blocks))
    return list(h_T_D.split([len(x) for x in blocks.values()]))


def lengths(state: ModelState) -> list[int]:
    return [state.length(slot) for slot in range(state.num_slots)]


def random_blocks(x_T_D: Tensor, dice: random.Random, longest: int) -> list[Tensor]:
    sizes: list[int] = []
    while sum(sizes) < len(x_T_D):
        sizes.append(min(dice.randint(1, longest), len(x_T_D) - sum(sizes)))
    return list(x_T_D.split(sizes))


def assert_logits(model: InteractionModel, h_T_D: Tensor, expected_T_V: Tensor) -> None:
    num_valid = model.config.vocab.num_valid
    assert_matches(model.logits(h_T_D)[:, :num_valid], expected_T_V[:, :num_valid], limit=1e-4)


@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["window8", "window70"])
@pytest.mark.parametrize(("seed", "longest"), [(1, 1), (2, 7), (3, 40), (4, 130)])
def test_any_split_equals_the_full_forward(config: ModelConfig, seed: int, longest: int) -> None:
    """Through several turns of the local ring; blocks longer than one pass are cut."""
    dice = random.Random(seed)
    model = InteractionModel.random(config)
    x_T_D = torch.randn(90 if longest == 1 else 400, config.width)
    state = model.new_state(2, max_append=50)
    blocks = [append(model, state, {1: x})[0] for x in random_blocks(x_T_D, dice, longest)]
    assert_logits(model, torch.cat(blocks), model.forward(x_T_D))
    assert lengths(state) == [0, len(x_T_D)]


def kept(state: ModelState, slot: int) -> list[int]:
    """Positions that the slot's global layers hold."""
    (g,) = (g for g, group in enumerate(state.groups) if group.window is None)
    pages = state.cache.positions(state.session(slot), g)
    return sorted(position for page in pages for position in page)


SMALL = KvBudget(anchor=1, text=1, audio=64, video=1, reply=1)


@pytest.mark.parametrize("longest", [5, 60])
def test_global_layers_drop_what_the_cache_drops(longest: int) -> None:
    """Blocks of every class in turn, far more than the budgets hold: the streamed numbers are those
    of a full forward in which each query sees what was kept before it came."""
    model, dice = InteractionModel.random(CONFIG), random.Random(longest)
    x_T_D = torch.randn(700, CONFIG.width)
    state = model.new_state(1, budget=SMALL, max_append=60)
    dropped_T_T = torch.ones(700, 700, dtype=torch.bool)
    said, done = [], 0
    for n, block in enumerate(random_blocks(x_T_D, dice, longest)):
        rows = slice(done, done + len(block))
        dropped_T_T[rows, kept(state, 0)] = False
        dropped_T_T[rows, rows] = False
        page_class = [PageClass.VIDEO, PageClass.AUDIO, PageClass.TEXT, PageClass.REPLY][n % 4]
        start = int32(0, len(block))
        said.append(model.append(state, block, start, int32(0), page_class))
        done = rows.stop
    state.cache.check_invariants()
    assert dropped_T_T[-1].sum() > 200
    assert_logits(model, torch.cat(said), model.forward(x_T_D, dropped_T_T=dropped_T_T))
    valid = CONFIG.vocab.num_valid
    unlimited = model.forward(x_T_D)[-1, :valid]
    assert not torch.allclose(model.logits(said[-1])[-1, :valid], unlimited, atol=1e-3)


def test_anchors_stay() -> None:
    model = InteractionModel.random(CONFIG)
    state = model.new_state(1, budget=SMALL, max_append=60)
    x_T_D = torch.randn(900, CONFIG.width)
    model.append(state, x_T_D[:40], int32(0, 40), int32(0), PageClass.ANCHOR)
    append(model, state, {0: x_T_D[40:]})
    assert kept(state, 0)[:40] == list(range(40))
    assert kept(state, 0)[40] > 700
    before = lengths(state)
    with pytest.raises(BudgetExceeded, match="anchor pages: needed=3 limit=2"):
        model.append(state, x_T_D[:100], int32(0, 100), int32(0), PageClass.ANCHOR)
    assert lengths(state) == [before[0] + 60]  # the pass before


def test_rewind_and_fork_cover_the_taps() -> None:
    """After a rewind, and in a fork, the next tokens are as if nothing else had been heard."""
    model = InteractionModel.random(WIDE)
    x_T_D = torch.randn(200, WIDE.width)
    expected = model.forward(torch.cat([x_T_D[:90], x_T_D[150:]]))[90:]
    state = model.new_state(3, max_append=64)
    append(model, state, {0: x_T_D[:50]})
    append(model, state, {0: x_T_D[50:90]})
    state.fork(0, 2)
    append(model, state, {0: x_T_D[90:150]})
    state.cache.rewind(state.session(0), 90)
    for slot in (0, 2):
        assert_logits(model, append(model, state, {slot: x_T_D[150:]})[0], expected)


def test_a_saved_session_goes_on_elsewhere_bitwise(tmp_path: Path) -> None:
    model = InteractionModel.random(CONFIG)
    x_T_D = torch.randn(160, CONFIG.width)
    state, other = model.new_state(2, max_append=64), model.new_state(1, max_append=64)
    append(model, state, {1: x_T_D[:100]})
    state.cache.save(state.session(1), tmp_path / "session.tml")
    other.load(0, tmp_path / "session.tml")
    state.cache.suspend(state.session(1))  # and comes back with its next tokens
    expected = append(model, state, {1: x_T_D[100:]})[0]
    assert_bitwise(append(model, other, {0: x_T_D[100:]})[0], expected)


def test_a_saved_session_goes_on_within_the_budget_of_where_it_is(tmp_path: Path) -> None:
    """One that was saved with more would soon have more pages than there are columns for it."""
    model = InteractionModel.random(CONFIG)
    state, small = (
        model.new_state(1, max_append=64),
        model.new_state(1, budget=SMALL, max_append=64),
    )
    for page_class in (PageClass.TEXT, PageClass.AUDIO, PageClass.REPLY) * 2:
        model.append(state, torch.randn(200, CONFIG.width), int32(0, 200), int32(0), page_class)
    state.cache.save(state.session(0), tmp_path / "session.tml")
    small.load(0, tmp_path / "session.tml")
    assert lengths(small) == [1200]
    for page_class in (PageClass.TEXT, PageClass.AUDIO, PageClass.REPLY) * 4:
        model.append(small, torch.randn(130, CONFIG.width), int32(0, 130), int32(0), page_class)
    small.cache.check_invariants()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("token_N", 10**6, "token=1000000 is not in 0"),
        ("token_N", -1, "token=-1 is not in 0"),
        ("levels_N_F_B", 255, "a level is not below"),
        ("temperature_N", float("nan"), "temperature=nan"),
        ("top_p_N", -0.5, "top_p=-0.5"),
    ],
)
def test_a_file_with_what_no_session_has_is_refused(
    name: str, value: float, words: str, tmp_path: Path
) -> None:
    """One bad token would be an error of every tick, and so of every session."""
    model = InteractionModel.random(CONFIG)
    state, path = model.new_state(2, max_append=64), tmp_path / "session.tml"
    append(model, state, {0: torch.randn(20, CONFIG.width)})
    state.cache.slot_rows(0)[name].fill_(value)
    state.cache.save(state.session(0), path)
    with pytest.raises(SessionFileError, match=words):
        state.load(1, path)
    assert lengths(state) == [20, 0]
    state.cache.check_invariants()
    append(model, state, {1: torch.randn(3, CONFIG.width)})


def test_who_had_begun_a_tick_that_raises_is_at_rest_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = InteractionModel.random(CONFIG)
    state = model.new_state(3, max_append=64)
    sizes = np.ones((3, 1), np.int64)

    def refuse(*args: object) -> int:
        raise MemoryError

    state.put_away(1)
    with monkeypatch.context() as patch:
        patch.setattr(ModelState, "bring_back", refuse)
        with pytest.raises(MemoryError):
            state.reserve_all([0, 1, 2], [PageClass.TEXT], sizes)
    assert state.reserve_all([0, 1, 2], [PageClass.TEXT], sizes) == {}
    state.roll_back([0, 1, 2])
    state.cache.check_invariants()


def test_without_room_the_idle_go_to_host_memory_or_nothing_changes() -> None:
    model = InteractionModel.random(CONFIG)
    x_T_D = torch.randn(160, CONFIG.width)
    state = model.new_state(2, budget=SMALL, max_append=60, global_pages=5)  # one is the zero page
    alone = model.new_state(1, budget=SMALL, max_append=60)
    (first,), (wanted,) = (append(model, each, {0: x_T_D[:100]}) for each in (state, alone))
    assert_bitwise(first, wanted)
    for page_class in (PageClass.REPLY, PageClass.AUDIO, PageClass.VIDEO):
        model.append(state, x_T_D[:60], int32(0, 60), int32(1), page_class)
    assert state.cache.is_suspended(state.session(0))
    before = lengths(state)
    with pytest.raises(OutOfPages, match="needed=2 free=0"):
        append(model, state, {1: x_T_D[100:], 0: x_T_D[100:]})
    assert lengths(state) == before == [100, 180]
    state.cache.check_invariants()
    state.reset(1)
    (again,), (wanted,) = (append(model, each, {0: x_T_D[100:]}) for each in (state, alone))
    assert_bitwise(again, wanted)


@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["window8", "window70"])
def test_alone_and_among_others_bitwise(config: ModelConfig) -> None:
    """Sessions of ages 0 to over 300 in one call, in any row and slot, as each is alone."""
    dice = random.Random(5)
    model = InteractionModel.random(config)
    blocks = {
        slot: random_blocks(torch.randn(300 + 7 * slot, config.width), dice, 60)
        for slot in range(4)
    }
    alone = {}
    for slot, session in blocks.items():
        state = model.new_state(1, max_append=64)
        alone[slot] = torch.cat([append(model, state, {0: x})[0] for x in session])

    state = model.new_state(6, max_append=64)
    place = {0: 4, 1: 1, 2: 5, 3: 0}
    waiting = {slot: list(session) for slot, session in blocks.items()}
    together: dict[int, list[Tensor]] = {slot: [] for slot in blocks}
    while any(waiting.values()):
        ready = [slot for slot, session in waiting.items() if session and dice.random() < 0.7]
        dice.shuffle(ready)
        if ready:
            said = append(model, state, {place[slot]: waiting[slot].pop(0) for slot in ready})
            for slot, h_T_D in zip(ready, said, strict=True):
                together[slot].append(h_T_D)
    for slot in blocks:
        assert_bitwise(torch.cat(together[slot]), alone[slot])


def test_idle_rows_and_padding_are_zero_and_change_nothing() -> None:
    model = InteractionModel.random(CONFIG)
    x_T_D = torch.randn(12, CONFIG.width)
    state, other = model.new_state(3), model.new_state(3)
    append(model, state, {0: x_T_D[:5]})
    append(model, other, {0: x_T_D[:5]})
    expected = append(model, other, {0: x_T_D[5:8]})[0]

    mixed = torch.full((11, CONFIG.width), float("nan"))
    mixed[4:7] = x_T_D[5:8]
    h_T_D = model.append(state, mixed, int32(0, 4, 4, 7), int32(-1, 2, 0))
    assert_bitwise(h_T_D[4:7], expected)
    assert (h_T_D[:4] == 0).all() and (h_T_D[7:] == 0).all()
    assert_same_state(state, other)


def test_nothing_to_append() -> None:
    model = InteractionModel.random(CONFIG)
    state = model.new_state(2)
    none = torch.empty(0, CONFIG.width)
    assert model.append(state, none, int32(0), int32()).shape == (0, CONFIG.width)
    assert model.append(state, none, int32(0, 0), int32(1)).shape == (0, CONFIG.width)
    assert model.append(state, torch.ones(3, CONFIG.width), int32(0), int32()).eq(0).all()
    assert lengths(state) == [0, 0]


def test_bfloat16_follows_float32() -> None:
    """Rounded weights, state and activations stay within the drift of two layers' roundings."""
    model = InteractionModel.random(CONFIG, dtype=torch.bfloat16)
    x_T_D = torch.randn(60, CONFIG.width).bfloat16()
    state = model.new_state(1)
    assert state.cache.groups[0].k_pages_L_P_G_R_C.dtype == torch.bfloat16
    logits = model.logits(append(model, state, {0: x_T_D})[0])[:, : CONFIG.vocab.num_valid]
    expected = model.forward(x_T_D)[:, : CONFIG.vocab.num_valid]
    assert_matches(logits, expected, limit=5e-2)


@pytest.mark.gpu
def test_gpu_follows_the_cpu() -> None:
    cpu = InteractionModel.random(CONFIG)
    gpu_weights = InteractionModel.random(CONFIG, device="cuda")
    x_T_D = torch.randn(200, CONFIG.width)
    state = gpu_weights.new_state(2, max_append=64)
    start = int32(0, 200).cuda()
    h_T_D = gpu_weights.append(state, x_T_D.cuda(), start, int32(1).cuda())
    assert_logits(gpu_weights, h_T_D, gpu_weights.forward(x_T_D.cuda()))
    assert cpu.config == gpu_weights.config


def assert_same_state(actual: ModelState, expected: ModelState) -> None:
    for name, tensor in state_tensors(actual).items():
        assert_bitwise(tensor, state_tensors(expected)[name])


def state_tensors(state: ModelState) -> dict[str, Tensor]:
    tensors = {name: value for name, value in vars(state).items() if isinstance(value, Tensor)}
    for g, group in enumerate(state.groups):
        tensors[f"{g}.conv"] = group.conv_L_N_2_3_W
        owned = vars(group.pages).items()
        tensors |= {f"{g}.{name}": x for name, x in owned if isinstance(x, Tensor)}
    return tensors


def poison(state: ModelState, slot: int) -> None:
    """NaN wherever the slot's session may leave a float."""
    for g, group in enumerate(state.groups):
        held = [ref.page for ref in state.cache.pages(state.session(slot), g)]
        group.pages.k_pages_L_P_G_R_C[:, held] = float("nan")
        group.pages.v_pages_L_P_G_R_C[:, held] = float("nan")
        group.conv_L_N_2_3_W[:, slot] = float("nan")
    state.attn_conv_L_N_3_D[:, slot] = float("nan")
    state.mlp_conv_L_N_3_D[:, slot] = float("nan")
    state.tail_N_W[slot] = float("nan")


def test_reset_slot_is_as_new_and_others_stay() -> None:
    model = InteractionModel.random(CONFIG)
    x_T_D = torch.randn(150, CONFIG.width)
    state = model.new_state(2, max_append=40)
    append(model, state, {0: x_T_D[:90], 1: x_T_D[:70]})
    state.set_sampling(0, temperature=0.3, top_k=5, top_p=0.5, seed=9)
    state.draws_N[0], state.token_N[0], state.levels_N_F_B[0] = 7, 3, 11
    poison(state, 0)
    state.reset(0)

    fresh = model.new_state(2, max_append=40)
    append(model, fresh, {1: x_T_D[:70]})
    said = append(model, state, {0: x_T_D[:100], 1: x_T_D[70:150]})
    expected = append(model, fresh, {0: x_T_D[:100], 1: x_T_D[70:150]})
    for actual, wanted in zip(said, expected, strict=True):
        assert_bitwise(actual, wanted)
    by_slot = [name for name in state_tensors(state) if name[-2:] != "_C" and "_P_" not in name]
    assert "1.conv" in by_slot and "tail_N_W" in by_slot
    for name in by_slot:
        if "_N_M" not in name:  # lists of other page ids
            assert_bitwise(state_tensors(state)[name], state_tensors(fresh)[name])


def test_a_poisoned_session_harms_no_other() -> None:
    model = InteractionModel.random(CONFIG)
    x_T_D = torch.randn(60, CONFIG.width)
    state, clean = model.new_state(2), model.new_state(2)
    for each in (state, clean):
        append(model, each, {0: x_T_D[:20], 1: x_T_D[20:40]})
    poison(state, 0)
    sick, well = append(model, state, {0: x_T_D[:20], 1: x_T_D[40:]})
    assert sick.isnan().all()
    assert_bitwise(well, append(model, clean, {0: x_T_D[:20], 1: x_T_D[40:]})[1])


def test_state_never_grows_or_moves() -> None:
    model = InteractionModel.random(CONFIG)
    state = model.new_state(2, budget=SMALL, max_append=16)
    before = {name: (t.data_ptr(), t.shape) for name, t in state_tensors(state).items()}
    for _ in range(20):
        append(model, state, {1: torch.randn(30, CONFIG.width)})
    after = {name: (t.data_ptr(), t.shape) for name, t in state_tensors(state).items()}
    assert before == after


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(5, 63)}, ValueError, "D=63"),
        ({"x": torch.zeros(5, 64).double()}, TypeError, "float64"),
        ({"start": int32(0, 3)}, ValueError, "start_S1"),
        ({"start": int32(1, 3, 5)}, ValueError, r"start_S1: \[1, 3, 5\]"),
        ({"start": int32(0, 4, 3)}, ValueError, r"\[0, 4, 3\]"),
        ({"start": int32(0, 3, 6)}, ValueError, "T=5"),
        ({"start": torch.tensor([0, 3, 5])}, TypeError, "int64"),
        ({"slot": int32(0, 2)}, ValueError, "slot_S: 2 is not"),
        ({"slot": int32(-2, 1)}, ValueError, "slot_S: -2"),
        ({"slot": int32(1, 1)}, ValueError, "slot 1 is given twice"),
        ({"slot": torch.tensor([0.0, 1.0])}, TypeError, "float32"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_append_changes_nothing(change: dict, error: type, words: str) -> None:
    model = InteractionModel.random(CONFIG)
    state, untouched = model.new_state(2), model.new_state(2)
    call = {"x": torch.zeros(5, 64), "start": int32(0, 3, 5), "slot": int32(0, 1)} | change
    with pytest.raises(error, match=words):
        model.append(state, call["x"], call["start"], call["slot"])
    assert_same_state(state, untouched)


def test_a_state_of_another_model_is_refused() -> None:
    model, other = InteractionModel.random(CONFIG), InteractionModel.random(WIDE)
    with pytest.raises(ValueError, match="state: made for"):
        append(model, other.new_state(1), {0: torch.zeros(2, CONFIG.width)})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.new_state(0), "num_slots=0"),
        (lambda model: KvBudget(video=0), "video=0"),
        (lambda model: KvBudget(rewind=1.5), "rewind=1.5"),
        (lambda model: model.new_state(2).fork(0, 0), "to_slot=0"),
        (lambda model: model.new_state(1, max_append=-1), "max_append=-1"),
        (lambda model: model.new_state(1).reset(1), "slot=1"),
        (lambda model: model.new_state(1).reset(-1), "slot=-1"),
        (lambda model: model.new_state(1).set_sampling(0, temperature=-0.1), "temperature=-0.1"),
        (lambda model: model.new_state(1).set_sampling(0, temperature=float("nan")), "nan"),
        (lambda model: model.new_state(1).set_sampling(0, top_k=-1), "top_k=-1"),
        (lambda model: model.new_state(1).set_sampling(0, top_p=0.0), "top_p=0.0"),
        (lambda model: model.new_state(1).set_sampling(0, top_p=1.5), "top_p=1.5"),
        (lambda model: model.new_state(1).set_sampling(0, min_p=-0.1), "min_p=-0.1"),
        (lambda model: model.new_state(1).set_sampling(0, min_p=float("nan")), "min_p=nan"),
        (lambda model: model.new_state(1).set_sampling(0, seed=2**63), "seed="),
        (lambda model: model.new_state(1).set_sampling(3, seed=1), "slot=3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_state_arguments(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(InteractionModel.random(CONFIG))
