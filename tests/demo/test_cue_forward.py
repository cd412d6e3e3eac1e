"""What is trained is the model that runs: the differentiable forward against the other paths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cue_media import made_footage, made_speech
from torch import Tensor

from tml_kernels._philox import FLOW_STREAM, normal
from tml_kernels.ops.flow_head.reference import flow_head_ref
from tml_kernels.ops.patch_embed.reference import patch_embed_ref
from tml_kernels.testing import assert_matches
from tml_runtime.demo.cue import forward
from tml_runtime.demo.cue.batch import make_batch
from tml_runtime.demo.cue.evaluate import tick_input
from tml_runtime.demo.cue.optimiser import leaves
from tml_runtime.demo.cue.stage import Episode
from tml_runtime.demo.cue.tasks import make_episode
from tml_runtime.demo.cue.words import CONFIG, ID
from tml_runtime.model import InteractionModel
from tml_runtime.model.config import Vocabulary
from tml_runtime.model.full import full_forward
from tml_runtime.model.tick import embed_rows


@pytest.fixture(scope="module")
def model() -> InteractionModel:
    return InteractionModel.random(CONFIG, seed=3)


def episodes(*names: str) -> list[Episode]:
    media = made_speech(), made_footage()
    return [make_episode(name, 24 + 4 * n, n, *media, lose=0.2) for n, name in enumerate(names)]


@pytest.mark.parametrize("num_tokens", [1, 100, 1100])
def test_it_is_the_full_forward_of_each_episode(model: InteractionModel, num_tokens: int) -> None:
    """Shorter than an extent, and longer than both; with keys that global layers have dropped."""
    x_N_T_D = torch.randn(2, num_tokens, CONFIG.width)
    dropped = torch.zeros(2, num_tokens, num_tokens, dtype=torch.bool)
    dropped[1, 50:, 5:20] = True
    loads: list[Tensor] = []
    h_N_T_D = forward.hidden_states(CONFIG, model.weights, x_N_T_D, dropped, loads)
    for n in range(2):
        wanted = full_forward(CONFIG, model.weights, x_N_T_D[n], dropped_T_T=dropped[n])
        logits = forward.logits(CONFIG, model.weights, h_N_T_D[n])
        assert_matches(logits, wanted[:, : CONFIG.vocab.num_valid], limit=1e-5)
    assert [int(load.sum()) for load in loads] == [2 * num_tokens * CONFIG.experts.top_k] * 3


def test_padding_behind_an_episode_changes_nothing_in_it(model: InteractionModel) -> None:
    x_T_D = torch.randn(1, 60, CONFIG.width)
    padded = torch.cat([x_T_D, torch.zeros(1, 40, CONFIG.width)], dim=1)
    alone, long = (forward.hidden_states(CONFIG, model.weights, x) for x in (x_T_D, padded))
    assert_matches(long[:, :60], alone, limit=1e-5)


def test_pictures_and_the_speech_head_are_those_of_the_ops(model: InteractionModel) -> None:
    w = model.weights
    frames = torch.randint(0, 256, (3, 2, 40, 80, 3), dtype=torch.uint8)
    wanted = patch_embed_ref(frames, w.patch, spec=CONFIG.patch)
    assert_matches(forward.embed_patches(CONFIG, w.patch, frames), wanted, limit=1e-5)
    cond_S_D, seed_S, steps = torch.randn(3, CONFIG.width), torch.arange(3), CONFIG.flow.num_steps
    wanted = flow_head_ref(cond_S_D, w.flow, seed_S, seed_S, num_steps=steps)
    x_S_B = normal(seed_S, seed_S, wanted.shape[1], FLOW_STREAM, torch.float32)
    for n in range(steps):
        n_S = torch.full((3,), n)
        x_S_B = x_S_B + forward.velocity(w.flow, cond_S_D, x_S_B, n_S, steps) / steps
    assert_matches(x_S_B, wanted, limit=1e-5)


def test_a_batch_has_the_tokens_that_ticks_have(model: InteractionModel) -> None:
    """Of two episodes of different length, with lost ticks; up to each tick's first step, since
    what a model says next is its own."""
    made = episodes("count_flash", "wait_tone")
    x_N_T_D = make_batch(made, np.random.default_rng(0)).embed(model.weights)
    for n, episode in enumerate(made):
        assert episode.missing_T.any() and not episode.seen_T.all()
        state, at = model.new_state(1), 0
        for tick in range(len(episode)):
            state.token_N[0], state.levels_N_F_B[0] = CONFIG.vocab.silence, 0
            if tick > 0 and episode.said_T[tick - 1]:
                break  # from here on the speech of a word is fed back
            x_T_D, _ = embed_rows(model.frontend, state, tick_input([episode], tick))
            assert_matches(x_N_T_D[n, at : at + len(x_T_D)], x_T_D, limit=1e-5)
            at += len(x_T_D) + CONFIG.layout.num_steps - 1
        assert tick > 3


def test_nothing_in_a_batch_gives_a_hint_of_what_is_to_be_said(model: InteractionModel) -> None:
    """A word changes tokens behind its first step only."""
    (episode,) = episodes("cue")
    batch = make_batch([episode], np.random.default_rng(0))
    tick = int(np.flatnonzero(episode.said_T)[0])
    other = make_batch(
        [Episode(**{**vars(episode), "said_T": np.zeros_like(episode.said_T)})],
        np.random.default_rng(0),
    )
    differs_T = (batch.embed(model.weights) != other.embed(model.weights))[0].any(1)
    assert int(differs_T.nonzero()[0]) == int(batch.step_at_M[4 * tick]) + 1


def test_slips_change_what_is_fed_back_and_nothing_that_is_due() -> None:
    waits, counts = episodes("wait_tone", "count_tone")
    made = [waits, counts]
    right = make_batch(made, np.random.default_rng(0))
    wrong = make_batch(made, np.random.default_rng(0), slips=(1.0, 0.2))
    assert (right.target_M == wrong.target_M).all() and (right.mel_M_B == wrong.mel_M_B).all()
    now, fed_M = ID["now"], right.token_M.roll(-1)  # at the step that says it
    said_M = wrong.token_M.roll(-1)
    assert (fed_M == now).any()
    assert (said_M[fed_M == now] == 0).all()  # forgotten, each of them
    numbers = (fed_M >= ID["one"]) & (fed_M <= ID["twelve"])
    assert numbers.any() and (said_M[numbers] == fed_M[numbers]).all()
    added_M = (fed_M == 0) & (said_M != 0)
    assert set(said_M[added_M].tolist()) == {now, ID["yes"]}
    assert (added_M.nonzero() % CONFIG.layout.num_steps == 0).all()  # where words begin
    silent = wrong.spoken_M_B.roll(-1, 0)[fed_M == now]
    assert (silent == right.spoken_M_B[0]).all()


def test_every_weight_is_moved_by_some_episode(model: InteractionModel) -> None:
    from tml_runtime.demo.cue.lessons import Lesson
    from tml_runtime.demo.cue.loss import batch_loss
    from tml_runtime.demo.cue.trainer import new_weights

    weights, made = new_weights(1), episodes("speak", "ask", "count_motion")
    for _, tensor in leaves(weights):
        tensor.requires_grad_()
    rng = np.random.default_rng(0)
    total, _ = batch_loss(weights, make_batch(made, rng), made, rng, Lesson(0.0, choice=9.0))
    total.backward()
    untouched = {
        name
        for name, tensor in leaves(weights)
        if tensor.grad is None or not tensor.grad.isfinite().all() or not tensor.grad.any()
    }
    # guidance is off; an expert's bias is set by its load
    assert {name for name in untouched if not name.endswith("bias_E")} == {"flow.null_W"}


def test_specials_of_the_preset_are_words() -> None:
    assert CONFIG.vocab == Vocabulary(64, 41, silence=0, missing=1, delegate=2, yield_turn=3)
    assert (
        sum(tensor.numel() for _, tensor in leaves(InteractionModel.random(CONFIG).weights)) < 3e6
    )
