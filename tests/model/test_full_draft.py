"""Drafted output steps: transformers' multi-token-prediction layers, and the tick's own words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_layers
from inkling_oracle import random_inkling
from safetensors.torch import load_file, save_file
from small_model import small_config
from torch import Tensor

from tml_kernels.testing import assert_bitwise, assert_matches
from tml_runtime.model import InteractionModel, ModelConfig, TickInput
from tml_runtime.model.checkpoint import SINGLE
from tml_runtime.model.config import MTP_LAYERS
from tml_runtime.model.full import full_hidden, full_logits, full_mtp
from tml_runtime.model.full_draft import Spoken, full_steps
from tml_runtime.model.load import save_weights
from tml_runtime.model.output import Drawing
from tml_runtime.model.tick import embed_rows

DRAFTS = ("local", "global")
SMALL = small_config(mtp_layers=DRAFTS)
TINY = replace(ModelConfig.preset("tiny"), mtp_layers=DRAFTS)
K = SMALL.layout.num_steps
SPEECH = {"quiet": -100.0, "now and then": -9.5, "loud": 0.0}  # of the noise's scale, log10


def make_model(config: ModelConfig, speech: str) -> InteractionModel:
    """Its speech is noise around a level: below the quietest one, about there, or far above."""
    model = InteractionModel.random(config)
    model.weights.flow.output_B_W.zero_()
    model.weights.flow.output_bias_B.fill_(SPEECH[speech])
    return model


def heard(config: ModelConfig, seed: int) -> TickInput:
    dice = torch.Generator().manual_seed(seed)
    pcm = 0.1 * torch.randn(1, config.layout.samples_per_tick, generator=dice)
    return TickInput(torch.tensor([0], dtype=torch.int32), pcm, torch.tensor([seed % 2 == 0]))


class Session:
    """A tick of the model itself, and the same one by the reference, with and without drafts."""

    def __init__(self, model: InteractionModel, seed: int, **sampling: float) -> None:
        self.model, self.tick = model, heard(model.config, seed)
        self.state, other = model.new_state(1), model.new_state(1)
        for state in (self.state, other):
            state.set_sampling(0, seed=seed, **sampling)  # type: ignore
        self.drawing = Drawing.of(other, torch.tensor([0]))
        self.x_T_D, _ = embed_rows(model.frontend, other, self.tick)

    def spoken(self, num_drafts: int | None = None, dtype: torch.dtype = torch.float64) -> Spoken:
        model = self.model
        return full_steps(
            model.config,
            model.weights,
            self.x_T_D,
            self.drawing,
            num_drafts=num_drafts,
            dtype=dtype,
        )


def assert_same(ours: Spoken, theirs: Spoken) -> None:
    assert_bitwise(ours.token_K, theirs.token_K)
    assert_bitwise(ours.levels_K_F_B, theirs.levels_K_F_B)
    assert_matches(ours.mel_K_F_B, theirs.mel_K_F_B, limit=1e-6)


@pytest.mark.parametrize(
    ("config", "speech", "temperature"),
    [
        *[(SMALL, speech, temperature) for speech in SPEECH for temperature in (0.0, 3.0)],
        (TINY, "now and then", 3.0),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_what_is_said_is_the_same_with_any_number_of_drafts(
    config: ModelConfig, speech: str, temperature: float
) -> None:
    """Greedy too; the tick itself, which does not draft, says it as well."""
    model = make_model(config, speech)
    for seed in range(2):
        session = Session(model, seed, temperature=temperature, top_k=40, top_p=0.95)
        plain = session.spoken(0)
        assert plain.passes == K
        for num_drafts in (1, 2):
            drafted = session.spoken(num_drafts)
            assert_same(drafted, plain)
            assert 2 <= drafted.passes <= K
        said = model.tick(session.state, session.tick)
        assert_bitwise(said.token_S_K[0], plain.token_K)
        assert_matches(said.mel_S_K_B[0], plain.mel_K_F_B.flatten(0, 1), limit=1e-4)


def test_passes_are_saved_while_drafts_are_right() -> None:
    """At a high temperature draws follow the noise, which drafts share, whatever the layers say."""
    passes = {}
    for speech in SPEECH:
        model = make_model(SMALL, speech)
        sessions = [Session(model, seed, temperature=100.0) for seed in range(8)]
        passes[speech] = [session.spoken(dtype=torch.float32).passes for session in sessions]
    assert min(passes["quiet"]) == 2 and sum(passes["quiet"]) < 8 * 3
    assert passes["loud"] == [K] * 8  # speech that is heard is never what was drafted
    assert sum(passes["quiet"]) <= sum(passes["now and then"]) < sum(passes["loud"])


def test_layers_that_are_always_right_save_all_that_can_be_saved() -> None:
    """A model with one thing to say: after the tick's input, one pass for all remaining steps."""
    config = replace(SMALL, mtp_layers=MTP_LAYERS[:4])
    model = make_model(config, "quiet")
    model.weights.unembed_V_D.zero_()  # pyright: ignore
    session = Session(model, 1, temperature=0.0)
    for num_drafts, passes in {0: K, 1: 3, 2: 2, 3: 2, None: 2}.items():
        drafted = session.spoken(num_drafts)
        assert drafted.token_K.tolist() == [0] * K
        assert drafted.passes == passes


@pytest.mark.parametrize("num_drafts", [-1, 3])
def test_as_many_drafts_as_layers(num_drafts: int) -> None:
    session = Session(make_model(SMALL, "quiet"), 0)
    with pytest.raises(ValueError, match=rf"num_drafts={num_drafts} is not in 0\.\.2"):
        session.spoken(num_drafts)


def test_layers_are_those_of_transformers(tmp_path: Path) -> None:
    """Names, concatenation, chaining and head, read by its own loader from a file that we wrote."""
    if not hasattr(transformers.modeling_layers, "MtpModel"):
        pytest.skip("of transformers 5.24 on")
    from transformers.cache_utils import MtpCache

    config = small_config(mtp_layers=("local", "global", "global"), tau_floor=3)
    oracle = random_inkling(config)
    oracle.save_pretrained(tmp_path)
    ours = InteractionModel.random(config, seed=2)
    save_weights(tmp_path / "ours.safetensors", config, ours.weights)
    layers = {n: t for n, t in load_file(tmp_path / "ours.safetensors").items() if ".mtp." in n}
    (tmp_path / "ours.safetensors").unlink()
    save_file(load_file(tmp_path / SINGLE) | layers, tmp_path / SINGLE)
    text: Any = oracle.config.text_config
    text.num_mtp_layers, text.mtp_local_layer_ids = 3, [0]
    oracle.config.name_or_path, oracle.config.dtype = str(tmp_path), torch.float32
    theirs: Any = transformers.modeling_layers.MtpModel.from_pretrained(oracle).eval()
    theirs.set_attn_implementation("eager")

    model = InteractionModel.load(tmp_path, config=config)
    x_T_D = torch.randn(40, config.width)
    h_T_D = expected_T_D = full_hidden(config, model.weights, x_T_D[:30])
    for layer in range(3):
        next_T_D = x_T_D[layer + 1 : layer + 31]
        h_T_D = full_mtp(config, model.weights, layer, h_T_D, next_T_D)
        window = config.mtp_blocks.heads(layer).window or 30
        distance_T_T = torch.arange(30)[:, None] - torch.arange(30)
        hidden_T_T = (distance_T_T < 0) | (distance_T_T >= window)
        # Its own masks of local layers have no window (5.24).
        expected_T_D = theirs.layers[layer](
            next_T_D[None],
            expected_T_D[None],
            position_embeddings=None,
            attention_mask=torch.zeros(30, 30).masked_fill(hidden_T_T, -1e30)[None, None],
            position_ids=None,
            cache=MtpCache(config=theirs.config),  # from which it has its positions
        )[0]
        assert_matches(h_T_D, expected_T_D, limit=1e-4)
        num_valid = config.vocab.num_valid
        logits_T_V: Tensor = theirs._project_to_logits(expected_T_D)[:, :num_valid]
        found_T_V = full_logits(config, model.weights, h_T_D)[:, :num_valid]
        assert_matches(found_T_V, logits_T_V, limit=1e-4)
