"""Whole models of transformers with experts_implementation="tml"."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_models import SMALL, experts_modules
from transformers import MixtralForCausalLM
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tml_kernels.integrations.transformers import experts_forward, register
from tml_kernels.testing import assert_bitwise, assert_matches, relative_l2


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register()
    with torch.no_grad():
        yield


def logits(model, ids: torch.Tensor, name: str) -> torch.Tensor:
    model.set_experts_implementation(name)
    return model(ids, use_cache=False).logits


def test_register_twice_is_once() -> None:
    before = [list(map) for map in (ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS)]
    register()
    assert [list(map) for map in (ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS)] == before
    assert ALL_EXPERTS_FUNCTIONS["tml"] is ALL_FP8_EXPERTS_FUNCTIONS["tml"] is experts_forward


@pytest.mark.parametrize("name", SMALL)
def test_logits_are_the_eager_model_s(name: str) -> None:
    model = SMALL[name].make()
    modules = experts_modules(model)
    assert modules
    ids = torch.randint(0, 97, (2, 13))
    eager = logits(model, ids, "eager")
    assert_matches(logits(model, ids, "tml"), eager, limit=1e-5)
    assert all("_tml_prepared" in vars(module) for module in modules), "experts were not used"
    # The comparison sees the experts: without their result, the logits are others.
    for module in modules:
        module.down_proj.zero_()
        if getattr(module, "down_proj_bias", None) is not None:
            module.down_proj_bias.zero_()
    without = logits(model, ids, "tml")
    assert relative_l2(without, eager) > 1e-2
    assert_matches(without, logits(model, ids, "eager"), limit=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL)
def test_gpu_logits_are_the_eager_model_s(name: str) -> None:
    """Against eager in bfloat16. Each rounds at other places, some 20 roundings of 2^-9 deep; a
    router's near tie may then fall to another expert, so the bulk of the tokens is compared: in the
    median a token's logits are within 2e-2, five roundings' worth."""
    model = SMALL[name].make("cuda").to(torch.bfloat16)
    ids = torch.randint(0, 97, (2, 64), device="cuda")
    eager, ours = (logits(model, ids, kind).double() for kind in ("eager", "tml"))
    assert ours.isfinite().all()
    error = (ours - eager).norm(dim=-1) / eager.norm(dim=-1)
    assert error.median() <= 2e-2


def test_from_pretrained(tmp_path: Path) -> None:
    model = SMALL["mixtral"].make()
    ids = torch.randint(0, 97, (1, 7))
    model.save_pretrained(tmp_path)
    loaded = MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation="tml").eval()
    assert loaded.config._experts_implementation == "tml"
    ours = loaded(ids).logits
    assert "_tml_prepared" in vars(experts_modules(loaded)[0])
    assert_matches(ours, model(ids).logits, limit=1e-5)


def test_generation_is_the_eager_model_s() -> None:
    """Prefill and steps of one token, with transformers' cache."""
    model = SMALL["gpt_oss"].make()
    ids = torch.randint(0, 97, (2, 5))
    tokens = []
    for name in ("eager", "tml"):
        model.set_experts_implementation(name)
        tokens.append(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0))
    assert tokens[0].shape == (2, 13)
    assert_bitwise(tokens[1], tokens[0])
