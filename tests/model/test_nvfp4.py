"""Checkpoints with routed experts in nvfp4: read to the bit, refused where a part is wrong.

The layouts are written here from their definition, and decoded with a table of the sixteen codes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import small_config
from test_convert import assert_same_model
from torch import Tensor

from tml_kernels.moe_weights import CheckpointScales, prepare_moe_weights
from tml_kernels.testing import assert_bitwise
from tml_runtime.model import CheckpointError, InteractionModel
from tml_runtime.model import packing as packing_module
from tml_runtime.model.checkpoint import INDEX, SINGLE
from tml_runtime.model.convert import convert_checkpoint
from tml_runtime.model.load import save_weights
from tml_runtime.model.weights import MoeWeights, named_tensors, routed_names

CONFIG = small_config()
PACKED_LAYER, PLAIN_LAYER = 1, 2  # one stays as it is, as in the published release
W13, W2 = routed_names(PACKED_LAYER)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
# Behind a stack's name: codes, block scales, global scale.
PARTS = {
    "published": ("", ".scale", ".scale2"),
    "compressed-tensors": (".weight_packed", ".weight_scale", ".weight_global_scale"),
}


def random_stack(shape: torch.Size, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, block scales (all there are, 0 and the least among them) and factors of [E, R, K]."""
    generator = torch.Generator().manual_seed(seed)
    num_experts, num_rows, num_columns = shape
    codes = torch.randint(
        256, (num_experts, num_rows, num_columns // 2), generator=generator, dtype=torch.uint8
    )
    byte = torch.arange(num_experts * num_rows * num_columns // 16) % 0x7F
    scale = byte.to(torch.uint8).view(num_experts, num_rows, -1).view(torch.float8_e4m3fn)
    return codes, scale, torch.rand(num_experts, generator=generator) * 1e-3 + 1e-5


def decoded(codes: Tensor, scale: Tensor, factor_E: Tensor) -> Tensor:
    """float32 [E, R, K]; the even column is the low half of a byte. No -0 where a scale is 0."""
    value = E2M1[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()]
    scale = scale.float().repeat_interleave(16, dim=-1)
    return (value * scale * factor_E[:, None, None]).masked_fill(scale == 0, 0.0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("plain")
    save_weights(folder / SINGLE, CONFIG, InteractionModel.random(CONFIG, seed=3).weights)
    return load_file(folder / SINGLE)


def tensors_in(spelling: str, plain: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """A checkpoint's tensors, and by name the float32 values of the stacks that are in nvfp4."""
    tensors, values = dict(plain), {}
    for seed, name in enumerate((W13, W2)):
        codes, scale, factor_E = random_stack(plain[name].shape, seed)
        del tensors[name]
        stored = factor_E
        if spelling == "compressed-tensors":
            stored = 1 / factor_E
            factor_E = 1 / stored
            stored = stored[:, None].expand(-1, 2 if name == W13 else 1).contiguous()
            tensors[name + ".input_global_scale"] = torch.ones(len(codes), 1)
        else:
            tensors[name + ".input_amax"] = torch.ones(1, dtype=torch.bfloat16)
            tensors[name + ".original_shape"] = torch.tensor(plain[name].shape)
        parts = (name + part for part in PARTS[spelling])
        tensors |= dict(zip(parts, (codes, scale, stored), strict=True))
        values[name] = decoded(codes, scale, factor_E)
    return tensors, values


@pytest.fixture(params=PARTS)
def spelling(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def written(
    spelling: str, plain: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, dict[str, Tensor]]:
    """The checkpoint's folder, and the values; stacks of four experts are read in two pieces."""
    tensors, values = tensors_in(spelling, plain)
    save_file(tensors, tmp_path / SINGLE)
    monkeypatch.setattr(packing_module, "PIECE", 3)
    return tmp_path, values


def experts_of(model: InteractionModel, layer: int = PACKED_LAYER) -> Any:
    mlp = model.weights.layers[layer].mlp
    assert isinstance(mlp, MoeWeights)
    return mlp.experts


def test_a_plain_model_has_the_decoded_values(
    written: tuple[Path, dict[str, Tensor]], plain: dict[str, Tensor]
) -> None:
    """In float32 to the bit, in bfloat16 rounded once; everything else is what the file has."""
    path, values = written
    for dtype in (torch.float32, torch.bfloat16):
        model = InteractionModel.load(path, config=CONFIG, dtype=dtype)
        for name, view in named_tensors(CONFIG, model.weights):
            expected = values.get(name, plain[name]).to(view.dtype)
            assert torch.equal(view, expected), name


def test_what_is_read_and_what_is_not_is_said(
    written: tuple[Path, dict[str, Tensor]], spelling: str
) -> None:
    report = InteractionModel.load(written[0], config=CONFIG).report
    assert {W13, W2} <= set(report.loaded) and report.random == ()
    unread = (
        (".input_amax", ".original_shape") if spelling == "published" else (".input_global_scale",)
    )
    assert set(report.ignored) == {name + part for name in (W13, W2) for part in unread}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_nvfp4_plan_rounds_nothing(
    dtype: torch.dtype, written: tuple[Path, dict[str, Tensor]], spelling: str
) -> None:
    """Codes and scales are the checkpoint's; the layer that is plain there is rounded as ever."""
    path, values = written
    model = InteractionModel.load(path, config=CONFIG, dtype=dtype, experts="nvfp4")
    experts, tensors = experts_of(model), load_file(path / SINGLE)
    given = [[tensors[name + part] for part in PARTS[spelling]] for name in (W13, W2)]
    outer = [g[2] if spelling == "published" else 1 / g[2][:, 0] for g in given]
    ready = prepare_moe_weights(
        given[0][0], given[1][0], layout="interleaved", precision="nvfp4",
        scales=CheckpointScales(given[0][1], given[1][1], w13_global=outer[0], w2_global=outer[1]),
    )  # fmt: skip
    for ours, theirs in ((experts.w13, ready.w13), (experts.w2, ready.w2)):
        assert_bitwise(ours.data, theirs.data)
        assert_bitwise(ours.scale, theirs.scale)
        assert_bitwise(ours.outer_E, theirs.outer_E)
        assert not ours.error_E.any()
    for expert in range(CONFIG.experts.num_experts):
        for ours, name in zip(experts.dequantize(expert), (W13, W2), strict=True):
            assert torch.equal(ours, values[name][expert])
    assert experts_of(model, PLAIN_LAYER).w13.error_E.all()


@pytest.mark.parametrize("precision", ["int4", "fp8", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_plan_is_made_of_the_decoded_values(
    dtype: torch.dtype, precision: str, written: tuple[Path, dict[str, Tensor]]
) -> None:
    """Of all their bits: a bfloat16 model does not round them on the way."""
    path, values = written
    search = precision == "int4"
    model = InteractionModel.load(
        path, config=CONFIG, dtype=dtype, experts=precision, search=search
    )
    expected = prepare_moe_weights(
        values[W13],
        values[W2],
        layout="interleaved",
        precision=precision,
        inplace=False,
        search=search,
    )
    for ours, theirs in (
        (experts_of(model).w13, expected.w13), (experts_of(model).w2, expected.w2)
    ):  # fmt: skip
        assert_bitwise(ours.data, theirs.data)
        assert_bitwise(ours.scale, theirs.scale)


@pytest.mark.parametrize("experts", ["nvfp4", "int4", None])
def test_converts_to_the_model_that_load_makes(
    experts: str | None, written: tuple[Path, dict[str, Tensor]]
) -> None:
    path, _ = written
    names: dict[str, Any] = {"experts": experts, "rest": "fp8", "dtype": torch.bfloat16}
    convert_checkpoint(path, path / "out", CONFIG, **names)
    model = InteractionModel.load(path / "out", verify=True)
    assert_same_model(model, InteractionModel.load(path, config=CONFIG, **names))


def test_parts_may_be_in_any_shard(spelling: str, plain: dict[str, Tensor], tmp_path: Path) -> None:
    tensors, values = tensors_in(spelling, plain)
    shards = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    assert len({shards[W13 + part] for part in PARTS[spelling]}) > 1
    for shard in set(shards.values()):
        save_file({n: t for n, t in tensors.items() if shards[n] == shard}, tmp_path / shard)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": shards}))
    model = InteractionModel.load(tmp_path, config=CONFIG)
    assert torch.equal(experts_of(model).w2.data, values[W2])


def altered(x: Tensor, index: tuple[int, ...], value: float) -> Tensor:
    x = x.clone()
    x.view(torch.uint8 if x.dtype == torch.float8_e4m3fn else x.dtype)[index] = value
    return x


# Of the part 0 codes, 1 block scales, 2 global scale: what is done to it, and what is said.
DAMAGE: dict[str, tuple[int, Callable[[Tensor], Tensor | None], str]] = {
    "no block scales": (1, lambda x: None, "missing; nvfp4 experts need it, expected F8_E4M3"),
    "no global scale": (2, lambda x: None, "missing; nvfp4 experts need it, expected F32"),
    "block scales of bytes": (
        1, lambda x: x.view(torch.uint8), r"is U8 \(4, 64, 4\), expected F8_E4M3 \(4, 64, 4\)"
    ),
    "global scale in bf16": (2, lambda x: x.bfloat16(), r"is BF16 \(4.*, expected F32 \(4,\)"),
    "a byte a code": (
        0, lambda x: torch.cat([x, x], -1), r"is U8 \(4, 64, 64\), expected U8 \(4, 64, 32\)"
    ),
    "groups of 32": (
        1, lambda x: x[..., ::2].contiguous(), r"is F8_E4M3 \(4, 64, 2\), expected F8_E4M3 \(4, 64,"
    ),
    "one global scale": (2, lambda x: x[:1], r"is F32 \(1.*, expected F32 \(4,\)"),
    "NaN": (2, lambda x: x * float("nan"), r"expert 0 has global scale \[nan"),
    "Inf": (2, lambda x: altered(x, (3,), float("inf")), r"expert 3 has global scale \[inf"),
    "zero": (2, lambda x: altered(x, (1,), 0.0), r"expert 1 has global scale \[0\.0"),
    "negative": (2, lambda x: altered(x, (2,), -1.0), r"expert 2 has .* in 2\^-126\.\.2\^116"),
}  # fmt: skip
# Those that only reading the data shows.
DAMAGED_DATA = {
    "NaN block": (1, lambda x: altered(x, (3, 5, 1), 0x7F), "expert 3 has a block scale that is"),
    "negative block": (1, lambda x: altered(x, (2, 63, 3), 0xB8), "expert 2 has a block scale"),
}


@pytest.mark.parametrize("name", [*DAMAGE, *DAMAGED_DATA])
def test_a_damaged_part_is_named_with_file_and_reason(
    name: str, spelling: str, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    """By every plan, and by a conversion, which leaves no file that it was in."""
    which, damage, reason = (DAMAGE | DAMAGED_DATA)[name]
    tensors, _ = tensors_in(spelling, plain)
    part = W13 + PARTS[spelling][which]
    after = damage(tensors.pop(part))
    if after is not None:
        tensors[part] = after
    bad, out = tmp_path / "bad", tmp_path / "out"
    bad.mkdir()
    save_file(tensors, bad / SINGLE)
    for experts in (None, "nvfp4", "int4"):
        with pytest.raises(CheckpointError, match=reason) as caught:
            InteractionModel.load(bad, config=CONFIG, experts=experts)
        assert caught.value.tensor == part
        assert caught.value.file == (bad if after is None else bad / SINGLE)
        with pytest.raises(CheckpointError, match=reason):
            convert_checkpoint(bad, out / str(experts), CONFIG, experts=experts)
        if name in DAMAGE:
            assert not (out / str(experts)).exists()
        else:
            assert not (out / str(experts) / f"layer-00{PACKED_LAYER}.safetensors").exists()


def test_gate_and_up_have_one_global_scale(plain: dict[str, Tensor], tmp_path: Path) -> None:
    tensors, _ = tensors_in("compressed-tensors", plain)
    name = W13 + ".weight_global_scale"
    tensors[name] = altered(tensors[name], (2, 1), 3.0)
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="expert 2 has other global scales for gate and up"):
        InteractionModel.load(tmp_path, config=CONFIG)


@pytest.mark.parametrize(
    ("change", "tensor", "reason"),
    [
        (lambda t, x: t.update({W2 + ".scale3": x[W2]}), W2 + ".scale3", "unknown to this"),
        (lambda t, x: t.update({W2: x[W2]}), None, "unknown to this model's configuration"),
        (
            lambda t, x: t.update({"model.llm.unembed.weight": x[W2].to(torch.uint8)[0]}),
            "model.llm.unembed.weight",
            "expected",
        ),
        (
            lambda t, x: t.update({W2: t[W2].to(torch.int32)}),
            W2,
            r"has shape \(4, 64, 16\), expected \(4, 64, 32\)",
        ),
    ],
    ids=["another part", "scales of plain experts", "another matrix", "words"],
)
def test_nothing_else_is_taken_for_nvfp4(
    change: Callable, tensor: str | None, reason: str, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    tensors, _ = tensors_in("published", plain)
    change(tensors, plain)
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=reason) as caught:
        InteractionModel.load(tmp_path, config=CONFIG)
    assert tensor is None or caught.value.tensor == tensor


@pytest.mark.gpu
@pytest.mark.parametrize("experts", ["nvfp4", "int4", None])
def test_gpu_reads_the_same_bits(
    experts: str | None, written: tuple[Path, dict[str, Tensor]]
) -> None:
    names: dict[str, Any] = {"config": CONFIG, "dtype": torch.bfloat16, "experts": experts}
    here = experts_of(InteractionModel.load(written[0], **names))
    there = experts_of(InteractionModel.load(written[0], device="cuda", **names))
    for ours, theirs in ((there.w13, here.w13), (there.w2, here.w2)):
        assert ours.data.is_cuda
        assert_bitwise(ours.data.cpu(), theirs.data)
