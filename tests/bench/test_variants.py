"""What is timed beside ours computes the same: a rival that does less work would look fast."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import bench_layer, harness
from bench.harness import CaseResult, Variant
from bench.paths import bench_names
from tml_kernels.ops.patch_embed.cases import TINY

# Fields that make a timed case small enough for a CPU; its kind stays.
SMALLER: dict[str, dict[str, Any]] = {
    "expert_mlp": {"width": 64, "expert_width": 32, "num_experts": 8},
    "moe": {"width": 64, "expert_width": 32, "num_experts": 16},
    "linear": {"width": 64, "rows": 96},
    "patch_embed": {"model_width": 64, "spec": TINY},
    "sample": {"vocabulary": 320, "num_hidden": 20},
    "layer": {"config": bench_layer.SHORT, "context": 40},
    "flow_head": {"model_width": 64, "width": 64},
}
# Unchecked on a GPU, where two right answers may differ; on this input they do not.
AGREES_HERE = {("dmel", "torch")}
# Of a variant that cannot read a case's weights.
UNFIT = ("NotImplementedError: takes plain weights", "ValueError: quantize_x: needs fp8 weights")


def shrunk(name: str) -> list[harness.Case]:
    """The first timed case of each kind: with and without shared experts, swiglu, logits..."""
    op = harness.load(name)
    kinds: dict[Any, Any] = {}
    names = ("activation", "num_valid", "num_shared", "precision", "guidance", "window")
    for case in op.bench:
        kinds.setdefault(tuple(getattr(case, name, None) for name in names), case)
    small = [replace(case, **SMALLER.get(name, {})) for case in kinds.values()]
    return [replace(c, num_valid=80) if getattr(c, "num_valid", None) else c for c in small]


CASES = [pytest.param(n, c, id=f"{n}-{c}") for n in bench_names() for c in shrunk(n)]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_variants_agree(name: str, case: harness.Case) -> None:
    op = harness.load(name)
    variants, _ = harness.resolve(op, "cpu")
    for other in variants:
        if (name, other) in AGREES_HERE:
            variants[other] = replace(variants[other], check=True)
    inputs = case.make_inputs("cpu")
    result = CaseResult(str(case), 0, 0, 0.0)
    with torch.no_grad():
        runnable = harness.runnable_here(variants, inputs, result)
    unfit = {other for other, why in result.skipped.items() if why.startswith(UNFIT)}
    assert set(result.skipped) == unfit
    assert set(runnable) == set(variants) - unfit
    assert not unfit or name in ("expert_mlp", "moe")
    if getattr(case, "precision", "bf16") == "bf16":
        assert unfit <= {"ours, fp8 activations"}


def test_a_rival_that_is_wrong_would_be_seen() -> None:
    op = harness.load("linear")
    wrong = Variant(lambda **inputs: op.variants["torch"].run(**inputs) * 1.1)
    result = CaseResult("", 0, 0, 0.0)
    inputs = shrunk("linear")[0].make_inputs("cpu")
    runnable = harness.runnable_here({"ours": op.variants["ours"], "wrong": wrong}, inputs, result)
    assert set(runnable) == {"ours"}
    assert "differs from ours" in result.skipped["wrong"]
