from __future__ import annotations

import pytest
import torch

from tml_kernels.ops.expert_mlp import expert_mlp
from tml_kernels.ops.expert_mlp.cases import BENCH, EDGE, MODEL, Case
from tml_kernels.ops.expert_mlp.reference import expert_mlp_ref
from tml_kernels.testing import assert_bitwise, assert_matches, randn


def check(case: Case, device: str) -> None:
    inputs = case.make_inputs(device)
    assert_matches(expert_mlp(**inputs), expert_mlp_ref(**inputs), dtype=case.dtype)


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_public(case: Case) -> None:
    check(case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_gpu(case: Case) -> None:
    check(case, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    check(Case(11, 64, 48, 4, 2, num_shared=1, dtype=dtype), "cpu")


def test_reference_agrees_with_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers.models.inkling.configuration_inkling import InklingTextConfig
    from transformers.models.inkling.modeling_inkling import InklingExperts, InklingSharedExperts

    inputs = Case(13, 32, 24, 6, 3, num_shared=2, dtype=torch.float64).make_inputs("cpu")
    config = InklingTextConfig(
        hidden_size=32, moe_intermediate_size=24, n_routed_experts=6, n_shared_experts=2
    )
    routed, shared = InklingExperts(config).double(), InklingSharedExperts(config).double()
    w13, shared_w13 = inputs["w13_E_J_D"], inputs["shared_w13_Z_J_D"]
    x, weight = inputs["x_T_D"], inputs["weight_T_K"].double()
    with torch.no_grad():
        routed.gate_up_proj.copy_(torch.cat([w13[:, 0::2], w13[:, 1::2]], dim=1))
        routed.down_proj.copy_(inputs["w2_E_D_F"])
        shared.gate_proj.copy_(shared_w13[:, 0::2])
        shared.up_proj.copy_(shared_w13[:, 1::2])
        shared.down_proj.copy_(inputs["shared_w2_Z_D_F"])
        expected = routed(x, inputs["expert_T_K"].long(), weight)
        gammas = inputs["shared_weight_T_Z"].double()
        expected = expected + shared(x, gammas=gammas)
    # Their shared experts add up in float32.
    torch.testing.assert_close(expert_mlp_ref(**inputs), expected, rtol=1e-5, atol=1e-6)


def test_row_does_not_depend_on_neighbours() -> None:
    inputs = Case(29, 128, 96, 5, 2, num_shared=2).make_inputs("cpu")
    together = expert_mlp(**inputs)
    per_token = ("x_T_D", "expert_T_K", "weight_T_K", "shared_weight_T_Z")
    alone = [
        expert_mlp(**inputs | {name: inputs[name][t : t + 1].clone() for name in per_token})
        for t in range(29)
    ]
    assert_bitwise(together, torch.cat(alone))


def test_slot_order_is_the_order_of_the_sum() -> None:
    """Three experts that give 1, 1e8 and -1e8: only the order of the slots decides the sum."""
    w13 = torch.tensor([[[1.0], [1.0]]]).repeat(3, 1, 1)
    w2 = torch.tensor([1.0, 1e8, -1e8]).view(3, 1, 1)
    weight = torch.full((2, 3), 1.0 / torch.nn.functional.silu(torch.ones(1)).item())
    ids = torch.tensor([[0, 1, 2], [1, 2, 0]], dtype=torch.int32)
    out = expert_mlp(torch.ones(2, 1), w13, w2, ids, weight)
    assert out[0].item() == 0.0
    assert out[1].item() == pytest.approx(1.0)


def test_same_expert_twice_counts_twice() -> None:
    inputs = Case(3, 32, 16, 4, 2).make_inputs("cpu")
    inputs["expert_T_K"][:] = 2
    assert_matches(expert_mlp(**inputs), expert_mlp_ref(**inputs))
    once = inputs | {
        "expert_T_K": inputs["expert_T_K"][:, :1].clone(),
        "weight_T_K": inputs["weight_T_K"].sum(1, keepdim=True),
    }
    assert_matches(expert_mlp(**inputs), expert_mlp_ref(**once))


def test_untouched_experts_and_skipped_weights_may_hold_nan() -> None:
    inputs = Case(6, 32, 16, 4, 3, num_shared=1, skew="skip").make_inputs("cpu")
    ids = inputs["expert_T_K"]
    ids[ids == 3] = 1  # nobody goes to expert 3
    expected = expert_mlp(**inputs)
    inputs["w13_E_J_D"][3] = float("nan")
    inputs["w2_E_D_F"][3] = float("nan")
    inputs["weight_T_K"][(ids < 0) | (ids >= 4)] = float("nan")
    assert ((ids < 0) | (ids >= 4)).sum() >= 6
    assert_bitwise(expert_mlp(**inputs), expected)


def test_token_with_every_id_skipped_is_zero() -> None:
    inputs = Case(3, 32, 16, 4, 2).make_inputs("cpu")
    inputs["expert_T_K"][1] = -1
    out = expert_mlp(**inputs)
    assert (out[1] == 0).all()
    assert (out[[0, 2]] != 0).any(dim=1).all()


def test_nan_token_stays_in_its_row() -> None:
    inputs = Case(12, 32, 16, 2, 2, num_shared=1).make_inputs("cpu")
    expected = expert_mlp(**inputs)
    inputs["x_T_D"][7] = float("nan")
    out = expert_mlp(**inputs)
    others = [t for t in range(12) if t != 7]
    assert out[7].isnan().all()
    assert_bitwise(out[others], expected[others])


def test_cost_counts_each_touched_expert_once() -> None:
    one_token = BENCH[0]
    assert one_token.cost().flops == 2 * 6 * 3 * 4096 * 2048
    assert one_token.cost().bytes == 6 * 3 * 4096 * 2048 * 2 + 2 * 4096 * 2 + 6 * 8
    assert Case(19, 32, 16, 4, 2, skew="one").cost().bytes < Case(19, 32, 16, 4, 2).cost().bytes


@pytest.mark.parametrize("num_shared", [0, 2])
def test_opcheck(num_shared: int) -> None:
    inputs = Case(3, 16, 8, 4, 2, num_shared=num_shared).make_inputs("cpu")
    args = (*inputs.values(), torch.empty(3, 16))
    torch.library.opcheck(torch.ops.tml_kernels.expert_mlp.default, args)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x_T_D": torch.zeros(3, 9)}, ValueError, "w13_E_J_D: D=8, but D=9"),
        ({"x_T_D": torch.zeros(3, 8, dtype=torch.int8)}, TypeError, "x_T_D.*int8"),
        ({"w13_E_J_D": torch.zeros(4, 10, 8)}, ValueError, "w13_E_J_D.*12.*J=10"),
        ({"w13_E_J_D": torch.zeros(4, 12, 8).half()}, TypeError, "w13_E_J_D.*float16"),
        ({"w2_E_D_F": torch.zeros(5, 8, 6)}, ValueError, "w2_E_D_F: E=5, but E=4"),
        ({"w2_E_D_F": torch.zeros(4, 6, 8).transpose(1, 2)}, ValueError, "w2_E_D_F: must be cont"),
        ({"expert_T_K": torch.zeros(3, 2).long()}, TypeError, "expert_T_K.*int64"),
        ({"expert_T_K": torch.zeros(3, 0).int()}, ValueError, "expert_T_K.*at least 1, got 0"),
        ({"weight_T_K": torch.zeros(3, 3)}, ValueError, "weight_T_K: K=3, but K=2"),
        ({"weight_T_K": torch.zeros(3, 2).half()}, TypeError, "weight_T_K.*float16"),
        ({"shared_weight_T_Z": torch.zeros(3, 1)}, ValueError, "shared_w13_Z_J_D: missing"),
        (
            {
                "shared_w13_Z_J_D": torch.zeros(2, 12, 8),
                "shared_w2_Z_D_F": torch.zeros(2, 8, 6),
                "shared_weight_T_Z": torch.zeros(3, 1),
            },
            ValueError,
            "shared_weight_T_Z: Z=1, but Z=2",
        ),
        ({"out_T_D": torch.zeros(3, 8).bfloat16()}, TypeError, "out_T_D.*bfloat16"),
        ({"x_T_D": torch.zeros(3, 8, requires_grad=True)}, RuntimeError, "no backward"),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    inputs = {
        "x_T_D": torch.zeros(3, 8),
        "w13_E_J_D": torch.zeros(4, 12, 8),
        "w2_E_D_F": torch.zeros(4, 8, 6),
        "expert_T_K": torch.zeros(3, 2, dtype=torch.int32),
        "weight_T_K": torch.zeros(3, 2),
    } | change
    with pytest.raises(error, match=words):
        expert_mlp(**inputs)


def test_writes_into_out() -> None:
    inputs = Case(3, 32, 16, 4, 2).make_inputs("cpu")
    out = randn(3, 32)
    result = expert_mlp(**inputs, out_T_D=out)
    assert result is out
    assert_bitwise(out, expert_mlp(**inputs))
