from __future__ import annotations

import pytest
import torch

from tml_kernels.ops.route import Routing, route
from tml_kernels.ops.route.cases import EDGE, MODEL, Case
from tml_kernels.ops.route.reference import route_ref
from tml_kernels.testing import assert_bitwise, assert_matches, randn


def check(case: Case, device: str) -> None:
    inputs = case.make_inputs(device)
    result, expected = route(**inputs), route_ref(**inputs)
    assert_bitwise(result.expert_T_K, expected.expert_T_K)
    assert_matches(result.weight_T_K, expected.weight_T_K)
    assert_matches(result.shared_weight_T_Z, expected.shared_weight_T_Z)
    total = torch.cat([result.weight_T_K, result.shared_weight_T_Z], dim=1).sum(1)
    torch.testing.assert_close(total, torch.full_like(total, 8.0 * 1.25))


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_public(case: Case) -> None:
    check(case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_gpu(case: Case) -> None:
    check(case, "cuda")


def test_bfloat16_rows_are_routed_in_float32() -> None:
    check(Case(17, 96, 16, 4, 2, dtype=torch.bfloat16), "cpu")


def test_reference_agrees_with_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers.models.inkling.configuration_inkling import InklingTextConfig
    from transformers.models.inkling.modeling_inkling import InklingTopkRouter

    config = InklingTextConfig(
        hidden_size=48, n_routed_experts=12, n_shared_experts=2, num_experts_per_tok=3
    )
    router = InklingTopkRouter(config).double()
    with torch.no_grad():
        router.weight.copy_(randn(14, 48, scale=0.2))
        router.global_scale.fill_(0.7)
        router.e_score_correction_bias.copy_(randn(12, scale=0.3))
        x = randn(31, 48).double()
        _, weight, index, shared = router(x)
        result = route_ref(
            x,
            router.weight,
            router.e_score_correction_bias,
            router.global_scale,
            top_k=3,
            num_shared=2,
            scale=config.route_scale,
        )
    # transformers leaves the order of the chosen experts open: compare by ascending id.
    theirs, ours = index.sort(dim=1), result.expert_T_K.long().sort(dim=1)
    assert_bitwise(ours.values, theirs.values)
    torch.testing.assert_close(
        result.weight_T_K.gather(1, ours.indices), weight.gather(1, theirs.indices)
    )
    torch.testing.assert_close(result.shared_weight_T_Z, shared)


def test_ties_go_to_the_lowest_id_and_bias_chooses_without_weighing() -> None:
    x, weight = torch.ones(1, 4), torch.zeros(7, 4)
    bias = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0, 0.5])
    result = route(x, weight, bias, torch.ones(1), top_k=4, num_shared=1, scale=5.0)
    assert result.expert_T_K.tolist() == [[1, 3, 5, 0]]
    torch.testing.assert_close(result.weight_T_K, torch.ones(1, 4))
    torch.testing.assert_close(result.shared_weight_T_Z, torch.ones(1, 1))


def test_order_is_by_descending_score() -> None:
    weight = torch.diag(torch.tensor([1.0, 4.0, 2.0, 3.0]))
    result = route(
        torch.ones(1, 4), weight, torch.zeros(4), torch.ones(1), top_k=3, num_shared=0, scale=1.0
    )
    assert result.expert_T_K.tolist() == [[1, 3, 2]]
    assert result.weight_T_K.diff().lt(0).all()


def test_row_does_not_depend_on_neighbours() -> None:
    inputs = Case(29, 128, 8, 2, 2).make_inputs("cpu")
    together = route(**inputs)
    alone = [route(**inputs | {"x_T_D": inputs["x_T_D"][t : t + 1].clone()}) for t in range(29)]
    for field, whole in together._asdict().items():
        assert_bitwise(whole, torch.cat([getattr(one, field) for one in alone]))


def test_nan_row_gets_valid_ids_and_stays_in_its_row() -> None:
    inputs = Case(6, 32, 8, 2, 2).make_inputs("cpu")
    expected = route(**inputs)
    inputs["x_T_D"][3] = float("nan")
    result = route(**inputs)
    assert result.weight_T_K[3].isnan().all()
    assert ((result.expert_T_K >= 0) & (result.expert_T_K < 8)).all()
    others = [0, 1, 2, 4, 5]
    for field in Routing._fields:
        assert_bitwise(getattr(result, field)[others], getattr(expected, field)[others])


def test_extreme_logits_stay_finite() -> None:
    weight = torch.diag(torch.tensor([1e4, -1e4, 30.0, 0.0]))
    result = route(
        torch.ones(2, 4), weight, torch.zeros(3), torch.ones(1), top_k=3, num_shared=1, scale=8.0
    )
    assert result.expert_T_K.tolist() == [[0, 2, 1]] * 2
    assert result.weight_T_K.isfinite().all()
    assert (result.weight_T_K[:, 2] == 0).all()


def test_writes_into_out() -> None:
    inputs = Case(3, 32, 8, 2, 2).make_inputs("cpu")
    expected = route(**inputs)
    out = Routing(torch.empty(3, 2, dtype=torch.int32), torch.empty(3, 2), torch.empty(3, 2))
    result = route(**inputs, out=out)
    for field in Routing._fields:
        assert getattr(result, field) is getattr(out, field)
        assert_bitwise(getattr(out, field), getattr(expected, field))


@pytest.mark.parametrize("num_shared", [0, 2])
def test_opcheck(num_shared: int) -> None:
    args = (
        randn(3, 16),
        randn(6 + num_shared, 16),
        randn(6),
        torch.ones(1),
        8.0,
        torch.empty(3, 2, dtype=torch.int32),
        torch.empty(3, 2),
        torch.empty(3, num_shared),
    )
    torch.library.opcheck(torch.ops.tml_kernels.route.default, args)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x_T_D": [[1.0]]}, TypeError, "x_T_D.*list"),
        ({"x_T_D": torch.zeros(3, 9)}, ValueError, "weight_A_D: D=8, but D=9"),
        ({"weight_A_D": torch.zeros(9, 8)}, ValueError, r"weight_A_D.*6 \+ 2 rows, got 9"),
        ({"weight_A_D": torch.zeros(8, 8).half()}, TypeError, "weight_A_D.*float16"),
        ({"bias_E": torch.zeros(6).bfloat16()}, TypeError, "bias_E.*bfloat16"),
        ({"global_scale_1": torch.ones(2)}, ValueError, "global_scale_1"),
        ({"top_k": 7}, ValueError, "top_k: expected 1..6, got 7"),
        ({"top_k": 0}, ValueError, "top_k: expected 1..6, got 0"),
        ({"num_shared": -1}, ValueError, "num_shared.*-1"),
        (
            {"out": Routing(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2))},
            TypeError,
            "expert_T_K: expected torch.int32",
        ),
        (
            {
                "out": Routing(
                    torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 3), torch.zeros(3, 2)
                )
            },
            ValueError,
            "weight_T_K: K=3, but K=2",
        ),
        ({"x_T_D": torch.zeros(3, 8, requires_grad=True)}, RuntimeError, "no backward"),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    inputs = {
        "x_T_D": torch.zeros(3, 8),
        "weight_A_D": torch.zeros(8, 8),
        "bias_E": torch.zeros(6),
        "global_scale_1": torch.ones(1),
        "top_k": 2,
        "num_shared": 2,
        "scale": 8.0,
    } | change
    with pytest.raises(error, match=words):
        route(**inputs)
