"""`bench quant`: its arithmetic on known matrices and logits, and what it says it measures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import quant, quant_errors
from bench.__main__ import main
from bench.quant_errors import (
    SEARCH,
    STATISTICS,
    Plan,
    draw,
    kl_divergence,
    make_model,
    matrices,
    matrix_errors,
    model_errors,
    packed_weights,
    run,
    token_error,
    top1_agreement,
)
from tml_kernels.moe import MoEWeights
from tml_kernels.quant import PackedExperts, dequantize
from tml_runtime.model import ModelConfig
from tml_runtime.model.weights import MoeWeights, named_tensors

TINY = ModelConfig.preset("tiny")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_kl_of_known_logits() -> None:
    reference = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    found = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.5, 0.0]]).log() + 3.0  # unnormalised
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_divergence(found, reference) == pytest.approx((first + math.log(2)) / 2)
    assert kl_divergence(reference, reference) == 0.0
    assert kl_divergence(reference, found) != pytest.approx(kl_divergence(found, reference))


def test_top1_of_known_logits() -> None:
    reference = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, -math.inf], [0.0, 5.0]])
    assert top1_agreement(reference.flip(1), reference) == 0.0
    assert top1_agreement(reference[[0, 0, 2, 3]], reference) == 0.75


def test_every_token_counts_the_same_in_the_error_of_a_layer() -> None:
    reference = torch.tensor([[1000.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    found = torch.tensor([[1100.0, 0.0], [0.5, 1.0], [0.0, 0.0]])
    assert token_error(found, reference) == pytest.approx((0.1 + 0.5 + 0.0) / 3)
    assert token_error(reference, reference) == 0.0


@pytest.mark.parametrize("statistic", STATISTICS)
def test_draws_have_mean_square_one_and_repeat(statistic: str) -> None:
    x = draw(statistic, (2, 300, 500), generator())
    assert x.square().mean().item() == pytest.approx(1.0, rel=0.05)
    assert torch.equal(x, draw(statistic, (2, 300, 500), generator()))
    assert not torch.equal(x, draw(statistic, (2, 300, 500), generator(1)))


def test_draws_are_what_they_are_called() -> None:
    gaussian, heavy, outliers = (draw(name, (4, 100, 1000), generator()) for name in STATISTICS)
    assert gaussian.abs().max() < 6 < 12 < heavy.abs().max()
    column = outliers.square().mean((0, 1)).sqrt()  # the same ones in every matrix
    largest, others = column.topk(10).values, column.sort().values[:-10]
    assert largest.mean() / others.mean() == pytest.approx(20, rel=0.05)
    assert largest.min() > 10 * others.max()
    with pytest.raises(ValueError, match="statistic: 'uniform' is not one of gaussian, heavy"):
        draw("uniform", (1, 1), generator())


def test_error_of_a_matrix_that_a_format_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiples of a power of two in -8..7 lose nothing in int4; half steps lose what is known."""
    x = torch.ones(3, 128)
    w = torch.arange(-8.0, 8.0).repeat(2, 8)
    half = torch.where(w == 1, 1.5, w)  # to even: 2

    def errors(weight: torch.Tensor) -> dict[str, Any]:
        drawn = {"gaussian": weight, "outliers": x}
        monkeypatch.setattr(quant_errors, "draw", lambda statistic, *_: drawn[statistic])
        return matrix_errors("int4", "gaussian", (2, 128), num_tokens=3, seed=0)

    assert (errors(w)["weights"], errors(w)["product"]) == (0.0, 0.0)
    found = errors(half)
    assert found["weights"] == pytest.approx(0.5 * 16**0.5 / half.norm().item())
    assert found["product"] == pytest.approx(0.5 * 8 / abs(half[0].sum().item()))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_search_loses_less(statistic: str) -> None:
    plain, searched = (
        matrix_errors(name, statistic, (64, 512), num_tokens=8, seed=3)["weights"]
        for name in ("int4", "int4" + SEARCH)
    )
    assert searched < plain


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_plan_rounds_the_matrices_and_nothing_else(statistic: str) -> None:
    """Routers and norms among what stays: the same tensors, not copies."""
    model = make_model(TINY, statistic, 0)
    drawn = {matrix.untyped_storage().data_ptr() for matrix in matrices(model.weights)}
    packed = packed_weights(model.weights, Plan("int4" + SEARCH, "fp8"))
    kept = {t.untyped_storage().data_ptr() for t in _plain_tensors(packed)}
    every = {named.view.untyped_storage().data_ptr(): named.name
             for named in named_tensors(TINY, model.weights)}  # fmt: skip
    assert drawn and not drawn & kept
    assert drawn | kept == set(every)
    rounded = {every[pointer] for pointer in drawn}
    assert not any("norm" in name or "gate" in name for name in rounded)


def _plain_tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, PackedExperts | MoEWeights):
        return []
    parts = tree if isinstance(tree, tuple) else vars(tree).values()
    return [tensor for part in parts for tensor in _plain_tensors(part)]


def test_the_run_is_the_models_forward() -> None:
    model = make_model(TINY, "heavy", 0)
    x_T_D = model.embed_text(range(20))
    trace = run(TINY, model.weights, x_T_D)
    assert torch.equal(trace.logits_T_V, model.forward(x_T_D))
    assert len(trace.stream) == TINY.num_layers
    assert [chosen.sum(1).unique().tolist() for chosen in trace.chosen] == [[2]] * 3
    plan = Plan("mxfp4", "fp8")
    packed = run(TINY, packed_weights(model.weights, plan), x_T_D)
    expected = model.packed(experts="mxfp4", rest="fp8").forward(x_T_D)
    assert torch.equal(packed.logits_T_V, expected)
    nothing = model_errors(trace, trace)
    assert nothing == {"layers": [0.0] * 4, "same_experts": [1.0] * 3, "kl": 0.0, "top1": 1.0}
    found = model_errors(packed, trace)
    assert all(0 < error < 1 for error in found["layers"]) and found["kl"] > 0


def test_a_searched_plan_packs_only_the_experts() -> None:
    model = make_model(TINY, "gaussian", 0)
    weights = packed_weights(model.weights, Plan("int4" + SEARCH, None))
    for layer, w in enumerate(weights.layers):
        attention = model.weights.layers[layer].attention
        assert (
            w.attention.qkvr_J_D is attention.qkvr_J_D and w.attention.out_D_I is attention.out_D_I
        )
        if isinstance(w.mlp, MoeWeights):
            plain = model.weights.layers[layer].mlp
            assert isinstance(plain, MoeWeights) and w.mlp.gate_A_D is plain.gate_A_D
            assert w.mlp.experts.w13.format.name == "int4"
            alone = quant_errors.pack(plain.experts.w13.data[3], "int4" + SEARCH)
            assert torch.equal(dequantize(w.mlp.experts.w13, 3), dequantize(alone, 0))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("quant")
    assert main(["quant", "--quick", "--out", str(folder)]) == 0
    return json.loads((folder / "quant.json").read_text())


def test_the_result_has_every_packing(result: dict[str, Any]) -> None:
    assert (result["schema"], result["kind"], result["seed"]) == (1, "quant", 0)
    precisions = {"fp8", "fp8_channel", "int4", "int4_f16", "mxfp4", "nvfp4", "int4+search"}
    found = {(row["precision"], row["statistic"]) for row in result["matrices"]}
    assert found == {(p, s) for p in precisions for s in STATISTICS}
    for row in result["matrices"]:
        assert 0 < row["weights"] < 0.5 and 0 < row["product"] < 1
    plans = {(row["experts"], row["rest"]) for row in result["models"]}
    assert plans >= {(p, None) for p in precisions}
    assert plans >= {(None, p) for p in ("fp8", "fp8_channel", "int4", "int4_f16")}
    assert plans >= {(p, "fp8") for p in ("int4", "int4+search", "mxfp4")}
    assert len(result["models"]) == len(plans) * len(STATISTICS)
    for row in result["models"]:
        assert len(row["layers"]) == result["model"]["layers"]
        assert row["kl"] > 0 and 0 <= row["top1"] <= 1
        # Layer 0 is dense: experts change nothing in it.
        assert (row["layers"][0] == 0) == (row["rest"] is None)
    assert "Routers and norms are never quantised" in result["notes"][0]


def test_tables(result: dict[str, Any]) -> None:
    text = quant.show(result)
    for words in (*STATISTICS, "int4+search / fp8", "- / fp8_channel", *result["notes"]):
        assert words in text


def test_a_second_run_is_the_same(
    result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["quant", "--quick", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["matrices"], again["models"]) == (result["matrices"], result["models"])
