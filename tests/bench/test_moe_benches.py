"""The expert benches: floors, shared weights, and that peers are handed what they understand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import bench_expert_mlp, bench_moe, harness, moe_peers
from bench.harness import CaseResult, OpBench, Variant
from tml_kernels.ops.expert_mlp import fused_moe
from tml_kernels.testing import relative_l2

SMALL = {"width": 256, "expert_width": 128, "num_experts": 8}


def timed(precision: str, num_tokens: int) -> bench_expert_mlp.TimedCase:
    (case,) = (
        case
        for case in bench_expert_mlp.QUICK
        if (case.precision, case.num_tokens) == (precision, num_tokens)
    )
    return case


@pytest.mark.parametrize(
    ("precision", "num_tokens", "us"),
    [("bf16", 1, 69), ("bf16", 64, 2287), ("fp8", 8, 253), ("int4", 1, 18), ("mxfp4", 256, 776)],
)
def test_floors_are_those_of_the_design(precision: str, num_tokens: int, us: float) -> None:
    """Microseconds at 4.4 TB/s for the mean number of touched experts; one draw is near it."""
    case = timed(precision, num_tokens)
    assert case.cost().bytes / 4.4e6 == pytest.approx(us, rel=0.05)
    assert case.order == "gate_up"


def test_block_costs_gate_and_shared_experts_too() -> None:
    by_name = {(c.precision, c.num_tokens): c for c in bench_moe.BENCH}
    routed = bench_expert_mlp.QUICK
    for precision, shared_bytes in (("bf16", 2), ("fp8", 1), ("int4", 1)):
        case = by_name[precision, 1]
        params = 3 * case.width * case.expert_width
        alone = next(c for c in routed if (c.precision, c.num_tokens) == (precision, 1)).cost()
        extra = 258 * case.width * 2 + 2 * params * shared_bytes
        assert case.cost().bytes == pytest.approx(alone.bytes + extra, rel=1e-3)
        assert case.cost().flops == 2 * (258 * case.width + 8 * params)


def test_quick_cases_are_every_precision_at_few_sizes() -> None:
    found = [(c.precision, c.num_tokens) for c in bench_expert_mlp.QUICK]
    precisions = ("bf16", "fp8", "int4", "mxfp4")
    assert found == [(p, t) for p in precisions for t in (1, 8, 64, 256)]


def test_a_tick_has_cases_of_its_own() -> None:
    """The model's mix, for the steps and the first pass of 8 and 32 sessions."""
    found = [case for case in bench_expert_mlp.TIMED if case.late_norm]
    sizes = [(case.skew, case.num_tokens) for case in found]
    assert sizes == [(skew, t) for skew in ("uniform", "zipf") for t in (8, 32, 40, 160)]
    assert {(c.precision, c.shared_precision, c.num_shared, c.order) for c in found} == {
        ("int4", "fp8", 2, "interleaved")
    }


def test_weights_are_drawn_once_for_cases_that_share_them() -> None:
    few, many = (replace(timed("int4", t), **SMALL) for t in (1, 64))
    weights = few.make_inputs("cpu")["weights"]
    assert many.make_inputs("cpu")["weights"] is weights
    assert replace(many, skew="zipf").make_inputs("cpu")["weights"] is weights
    data = weights.w13.data
    assert data.untyped_storage().nbytes() == data.numel() * data.element_size()
    other = replace(few, precision="mxfp4").make_inputs("cpu")["weights"]
    assert other.w13.format.name == "mxfp4"
    assert many.make_inputs("cpu")["weights"] is not weights  # the one set that is kept


def test_ours_allocates_before_the_timed_call() -> None:
    inputs = replace(timed("int4", 8), **SMALL).make_inputs("cpu")
    prepared = bench_expert_mlp.allocate(inputs)
    assert fused_moe(**prepared) is prepared["out"]
    from_ids = bench_expert_mlp.allocate_ids(inputs)
    assert torch.equal(bench_expert_mlp.run_from_ids(**from_ids), prepared["out"])
    buffer, given = from_ids["buffer"], inputs["routing"]
    assert torch.equal(buffer.expert_T_K, given.expert_T_K)
    assert buffer.expert_T_K.data_ptr() != given.expert_T_K.data_ptr()


def test_gate_sees_a_wrong_router(monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench_moe.MODEL[0]
    bench_moe.check(case, "cpu")
    right = bench_moe.moe_layer

    def wrong(**inputs: Any) -> Tensor:
        out = right(**inputs)
        inputs["routing"].weight_T_K.mul_(1.001)
        return out

    monkeypatch.setattr(bench_moe, "moe_layer", wrong)
    with pytest.raises(AssertionError, match="relative L2"):
        bench_moe.check(case, "cpu")


def test_transformers_block_is_the_same_function() -> None:
    """Not compared in bfloat16, where its router may choose other experts; in float32 it is."""
    pytest.importorskip("transformers.models.inkling")
    case = replace(
        bench_moe.BENCH[1], **SMALL, dtype=torch.float32, precision="fp32", shared_precision="fp32"
    )
    variants, _ = harness.resolve(bench_moe.OP, "cpu")
    inkling = replace(variants["transformers Inkling"], check=True, limit=1e-4)
    result = CaseResult(str(case), 0, 0, 0.0)
    compared = {"ours": variants["ours"], "transformers": inkling}
    with torch.no_grad():
        runnable = harness.runnable_here(compared, case.make_inputs("cpu"), result)
    assert set(runnable) == set(compared), result.skipped


def test_blocks_of_an_indexed_product() -> None:
    indexed = moe_peers.align(torch.tensor([[2, 0], [2, 1], [2, 0]], dtype=torch.int32), 2)
    assert indexed.sorted_ids.tolist() == [1, 5, 3, 6, 0, 2, 4, 6]
    assert indexed.expert_ids.tolist() == [0, 1, 2, 2]
    assert indexed.num_tokens_padded.tolist() == [8]


class FakeHumming:
    """Stands in for humming's layer, by what its own tests say of the arguments."""

    def __init__(self, shape_n: int, shape_k: int, **options: Any) -> None:
        assert options["weight_config"] == {"dtype": "int4", "group_size": 128}
        assert options["torch_dtype"] == torch.bfloat16
        self.shape = (options["num_experts"], shape_n, shape_k)

    def load_from_tensors(self, tensors: dict[str, Tensor]) -> None:
        packed, scale = tensors["weight"], tensors["weight_scale"]
        codes = torch.stack([(packed >> (4 * i)) & 15 for i in range(8)], dim=-1).flatten(-2)
        assert scale.dtype == torch.bfloat16
        self.weight = (codes - 8) * scale.float().repeat_interleave(128, dim=-1)

    def transform(self) -> None:
        assert self.weight.shape == self.shape

    def __call__(
        self,
        inputs: Tensor,
        sorted_ids: Tensor,
        expert_ids: Tensor,
        num_tokens_padded: Tensor,
        top_k: int,
        valid_shape_m: int,
        compute_config: str,
        tuning_config: str,
    ) -> Tensor:
        assert '"indexed"' in compute_config and '"block_shape"' in tuning_config
        assert num_tokens_padded.item() == len(sorted_ids) == 16 * len(expert_ids)
        out = torch.full((valid_shape_m, self.shape[1]), float("nan"))
        for place, row in enumerate(sorted_ids.tolist()):
            if row < valid_shape_m:
                out[row] = self.weight[expert_ids[place // 16]] @ inputs[row // top_k].float()
        return out.bfloat16()


def pack_codes(codes: Tensor, num_bits: int) -> Tensor:
    assert codes.dtype == torch.int32 and num_bits == 4
    shifted = codes.view(*codes.shape[:-1], -1, 8).long() << torch.arange(0, 32, 4)
    return shifted.sum(-1).to(torch.int32)


def fake_modules(**names: Any) -> Any:
    return lambda module, name: names[name]


def compare(variant: Variant, case: bench_expert_mlp.TimedCase) -> float:
    inputs = case.make_inputs("cpu")
    out = variant.run(**variant.prepare(inputs))
    return relative_l2(out, fused_moe(**inputs))


def test_humming_is_given_our_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = [[0, 8, {"block_shape": [64, 1, 1]}], [8, 999, {"block_shape": [16, 1, 1]}]]
    method = SimpleNamespace(get_default_tuning_configs=lambda layer, gemm_type: ranges)
    find = fake_modules(
        HummingLayer=FakeHumming,
        HummingMethod=method,
        pack_weight=pack_codes,
        moe_fused_mul_sum=lambda y, weight: (y.float() * weight[..., None]).sum(1).bfloat16(),
    )
    monkeypatch.setattr(moe_peers, "find", find)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    variant = moe_peers.humming_int4()
    assert compare(variant, replace(timed("int4", 8), **SMALL)) < 1e-2
    with pytest.raises(NotImplementedError, match="int4 weights alone"):
        variant.prepare(replace(timed("mxfp4", 8), **SMALL).make_inputs("cpu"))


def test_flag_gems_is_given_our_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def experts(
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        use_fp8_w8a8: bool = False,
        w1_scale: Tensor | None = None,
        w2_scale: Tensor | None = None,
        block_shape: tuple[int, int] = (1, 1),
    ) -> Tensor:
        assert use_fp8_w8a8 == (w1.dtype == torch.float8_e4m3fn)
        out = torch.zeros_like(hidden_states, dtype=torch.float32)
        for t, ids in enumerate(topk_ids.tolist()):
            for k, e in enumerate(ids):
                up, down = (
                    w[e].float()
                    if s is None
                    else w[e].float() * s[e].repeat_interleave(128, 0).repeat_interleave(128, 1)
                    for w, s in ((w1, w1_scale), (w2, w2_scale))
                )
                h = moe_peers.swiglu(F.linear(hidden_states[t].float(), up))
                out[t] += topk_weights[t, k] * F.linear(h, down)
        return out.to(hidden_states.dtype)

    monkeypatch.setattr(moe_peers, "find", fake_modules(outplace_fused_experts=experts))
    assert compare(moe_peers.flag_gems_fp8(), replace(timed("fp8", 8), **SMALL)) < 1e-2
    plain = Variant(bench_expert_mlp.on_plain(moe_peers.flag_gems_experts()))
    assert compare(plain, replace(timed("bf16", 8), **SMALL)) < 1e-2


@pytest.mark.parametrize("op", [bench_expert_mlp.OP, bench_moe.OP], ids=lambda op: op.name)
def test_layers_follow_one_another(op: OpBench) -> None:
    assert (op.sets, op.graph_calls) == (4, 40)
    assert op.quick
