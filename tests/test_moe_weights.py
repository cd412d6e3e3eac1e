from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tml_kernels.moe_weights import (
    LAYOUTS,
    ORDERS,
    CheckpointScales,
    MoEWeights,
    prepare_moe_weights,
)
from tml_kernels.quant import FORMATS, dequantize
from tml_kernels.testing import LiveBytes, randn, relative_l2

E, F, D = 3, 34, 200
PACKED = [name for name, fmt in FORMATS.items() if fmt.packed]
READY = ["fp8", "fp8_channel", "mxfp4", "nvfp4", "rows", "awq", "gptq"]


def stacks(kn: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    pair = randn(E, 2 * F, D).to(dtype), randn(E, D, F).to(dtype)
    return pair if not kn else (pair[0].mT.contiguous(), pair[1].mT.contiguous())


def prepare(w13: Tensor, w2: Tensor, precision: str, **options) -> MoEWeights:
    return prepare_moe_weights(w13, w2, layout="gate_up", precision=precision, **options)


def parts(weights: MoEWeights) -> Iterator[Tensor]:
    for packed in (weights.w13, weights.w2):
        for part in (packed.data, packed.scale, packed.zero, packed.outer_E):
            if part is not None:
                yield part


def ready(name: str, num_experts: int, width: int, expert_width: int) -> dict:
    """Arguments of `prepare_moe_weights` for a random checkpoint."""
    scales = {}
    words = {}
    is_int4 = name in ("rows", "awq", "gptq")
    for part, rows, columns in (
        ("w13", 2 * expert_width, width),
        ("w2", width, expert_width),
    ):
        groups = -(-columns // 128)
        if name.startswith("fp8"):
            words[part] = randn(num_experts, rows, columns).to(torch.float8_e4m3fn)
            blocks = (-(-rows // 128), groups) if name == "fp8" else (rows,)
            scales[part] = torch.rand(num_experts, *blocks)
        elif is_int4:
            shape = {
                "rows": (rows, columns // 8),
                "awq": (columns, rows // 8),
                "gptq": (columns // 8, rows),
            }[name]
            words[part] = torch.randint(-(2**31), 2**31, (num_experts, *shape)).int()
            shape = (rows, groups) if name == "rows" else (groups, rows)
            scales[part] = torch.rand(num_experts, *shape).half()
            if name != "rows":
                zero = torch.randint(-(2**31), 2**31, (num_experts, groups, rows // 8))
                scales[f"{part}_zero"] = zero.int()
        else:
            shape = (num_experts, rows, columns // 2)
            words[part] = torch.randint(0, 256, shape, dtype=torch.uint8)
            shape = (num_experts, rows, columns // {"mxfp4": 32, "nvfp4": 16}[name])
            scales[part] = torch.randint(100, 120, shape, dtype=torch.uint8)
            if name == "nvfp4":
                scales[part] = scales[part].view(torch.float8_e4m3fn)
                scales[f"{part}_global"] = torch.rand(num_experts) + 0.1
    return {
        **words,
        "scales": CheckpointScales(**scales),
        "layout": "up_gate",
        "precision": "int4_f16" if is_int4 else name,
        "packing": name if is_int4 else None,
    }


@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "beside"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", FORMATS)
def test_every_layout_means_the_same(precision: str, layout: str, inplace: bool) -> None:
    w13, w2 = stacks()
    given = (w13.clone(), w2.clone())
    if layout.endswith("_kn"):
        given = (w13.mT.contiguous(), w2.mT.contiguous())
    before = [g.clone() for g in given]
    weights = prepare_moe_weights(*given, layout=layout, precision=precision, inplace=inplace)
    assert weights.order == layout.removesuffix("_kn") and weights.order in ORDERS
    assert (weights.num_experts, weights.width, weights.expert_width) == (E, D, F)
    # Of the worst packed format; tests/quant has the bounds of each.
    limit = {"fp32": 0.0, "bf16": 2e-3, "fp16": 3e-4}.get(precision, 0.13)
    for expert in range(E):
        for actual, source in zip(weights.dequantize(expert), (w13, w2), strict=True):
            assert actual.dtype == torch.float32
            assert relative_l2(actual, source[expert]) <= limit
    reference = prepare(w13, w2, precision, inplace=False)
    for actual, expected in zip(parts(weights), parts(reference), strict=True):
        assert torch.equal(actual, expected)
    if not inplace:
        assert all(torch.equal(g, b) for g, b in zip(given, before, strict=True))


@pytest.mark.parametrize("precision", PACKED)
def test_packs_where_the_source_lies(precision: str) -> None:
    given = stacks(dtype=torch.bfloat16)
    weights = prepare(given[0].clone(), given[1].clone(), precision, inplace=False)
    inside = prepare(*given, precision)
    for packed, source in zip((inside.w13, inside.w2), given, strict=True):
        fits = packed.data.nbytes <= source.nbytes
        assert (packed.data.data_ptr() == source.data_ptr()) == fits
    # w2's rows of 34 columns may grow by their padding; w13's of 200 never do.
    assert inside.w13.data.data_ptr() == given[0].data_ptr()
    for actual, expected in zip(parts(inside), parts(weights), strict=True):
        assert torch.equal(actual, expected)


def test_packs_into_a_part_of_a_storage() -> None:
    """A layer's slice of a larger tensor: what lies around it stays."""
    layers = randn(3, E, 2 * F, D)
    around = layers[::2].clone()
    w13, w2 = layers[1], stacks()[1]
    expected = prepare(w13.clone(), w2.clone(), "mxfp4", inplace=False)
    weights = prepare(w13, w2, "mxfp4")
    assert weights.w13.data.data_ptr() == w13.data_ptr()
    assert torch.equal(weights.w13.data, expected.w13.data)
    assert torch.equal(layers[::2], around)


def test_a_storage_off_16_bytes_is_left_alone() -> None:
    buffer = torch.zeros(E * 2 * F * D + 1)
    w13 = buffer[1:].view(E, 2 * F, D).copy_(randn(E, 2 * F, D))
    before = w13.clone()
    weights = prepare(w13, stacks()[1], "int4")
    assert weights.w13.data.data_ptr() % 16 == 0
    assert torch.equal(w13, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_plain_weights_are_taken_as_they_are(dtype: torch.dtype) -> None:
    w13, w2 = stacks(dtype=dtype)
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    for inplace in (True, False):
        weights = prepare(w13, w2, name, inplace=inplace)
        assert weights.w13.data is w13 and weights.w2.data is w2


def test_turns_plain_weights_in_place() -> None:
    w13, w2 = stacks(kn=True)
    expected = w13.mT.clone()
    weights = prepare_moe_weights(w13, w2, layout="interleaved_kn", precision="fp32")
    assert weights.w13.data.data_ptr() == w13.data_ptr()
    assert torch.equal(weights.w13.data, expected)


def test_parameters() -> None:
    w13, w2 = (torch.nn.Parameter(w) for w in stacks())
    for precision in ("fp32", "mxfp4"):
        weights = prepare(w13, w2, precision, inplace=False)
        assert not any(part.requires_grad for part in parts(weights))
    prepare(w13, w2, "int4")


@pytest.mark.parametrize("name", READY)
def test_ready_checkpoints(name: str) -> None:
    """Packed in place and beside: the same meaning, of sizes that fill blocks and that do not."""
    for width, expert_width in ((256, 512), (288, 32)):
        given = ready(name, 3, width, expert_width)
        beside = prepare_moe_weights(**given, inplace=False)
        values = [beside.dequantize(e) for e in range(3)]
        assert all(v.isfinite().all() and v.std() > 0 for pair in values for v in pair)
        inside = prepare_moe_weights(**given)
        assert inside.order == "up_gate" and inside.w13.error_E is None
        in_place = inside.w13.data.data_ptr() == given["w13"].data_ptr()
        assert in_place == (width == 256)
        for expert, expected in enumerate(values):
            for actual, value in zip(inside.dequantize(expert), expected, strict=True):
                assert torch.equal(actual, value)


def test_fp8_stored_k_first() -> None:
    given = ready("fp8", 2, 256, 384)
    expected = prepare_moe_weights(**given, inplace=False)
    turned = {
        part: given[part].view(torch.uint8).mT.contiguous().view(torch.float8_e4m3fn)
        for part in ("w13", "w2")
    }
    scales = CheckpointScales(
        given["scales"].w13.mT.contiguous(), given["scales"].w2.mT.contiguous()
    )
    given = {**given, **turned, "scales": scales, "layout": "up_gate_kn"}
    for actual, part in zip(parts(prepare_moe_weights(**given)), parts(expected), strict=True):
        assert torch.equal(actual, part)


def scale_bytes(weights: MoEWeights) -> int:
    data = weights.w13.data.nbytes + weights.w2.data.nbytes
    errors = [p.error_E.nbytes for p in (weights.w13, weights.w2) if p.error_E is not None]
    return weights.nbytes - data + 5 * sum(errors)  # error_E, and sums of squares while it is made


def test_counts_live_bytes() -> None:
    given = torch.zeros(1000)
    with LiveBytes([given]) as counter:
        a = given + 1
        b = a[:10] * 2
        del a
        given.view(10, 100).add_(1)
        b.exp()
    assert counter.peak == 4040


NUM_EXPERTS = 16


@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "beside"])
@pytest.mark.parametrize("layout", ["gate_up", "gate_up_kn"])
@pytest.mark.parametrize("precision", FORMATS)
def test_memory_beside_the_weights(precision: str, layout: str, inplace: bool) -> None:
    """One chunk of 8 experts of the smaller stack, float32 work included, and the scales."""
    w13 = randn(NUM_EXPERTS, 2 * 256, 256).bfloat16()
    w2 = randn(NUM_EXPERTS, 256, 256).bfloat16()
    if layout.endswith("_kn"):
        w13, w2 = w13.mT.contiguous(), w2.mT.contiguous()
    with LiveBytes([w13, w2]) as counter:
        weights = prepare_moe_weights(w13, w2, layout=layout, precision=precision, inplace=inplace)
    made = scale_bytes(weights)
    stacks = ((weights.w13, w13), (weights.w2, w2))
    made += sum(p.data.nbytes for p, w in stacks if p.data.data_ptr() != w.data_ptr())
    if inplace and precision != "fp32":
        assert made == scale_bytes(weights)
    assert counter.peak <= made + w2[:8].nbytes


@pytest.mark.parametrize("name", READY)
def test_memory_beside_a_checkpoint(name: str) -> None:
    given = ready(name, NUM_EXPERTS, 512, 512)
    known = [t for t in vars(given["scales"]).values() if t is not None]
    with LiveBytes([*known, given["w13"], given["w2"]]) as counter:
        weights = prepare_moe_weights(**given)
    assert weights.w13.data.data_ptr() == given["w13"].data_ptr()
    assert counter.peak <= scale_bytes(weights) + given["w2"][:8].nbytes


def test_biases_are_float32() -> None:
    w13, w2 = stacks()
    bias13, bias2 = randn(E, 2 * F).bfloat16(), randn(E, D)
    weights = prepare(w13, w2, "bf16", bias13=bias13, bias2=bias2)
    assert weights.bias13_E_J is not None and weights.bias2_E_D is not None
    assert torch.equal(weights.bias13_E_J, bias13.float())
    assert torch.equal(weights.bias2_E_D, bias2)
    assert weights.nbytes == 2 * (w13.numel() + w2.numel()) + 4 * (bias13.numel() + bias2.numel())


def test_shared_experts_have_their_own_precision() -> None:
    shared = prepare_moe_weights(
        randn(2, 10, D), randn(2, D, 5), layout="up_gate", precision="fp32"
    )
    weights = prepare(*stacks(), "int4", shared=shared)
    assert (weights.num_shared, weights.num_experts) == (2, E)
    assert weights.shared is shared and shared.num_shared == 0
    assert weights.nbytes == replace(weights, shared=None).nbytes + shared.nbytes


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    prepare(randn(19, 4, 32), randn(19, 32, 2), "int4")
    assert capsys.readouterr().err == ""
    prepare(randn(19, 4, 32), randn(19, 32, 2), "int4", progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [f"w13: {n} of 19 experts in int4" for n in (8, 16, 19)]
    assert lines[3:] == [f"w2: {n} of 19 experts in int4" for n in (8, 16, 19)]


def small(**changes) -> dict:
    w13, w2 = randn(E, 2 * F, D), randn(E, D, F)
    return {"w13": w13, "w2": w2, "layout": "gate_up", "precision": "int4", **changes}


def with_nan(shape: tuple[int, ...]) -> Tensor:
    tensor = randn(*shape)
    tensor[1].view(-1)[-1] = math.nan
    return tensor


BAD = {
    "layout": ({"layout": "w1w3"}, ValueError, "layout: 'w1w3' is not one of gate_up, up_gate, in"),
    "precision": ({"precision": "int3"}, ValueError, "precision: 'int3' is not one of fp32, bf16"),
    "no tensor": ({"w13": [1.0]}, TypeError, "w13: expected a tensor, got list"),
    "rank": ({"w13": randn(2 * F, D)}, ValueError, r"w13: expected 3 axes, got shape \(68, 200\)"),
    "dtype": ({"w2": torch.zeros(E, D, F).int()}, TypeError, "w2: expected .*; got torch.int32"),
    "device": (
        {"w2": torch.empty(E, D, F, device="meta")},
        ValueError, "w2: expected device cpu, got meta",
    ),
    "strides": (
        {"w13": randn(E, D, 2 * F).mT}, ValueError, r"w13: must be contiguous, .* with '_kn'",
    ),
    "empty": ({"w13": randn(0, 2 * F, D), "w2": randn(0, D, F)}, ValueError, "w13: is empty"),
    "experts": ({"w2": randn(E + 1, D, F)}, ValueError, r"w2: .* = \(4, 200, 34\) does not"),
    "width": ({"w2": randn(E, D + 1, F)}, ValueError, r"w2: .* does not fit w13 .*\(3, 68, 200\)"),
    "expert width": ({"w2": randn(E, D, F + 1)}, ValueError, "w2: .* does not fit w13"),
    "odd rows": ({"w13": randn(E, 2 * F + 1, D)}, ValueError, "w2: .* does not fit w13"),
    "transposed": ({"layout": "gate_up_kn"}, ValueError, r"w2: .*\(3, 34, 200\) does not fit"),
    "packing": ({"packing": "awq"}, ValueError, "packing: 'awq' is of a ready checkpoint"),
    "scales": ({"scales": torch.ones(1)}, TypeError, "scales: expected CheckpointScales, got Ten"),
    "bias13": ({"bias13": randn(E, F)}, ValueError, r"bias13: expected shape \(3, 68\)"),
    "bias2": ({"bias2": torch.zeros(E, D).int()}, TypeError, "bias2: expected .* got torch.int32"),
    "bias nan": ({"bias2": with_nan((E, D))}, ValueError, "bias2: expert 1 holds NaN or Inf"),
    "w2 nan": ({"w2": with_nan((E, D, F))}, ValueError, "w2: expert 1 holds NaN or Inf"),
    "shared type": ({"shared": randn(1)}, TypeError, "shared: expected MoEWeights, got Tensor"),
    "shared width": (
        {"shared": prepare(randn(1, 2, 7), randn(1, 7, 1), "fp32")},
        ValueError, "shared: width 7 on cpu, the routed experts have width 200",
    ),
    "shared twice": (
        {"shared": prepare(*stacks(), "fp32", shared=prepare(*stacks(), "fp32"))},
        ValueError, "shared: has shared experts itself",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_names_what_is_wrong(case: str) -> None:
    changes, error, words = BAD[case]
    with pytest.raises(error, match=words):
        prepare_moe_weights(**small(**changes))


def test_refusals_leave_the_source_alone() -> None:
    """What can be known before the first expert is written is refused before."""
    given = small(bias2=randn(E, D + 1))
    before = given["w13"].clone()
    with pytest.raises(ValueError, match="bias2"):
        prepare_moe_weights(**given)
    assert torch.equal(given["w13"], before)


def test_a_zero_point_reaches_the_kernels_form() -> None:
    weights = prepare_moe_weights(**ready("awq", 2, 256, 64))
    assert weights.w13.zero is not None and weights.w13.scale is not None
    assert weights.w13.zero.shape == weights.w13.scale.shape
    low = (weights.w13.zero & 0xFFFF).to(torch.uint16).view(torch.bfloat16)
    assert low.min() >= 128 and low.max() <= 143
    assert not torch.equal(weights.w13.zero[0], weights.w13.zero[1])


@pytest.mark.parametrize("order", ["gate_up_kn", "rows"])
def test_unknown_order(order: str) -> None:
    weights = prepare(*stacks(), "fp32")
    with pytest.raises(ValueError, match=f"order: '{order}' is not one of"):
        replace(weights, order=order)
    with pytest.raises(ValueError, match=r"w2: .* does not fit w13"):
        replace(weights, w2=weights.w13)


def test_dequantizes_a_slice() -> None:
    weights = prepare(*stacks(), "nvfp4")
    both = dequantize(weights.w13, slice(1, None))
    assert both.shape == (E - 1, 2 * F, D)
    assert torch.equal(both[1], weights.dequantize(2)[0])
