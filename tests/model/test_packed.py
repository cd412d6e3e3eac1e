"""Packed models: the function they compute, how far it is from the plain one, and their memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import small_config
from test_model_tick import Client, assert_row, make_tick, new_state, run_alone
from torch import Tensor

from tml_kernels.quant import FORMATS, PackedExperts, dequantize
from tml_kernels.testing import assert_bitwise, assert_matches, relative_l2
from tml_runtime.model import InteractionModel, ModelConfig, load
from tml_runtime.model.checkpoint import SINGLE
from tml_runtime.model.load import save_weights
from tml_runtime.model.packing import EXPERTS, REST
from tml_runtime.model.weights import DenseWeights, LayerWeights, ModelWeights

CONFIG = small_config()
# Every token takes every expert: no rounding changes the choice, which is a jump and no error.
ALL_CHOSEN = small_config(experts=replace(CONFIG.experts, top_k=CONFIG.experts.num_experts))
# Widths are whole blocks of every format; CONFIG's fill none.
WHOLE = small_config(
    width=256,
    local_heads=replace(CONFIG.local_heads, head_width=64),
    global_heads=replace(CONFIG.global_heads, head_width=64),
    dense_width=512,
    experts=replace(CONFIG.experts, width=256),
)
CASES = [  # (experts, rest)
    ("fp8", "fp8"),
    ("fp8_channel", "int4"),
    ("int4", "fp8"),
    ("int4_f16", "fp8_channel"),
    ("mxfp4", "int4_f16"),
    ("nvfp4", None),
    (None, "fp8"),
    (None, "int4"),
]
# Of Gaussian weights: README's table.
ERROR = {"fp8": 0.027, "fp8_channel": 0.027, "int4": 0.10, "int4_f16": 0.10, "mxfp4": 0.11,
         "nvfp4": 0.09}  # fmt: skip


def append_logits(model: InteractionModel, x_T_D: Tensor) -> Tensor:
    """Streamed in several passes; of valid tokens."""
    start, slot = (torch.tensor(v, dtype=torch.int32, device=model.device) for v in ([0, 40], [1]))
    h_T_D = model.append(model.new_state(2, max_append=16), x_T_D, start, slot)
    return model.logits(h_T_D)[:, : model.config.vocab.num_valid]


def changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """Nested containers with `change` of every tensor and packed matrix."""
    if isinstance(value, (Tensor, PackedExperts)):
        return change(value)
    if isinstance(value, tuple):
        items = (changed(item, change) for item in value)
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: changed(getattr(value, f.name), change)
                                 for f in fields(value)})  # fmt: skip
    return value


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor | PackedExperts]]:
    """Every tensor and packed matrix, by its path; layers without their number."""
    if isinstance(value, (Tensor, PackedExperts)):
        yield name, value
    elif isinstance(value, tuple) and not hasattr(value, "_fields"):
        for item in value:
            yield from leaves(item, name)
    elif isinstance(value, tuple):
        for field, item in zip(value._fields, value, strict=True):  # pyright: ignore
            yield from leaves(item, f"{name}.{field}".lstrip("."))
    elif is_dataclass(value):
        for field in fields(value):
            yield from leaves(getattr(value, field.name), f"{name}.{field.name}".lstrip("."))


def dequantized(model: InteractionModel) -> InteractionModel:
    """A plain model with the numbers that the packed bits stand for, in float32."""

    def plain(leaf: Tensor | PackedExperts) -> Tensor | PackedExperts:
        if isinstance(leaf, Tensor) or not leaf.format.packed:
            return leaf
        data = dequantize(leaf, slice(None))
        return PackedExperts(
            FORMATS["fp32"], data, None, None, None, leaf.num_rows, leaf.num_columns
        )

    return InteractionModel(model.config, changed(model.weights, plain), model.report)


def test_cases_have_every_precision() -> None:
    assert {name for name, _ in CASES} == {*EXPERTS, None}
    assert {name for _, name in CASES} == {*REST, None}
    assert EXPERTS == ("fp8", "fp8_channel", "int4", "int4_f16", "mxfp4", "nvfp4")
    assert REST == ("fp8", "fp8_channel", "int4", "int4_f16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("experts", "rest"), CASES)
def test_is_the_plain_model_of_its_rounded_weights(
    experts: str | None, rest: str | None, dtype: torch.dtype
) -> None:
    """Append, tick and full forward, bitwise: a CPU multiplies by the same numbers."""
    packed = InteractionModel.random(CONFIG, dtype=dtype).packed(experts=experts, rest=rest)
    plain = dequantized(packed)
    x_T_D = torch.randn(40, CONFIG.width).to(dtype)
    assert_bitwise(append_logits(packed, x_T_D), append_logits(plain, x_T_D))
    assert_bitwise(packed.forward(x_T_D), plain.forward(x_T_D))
    for ours, theirs in zip(run_alone(packed, 5, 2), run_alone(plain, 5, 2), strict=True):
        assert not ours.fault_S.any()
        assert_row(ours, 0, theirs, 0)


@pytest.mark.parametrize(("experts", "rest"), CASES)
def test_streamed_is_the_full_forward(experts: str | None, rest: str | None) -> None:
    """The second path is the oracle of packed models too."""
    packed = InteractionModel.random(CONFIG).packed(experts=experts, rest=rest)
    x_T_D = torch.randn(40, CONFIG.width)
    expected = packed.forward(x_T_D)[:, : CONFIG.vocab.num_valid]
    assert_matches(append_logits(packed, x_T_D), expected, limit=1e-4)


def test_tiny_preset_follows_its_oracle() -> None:
    packed = InteractionModel.random(ModelConfig.preset("tiny"), experts="int4", rest="fp8")
    x_T_D = torch.randn(40, packed.config.width)
    expected = packed.forward(x_T_D)[:, : packed.config.vocab.num_valid]
    assert_matches(append_logits(packed, x_T_D), expected, limit=1e-4)
    assert not run_alone(packed, 3, 2)[-1].fault_S.any()


@pytest.mark.parametrize(("experts", "rest"), CASES[:6])
def test_one_session_among_others_says_what_it_says_alone(
    experts: str | None, rest: str | None
) -> None:
    model = InteractionModel.random(CONFIG, experts=experts, rest=rest)
    alone = run_alone(model, seed=7, num_ticks=3)
    slots = {3: 7, 0: 1, 5: 2}
    state = new_state(model, slots)
    clients = {slot: Client(CONFIG, seed) for slot, seed in slots.items()}
    model.tick(state, make_tick({0: clients[0].next()}))  # a neighbour is older
    for n, expected in enumerate(alone):
        present = [slot for i, slot in enumerate((0, 3, 5)) if slot == 3 or (n + i) % 3]
        out = model.tick(state, make_tick({slot: clients[slot].next() for slot in present}))
        assert_row(out, present.index(3), expected, 0)


@pytest.mark.parametrize(("experts", "rest"), CASES)
def test_error_is_that_of_its_roundings(experts: str | None, rest: str | None) -> None:
    """Roundings are independent, so squares of errors add up: of four matrices in each of three
    layers, whose share of the stream is at most the whole of it, and of the unembedding, which
    nothing dilutes and is therefore the least where it is rounded."""
    model = InteractionModel.random(ALL_CHOSEN)
    x_T_D = torch.randn(40, CONFIG.width)
    packed = model.packed(experts=experts, rest=rest)
    error = relative_l2(append_logits(packed, x_T_D), append_logits(model, x_T_D))
    most = max(ERROR[name] for name in (experts, rest) if name is not None)
    assert error < 13**0.5 * most
    assert error > (0.8 * ERROR[rest] if rest is not None else 0.1 * most)


ROUTED = {"layers.mlp.experts.w13", "layers.mlp.experts.w2"}
OTHERS = {
    "layers.attention.qkvr_J_D",
    "layers.attention.out_D_I",
    "layers.mlp.w13_J_D",
    "layers.mlp.w2_D_F",
    "layers.mlp.experts.shared.w13",
    "layers.mlp.experts.shared.w2",
    "unembed_V_D",
}


@pytest.mark.parametrize(("experts", "rest"), [("int4", "fp8"), ("mxfp4", None), (None, "int4")])
def test_nothing_else_is_rounded(experts: str | None, rest: str | None) -> None:
    """The very tensors of the plain model: gates, norms, convolutions, tables, front ends, head."""
    model = InteractionModel.random(CONFIG)
    before = [(leaf, leaf.clone()) for _, leaf in leaves(model.weights) if isinstance(leaf, Tensor)]
    packed = model.packed(experts=experts, rest=rest)
    found = {}
    for (name, plain), (_, leaf) in zip(leaves(model.weights), leaves(packed.weights), strict=True):
        if isinstance(leaf, PackedExperts) and leaf.format.packed:
            assert found.setdefault(name, leaf.format.name) == leaf.format.name
        else:
            assert leaf is plain, name
    wanted = dict.fromkeys(ROUTED, experts) | dict.fromkeys(OTHERS, rest)
    assert found == {name: precision for name, precision in wanted.items() if precision}
    for leaf, copy in before:  # the plain model is as it was
        assert_bitwise(leaf, copy)


@pytest.mark.parametrize(("experts", "rest"), CASES)
def test_memory_is_that_of_the_formats(experts: str | None, rest: str | None) -> None:
    """Bits per weight, and at most 2 % of scales that belong to whole rows or matrices. A packed
    matrix keeps no storage but its own."""
    packed = InteractionModel.random(WHOLE, dtype=torch.bfloat16).packed(experts=experts, rest=rest)
    matrices = [leaf for _, leaf in leaves(packed.weights) if isinstance(leaf, PackedExperts)]
    assert any(leaf.format.packed for leaf in matrices)
    for leaf in matrices:
        num_weights = leaf.num_experts * leaf.num_rows * leaf.num_columns
        least = num_weights * leaf.format.bytes_per_weight
        assert least <= leaf.nbytes <= 1.02 * least
        assert leaf.data.untyped_storage().nbytes() == leaf.data.nbytes


def test_packing_while_filling_makes_the_same_model(tmp_path: Path) -> None:
    model = InteractionModel.random(CONFIG)
    save_weights(tmp_path / SINGLE, CONFIG, model.weights)
    expected = model.packed(experts="nvfp4", rest="int4")
    filled = InteractionModel.random(CONFIG, experts="nvfp4", rest="int4")
    loaded = InteractionModel.load(tmp_path, config=CONFIG, experts="nvfp4", rest="int4")
    assert filled.report == model.report
    for other in (filled, loaded):
        pairs = zip(leaves(other.weights), leaves(expected.weights), strict=True)
        for (name, actual), (_, wanted) in pairs:
            for part in ("data", "scale", "outer_E") if isinstance(actual, PackedExperts) else ():
                a, b = getattr(actual, part), getattr(wanted, part)
                assert (a is None and b is None) or torch.equal(a, b), (name, part)
            if isinstance(actual, Tensor):
                assert_bitwise(actual, wanted)


def test_packing_while_filling_has_one_plain_layer_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there: list[int] = []
    plain: list[weakref.ref] = []
    pack_layer = load.pack_layer

    def spy(layer: int, w: LayerWeights, packing: Any, **options: Any) -> LayerWeights:
        plain.append(weakref.ref(w.attention.out_D_I))
        there.append(sum(ref() is not None for ref in plain))
        return pack_layer(layer, w, packing, **options)

    monkeypatch.setattr(load, "pack_layer", spy)
    model = InteractionModel.random(CONFIG, experts="int4", rest="fp8")
    assert there == [1] * CONFIG.num_layers
    assert not any(ref() is not None for ref in plain)
    assert isinstance(model.weights.unembed_V_D, PackedExperts)


MAKERS: dict[str, Callable[..., InteractionModel]] = {
    "random": lambda **names: InteractionModel.random(CONFIG, **names),
    "load": lambda **names: InteractionModel.load("nowhere", config=CONFIG, **names),
    "packed": lambda **names: InteractionModel.random(CONFIG).packed(**names),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            {"experts": "int3"},
            "experts: 'int3' is not None or one of fp8, fp8_channel, int4, int4_f16, mxfp4, nvfp4",
        ),
        ({"experts": "bf16"}, "experts: 'bf16' is not None or one of fp8, "),
        (
            {"experts": "int4", "rest": "mxfp4"},
            "rest: 'mxfp4' is not None or one of fp8, fp8_channel, int4, int4_f16$",
        ),
        ({"rest": ""}, "rest: '' is not None or one of fp8, "),
    ],
)
def test_other_precisions_are_refused_by_name(
    maker: str, names: dict[str, str], message: str
) -> None:
    """Before a file is opened or a tensor made."""
    with pytest.raises(ValueError, match=message):
        MAKERS[maker](**names)


def test_a_float16_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype: torch.float16 rows .* use a bfloat16 or float32"):
        InteractionModel.random(CONFIG, dtype=torch.float16).packed(experts="int4")
    with pytest.raises(ValueError, match=r"dtype: torch.float16 rows"):
        InteractionModel.random(CONFIG, dtype=torch.float16, rest="fp8")


def test_a_packed_part_is_packed_once() -> None:
    half = InteractionModel.random(CONFIG).packed(experts="int4")
    for leaf in (half.packed(rest="fp8"), InteractionModel.random(CONFIG, rest="fp8")):
        with pytest.raises(ValueError, match="unembedding: is packed as fp8 already"):
            leaf.packed(rest="int4")
    with pytest.raises(ValueError, match="layer 1 experts: are packed as int4 already"):
        half.packed(experts="fp8")


def test_weights_that_are_not_finite_are_refused_by_layer() -> None:
    model = InteractionModel.random(CONFIG)
    dense = model.weights.layers[0].mlp
    assert isinstance(dense, DenseWeights) and isinstance(dense.w2_D_F, Tensor)
    dense.w2_D_F[3, 4] = float("nan")
    with pytest.raises(ValueError, match="layer 0 w2: weight_R_K: expert 0 holds NaN or Inf"):
        model.packed(rest="fp8")
    assert not isinstance(model.packed(experts="fp8").weights.unembed_V_D, PackedExperts)


@pytest.mark.parametrize(
    ("names", "tensor"),
    [({"experts": "int4"}, "experts.w13_weight: is packed as int4"),
     ({"rest": "fp8"}, r"w\[qkvr\]: is packed as fp8")],
)  # fmt: skip
def test_a_packed_model_is_not_saved_as_a_plain_one(
    names: dict[str, str], tensor: str, tmp_path: Path
) -> None:
    model = InteractionModel.random(CONFIG, **names)
    with pytest.raises(ValueError, match=f"{tensor}.* use the model that it was packed from"):
        save_weights(tmp_path / SINGLE, CONFIG, model.weights)
    assert not any(tmp_path.iterdir())


def on_gpu(model: InteractionModel) -> InteractionModel:
    """With the very bits."""

    def move(leaf: Tensor | PackedExperts) -> Tensor | PackedExperts:
        if isinstance(leaf, Tensor):
            return leaf.cuda()
        moved = {name: t.cuda() for name, t in vars(leaf).items() if isinstance(t, Tensor)}
        return replace(leaf, **moved)

    weights: ModelWeights = changed(model.weights, move)
    return InteractionModel(model.config, weights, model.report)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [ALL_CHOSEN, WHOLE], ids=["small", "whole-blocks"])
@pytest.mark.parametrize(("experts", "rest"), CASES)
def test_gpu_tick_follows_the_cpu(
    experts: str | None, rest: str | None, config: ModelConfig
) -> None:
    """The same bits on both. Every op of a path may be 8e-3 off, as bfloat16 is (`precision`):
    thirteen of them add up to less than 3e-2, as errors that are independent do. A first greedy
    tick, before a different token can be drawn."""
    config = replace(config, experts=replace(config.experts, top_k=config.experts.num_experts))
    cpu = InteractionModel.random(config, dtype=torch.bfloat16, experts=experts, rest=rest)
    gpu = on_gpu(cpu)
    x_T_D = torch.randn(40, config.width).bfloat16()
    assert_matches(append_logits(gpu, x_T_D.cuda()), append_logits(cpu, x_T_D), limit=3e-2)

    tick = make_tick({0: Client(config, 1).next()})
    outs = [model.tick(new_state(model, {0: 1}), tick) for model in (cpu, gpu)]
    assert not outs[1].fault_S.any()
    assert_matches(outs[1].mel_S_K_B[:, 0], outs[0].mel_S_K_B[:, 0], limit=3e-2)


@pytest.mark.gpu
def test_gpu_packs_the_same_bits() -> None:
    cpu = InteractionModel.random(CONFIG, dtype=torch.bfloat16)
    expected = cpu.packed(experts="int4", rest="fp8")
    actual = on_gpu(cpu).packed(experts="int4", rest="fp8")
    for (name, ours), (_, theirs) in zip(
        leaves(actual.weights), leaves(expected.weights), strict=True
    ):
        if isinstance(ours, PackedExperts):
            assert isinstance(theirs, PackedExperts)
            assert torch.equal(ours.data.cpu(), theirs.data), name
