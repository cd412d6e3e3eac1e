from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tml_kernels._routing import choose_blocking
from tml_kernels.moe import (
    MoEWeights,
    Routing,
    explain,
    fused_moe,
    moe_layer,
    moe_route,
    prepare_moe_weights,
    warmup,
    workspace_bytes,
)
from tml_kernels.ops.expert_mlp.cases import Case
from tml_kernels.testing import assert_bitwise, assert_matches, randn

ROUTE = {"scoring": "sink_sigmoid", "top_k": 2, "scale": 8.0}


def test_layer_is_the_router_and_the_experts() -> None:
    """The whole block in float64, written out."""
    case = Case(11, 48, 24, 6, 2, num_shared=2)
    inputs = case.make_inputs("cpu")
    x, weights = inputs["x"], inputs["weights"]
    gate, bias = randn(8, 48, scale=0.2), randn(6, scale=0.3)
    out = moe_layer(x, gate, weights, bias_E=bias, **ROUTE)

    logit = x.double() @ gate.double().T
    chosen = (logit[:, :6].sigmoid() + bias).topk(2).indices
    both = torch.cat([logit.gather(1, chosen), logit[:, 6:]], 1)
    weight = F.logsigmoid(both).softmax(1) * 8.0
    expected = torch.zeros(11, 48, dtype=torch.float64)
    for t in range(11):
        for k in range(4):
            side, e = (weights, int(chosen[t, k])) if k < 2 else (weights.shared, k - 2)
            w13, w2 = (w.double() for w in side.dequantize(e))
            h = w13 @ x[t].double()
            expected[t] += weight[t, k] * (w2 @ (F.silu(h[0::2]) * h[1::2]))
    assert_matches(out, expected)


def test_layer_allocates_nothing_of_its_own_when_given_buffers() -> None:
    inputs = Case(5, 32, 16, 6, 2, num_shared=1).make_inputs("cpu")
    x, weights, gate = inputs["x"], inputs["weights"], randn(7, 32)
    routing = Routing.empty(5, 2, 1, 6, "cpu")
    size = workspace_bytes(weights, 5, 2, torch.float32)
    buffers = {"out": torch.empty(5, 32), "workspace": torch.empty(size, dtype=torch.uint8)}
    out = moe_layer(x, gate, weights, routing=routing, **buffers, **ROUTE)
    assert out is buffers["out"]
    assert_bitwise(out, moe_layer(x, gate, weights, **ROUTE))
    again = moe_route(x, gate, num_shared=1, **ROUTE)
    assert_bitwise(routing.expert_T_K, again.expert_T_K)


@pytest.mark.parametrize("quantize_x", [False, True])
def test_late_norm_is_the_norm(quantize_x: bool) -> None:
    """Of residual * weight and the residual, the layer makes what it makes of the normed rows."""
    precision = "fp8" if quantize_x else None
    weights = Case(11, 128, 40, 6, 2, num_shared=1, precision=precision).make_weights("cpu")
    gate, residual_T_D = randn(7, 128), 5.0 * randn(11, 128)
    late, rest = residual_T_D * (1.0 + 0.1 * randn(128)), {"quantize_x": quantize_x, **ROUTE}
    out = moe_layer(late, gate, weights, residual_T_D=residual_T_D, eps=1e-5, **rest)
    normed = late / (residual_T_D.square().mean(1, keepdim=True) + 1e-5).sqrt()
    # With quantised activations a rounding may fall to the other side.
    expected = moe_layer(normed, gate, weights, **rest)
    assert_matches(out, expected, limit=2e-2 if quantize_x else 1e-5)
    routing = Routing.empty(11, 2, 1, 6, "cpu", late_norm=True)
    given = moe_layer(
        late, gate, weights, residual_T_D=residual_T_D, eps=1e-5, routing=routing, **rest
    )
    assert_bitwise(given, out)


def test_layer_row_does_not_depend_on_neighbours() -> None:
    inputs = Case(19, 64, 32, 6, 2, num_shared=1).make_inputs("cpu")
    x, weights, gate = inputs["x"], inputs["weights"], randn(7, 64)
    together = moe_layer(x, gate, weights, **ROUTE)
    alone = [moe_layer(x[t : t + 1].clone(), gate, weights, **ROUTE) for t in range(19)]
    assert_bitwise(together, torch.cat(alone))
    order = torch.randperm(19)
    assert_bitwise(moe_layer(x[order], gate, weights, **ROUTE), together[order])


def test_warmup_runs_every_kernel_once() -> None:
    weights = Case(1, 32, 16, 6, 2, num_shared=1).make_weights("cpu")
    gate = randn(7, 32)
    tokens = warmup(gate, weights, max_tokens=200, dtype=torch.float32, **ROUTE)
    # Token-centric to 4; the router's tiles change at 9 and 65; blocks hold twice the mean load of
    # T * 2 / 6 tokens.
    assert tokens == [1, 5, 9, 25, 49, 65]
    with pytest.raises(ValueError, match="max_tokens: expected at least 1, got 0"):
        warmup(gate, weights, max_tokens=0, **ROUTE)
    with pytest.raises(TypeError, match="top_k: expected an integer, got None"):
        warmup(gate, weights, max_tokens=2, scoring="softmax")
    with pytest.raises(TypeError, match="max_tokens: expected an integer, got '2'"):
        warmup(gate, weights, max_tokens="2", **ROUTE)  # type: ignore


def test_warmup_takes_of_a_residual_as_many_rows_as_it_runs() -> None:
    weights = Case(1, 32, 16, 6, 2, num_shared=1).make_weights("cpu")
    late = {"residual_T_D": randn(8, 32), "dtype": torch.float32, **ROUTE}
    assert warmup(randn(7, 32), weights, max_tokens=8, **late) == [1, 5]


@pytest.mark.gpu
def test_gpu_warmup_leaves_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.compiler.compiler as compiler

    case = Case(1, 512, 256, 16, 4, 2, dtype=torch.bfloat16, precision="int4")
    weights = case.make_weights("cuda")
    gate = randn(18, 512, device="cuda", dtype=torch.bfloat16)
    route = {"scoring": "sink_sigmoid", "top_k": 4}
    warmup(gate, weights, max_tokens=300, **route)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("compiled after warm-up")

    monkeypatch.setattr(compiler, "compile", refuse)
    monkeypatch.setattr("triton.runtime.jit.JITFunction._do_compile", refuse)
    for num_tokens in (1, 2, 3, 7, 16, 17, 31, 64, 100, 256, 300):
        x = randn(num_tokens, 512, device="cuda", dtype=torch.bfloat16)
        moe_layer(x, gate, weights, **route)


def test_explain_counts_what_must_move() -> None:
    weights = Case(1, 256, 128, 16, 4, num_shared=2).make_weights("cpu")
    one = explain(weights, num_tokens=1, top_k=4, dtype=torch.float32, bandwidth=4e12)
    expert = 3 * 256 * 128 * 4
    assert one.mode == "token-centric"
    assert one.touched_experts == pytest.approx(4.0)
    assert one.weight_bytes == 6 * expert
    assert one.predicted_us == pytest.approx((6 * expert + one.activation_bytes) / 4e6)
    many = explain(weights, num_tokens=64, top_k=4)
    assert many.mode == "grouped"
    assert 15.9 * expert < many.weight_bytes - 2 * expert <= 16 * expert
    assert "gate-up: fp32 weights" in str(many)
    with pytest.raises(ValueError, match=r"top_k: expected 1\.\.16, got 17"):
        explain(weights, num_tokens=1, top_k=17)
    with pytest.raises(TypeError, match=r"num_tokens: expected an integer, got 1\.0"):
        explain(weights, num_tokens=1.0, top_k=4)  # type: ignore


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_explain_counts_shared_experts_of_another_width(num_tokens: int) -> None:
    def prepare(num_experts: int, hidden: int, **shared: MoEWeights) -> MoEWeights:
        w13, w2 = randn(num_experts, 2 * hidden, 64), randn(num_experts, 64, hidden)
        return prepare_moe_weights(w13, w2, layout="interleaved", precision="fp32", **shared)

    weights = prepare(8, 64, shared=prepare(1, 512))
    found = explain(weights, num_tokens=num_tokens, top_k=2, dtype=torch.float32)
    blocks = choose_blocking(num_tokens, 2, 8).max_blocks(num_tokens, 2, 8)
    shared_blocks = -(-num_tokens // found.block_n)
    assert found.num_blocks == blocks + shared_blocks
    assert f" {blocks + 8 * shared_blocks} programs" in found.launches[0]  # 64 columns each
    assert f" {blocks + shared_blocks} programs" in found.launches[1]
    rows = 2 * 64 + (2 * 64 + 512) * 2 + 3 * 64 * 2  # x and out; hidden; parts, both ways
    assert found.activation_bytes == 4 * num_tokens * rows


def test_explain_knows_that_few_tokens_have_a_block_for_each_assignment() -> None:
    weights = Case(1, 256, 256, 4, 2, precision="int4").make_weights("cpu")
    for num_tokens, num_warps in ((1, 8), (16, 4)):
        assert f" {num_warps} warps, " in str(explain(weights, num_tokens=num_tokens, top_k=2))


def test_int4_experts_stay_near_their_float_weights() -> None:
    """End to end: what int4 loses is what its quantiser reports, not more."""
    case = Case(8, 256, 256, 4, 2)
    inputs = case.make_inputs("cpu")
    w13, w2 = (side.data.clone() for side in (inputs["weights"].w13, inputs["weights"].w2))
    int4 = prepare_moe_weights(w13, w2, layout="interleaved", precision="int4", inplace=False)
    assert int4.w13.error_E is not None
    error = int4.w13.error_E.max().item()
    assert 0.0 < error < 0.2
    near = fused_moe(**inputs | {"weights": int4})
    # Errors of three products, two of them multiplied, add up in squares.
    assert_matches(near, fused_moe(**inputs), limit=2.0 * error)
