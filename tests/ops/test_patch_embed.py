from __future__ import annotations

import ast
import importlib.util
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tml_kernels.ops.patch_embed import PATCH_40, PatchSpec, PatchWeights, patch_embed
from tml_kernels.ops.patch_embed.cases import BENCH, EDGE, MODEL, TINY, Case, make_weights
from tml_kernels.ops.patch_embed.configs import (
    PRODUCTS,
    choose_product,
    kernel_why_not,
    num_slots,
    scratch_buffers,
    scratch_bytes,
    stem_why_not,
)
from tml_kernels.ops.patch_embed.kernel import launch_patch_embed
from tml_kernels.ops.patch_embed.products import _slots
from tml_kernels.ops.patch_embed.reference import divide_frames, hmlp, patch_embed_ref
from tml_kernels.testing import assert_bitwise, assert_matches, relative_l2

SMALL = PatchSpec(8, 2, (2, 2, 2), (16, 32, 64))


def op_args(inputs: dict[str, Any], out: torch.Tensor, scratch: torch.Tensor | None) -> tuple:
    """Arguments of the registered op and of the launcher."""
    spec, weights = inputs["spec"], inputs["weights"]
    return (
        inputs["frames_N_L_H_W_3"], inputs.get("extent_N_2"),
        list(weights.linears), list(weights.norms), weights.final_norm,
        list(spec.folds), spec.extra_column, list(spec.mean), list(spec.std), 1e-6, out, scratch,
    )  # fmt: skip


def launch(inputs: dict[str, Any], scratch: torch.Tensor | None = None) -> torch.Tensor:
    frames, weights = inputs["frames_N_L_H_W_3"], inputs["weights"]
    num_tokens = divide_frames(frames.cpu(), inputs["spec"]).shape[0]
    dtype = weights.linears[0].dtype
    out = torch.empty(num_tokens, len(weights.final_norm), dtype=dtype, device=frames.device)
    if out.numel():
        launch_patch_embed(*op_args(inputs, out, scratch))
    return out


def frames_of(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_public(case: Case) -> None:
    inputs = case.make_inputs("cpu")
    out = patch_embed(**inputs)
    assert out.shape == (case.num_tokens, case.model_width)
    assert_matches(out, patch_embed_ref(**inputs))


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_kernel(case: Case, device: str) -> None:
    if device == "cuda":  # the kernels' products are of 16-bit operands; the interpreter's float32
        case = replace(case, dtype=torch.bfloat16)
    inputs = case.make_inputs(device)
    assert_matches(launch(inputs), patch_embed_ref(**inputs), dtype=case.dtype)


@pytest.mark.slow
def test_kernel_of_the_public_model(device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = Case(1, 40, 40, 128, PATCH_40, dtype).make_inputs(device)
    assert_matches(launch(inputs), patch_embed_ref(**inputs), dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_gpu(case: Case, dtype: torch.dtype) -> None:
    inputs = replace(case, dtype=dtype).make_inputs("cuda")
    assert_matches(patch_embed(**inputs), patch_embed_ref(**inputs), dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", BENCH, ids=str)
def test_gpu_full_size(case: Case) -> None:
    inputs = case.make_inputs("cuda")
    assert_matches(patch_embed(**inputs), patch_embed_ref(**inputs), dtype=case.dtype)


# The image processor itself needs torchvision; its cutting does not.
def divide_to_patches(image: torch.Tensor, patch: int) -> list[torch.Tensor]:
    """transformers' function of this name, taken from its source."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "models" / "inkling" / "image_processing_inkling.py"
    tree = ast.parse(path.read_text())
    wanted = [n for n in tree.body if getattr(n, "name", "") == "divide_to_patches"]
    scope: dict[str, Any] = {}
    exec(compile(ast.Module(wanted, []), str(path), "exec"), scope)
    return scope["divide_to_patches"](image, patch)


def processed(image_H_W_3: torch.Tensor, spec: PatchSpec) -> torch.Tensor:
    """pixel_values as the image processor makes them: cut, pad with -1, rescale and normalise."""
    patches = divide_to_patches(image_H_W_3.permute(2, 0, 1), spec.patch)
    padded = [
        F.pad(p.float(), (0, spec.patch - p.shape[-1], 0, spec.patch - p.shape[-2]), value=-1.0)
        for p in patches
    ]
    scale = 1.0 / (1 / 255)  # the inverse of rescale_factor, folded into mean and std
    mean, std = (torch.tensor(values) * scale for values in (spec.mean, spec.std))
    x = torch.stack(padded).sub(mean[:, None, None]).div(std[:, None, None])
    return x[..., None].repeat(1, 1, 1, 1, 2).permute(0, 4, 2, 3, 1)


@pytest.mark.parametrize(("height", "width"), [(80, 120), (40, 40), (41, 53), (3, 39), (79, 81)])
def test_pixels_equal_the_image_processor(height: int, width: int) -> None:
    image = frames_of(height, width, 3)
    frames = torch.stack([image, image])[None]
    expected = processed(image, PATCH_40)
    spec = replace(PATCH_40, extra_column=True)
    assert_bitwise(divide_frames(frames, spec), expected)
    if height % 40 == width % 40 == 0:  # without the extra column: the same less the last of a row
        columns = width // 40
        kept = expected.unflatten(0, (-1, columns + 1))[:, :columns].flatten(0, 1)
        assert_bitwise(divide_frames(frames), kept)


@pytest.mark.parametrize(
    ("num_layers", "spec"),
    [
        (4, PATCH_40),
        (4, PatchSpec(8, 2, (2, 2, 2), (64, 64, 192))),
        (3, PatchSpec(8, 2, (2, 4), (64, 192))),
        (3, PatchSpec(6, 2, (3, 2), (64, 128))),
        (2, PatchSpec(5, 2, (5,), (128,))),
    ],
)
def test_tower_equals_transformers(num_layers: int, spec: PatchSpec) -> None:
    inkling = pytest.importorskip("transformers.models.inkling")
    config = inkling.configuration_inkling.InklingVisionConfig(
        text_hidden_size=64, patch_size=spec.patch, num_hidden_layers=num_layers
    )
    with torch.no_grad():
        tower = inkling.modeling_inkling.InklingVisionModel(config).eval()
        for parameter in tower.parameters():
            noise = torch.randn(parameter.shape)
            matrix = parameter.ndim == 2
            parameter.copy_(noise * parameter.shape[1] ** -0.5 if matrix else 1 + 0.1 * noise)
        *hidden, last = tower.encoder_layers
        weights = PatchWeights(
            tuple(layer.projection.weight for layer in (*hidden, last)),
            tuple(layer.layer_norm.weight for layer in hidden),
            tower.final_norm.weight,
        )
        frames = frames_of(2, 2, spec.patch * 2, spec.patch * 3, 3)
        expected = tower(divide_frames(frames, spec)).pooler_output[:, 0]
        assert relative_l2(patch_embed(frames, weights, spec=spec), expected) < 1e-5
        oracle = hmlp(divide_frames(frames, spec).double(), weights, spec)
    assert relative_l2(oracle, expected) < 1e-5


def test_patches_with_an_extent_are_those_of_the_frame() -> None:
    """Cut by hand to patches of one size, as a tick's frames of many sizes are: bitwise the tokens
    that the whole frame gives with the extra column, through the kernel and without."""
    extra = PatchSpec(8, 2, (2, 4), (16, 48), extra_column=True)
    spec = replace(extra, extra_column=False)
    weights = make_weights(spec, 64, "cpu")
    for height, width in ((13, 16), (3, 5), (8, 23)):
        frames = frames_of(1, 2, height, width, 3)
        rows, columns = extra.grid(height, width)
        patches = frames_of(rows * columns, 2, 8, 8, 3)  # anything where there are no pixels
        extents = []
        for n in range(rows * columns):
            y, x = n // columns * 8, n % columns * 8
            piece = frames[0, :, y : y + 8, x : x + 8]
            patches[n, :, : piece.shape[1], : piece.shape[2]] = piece
            extents.append(piece.shape[1:3])
        extent = torch.tensor(extents, dtype=torch.int32)
        cut = {"frames_N_L_H_W_3": patches, "extent_N_2": extent, "weights": weights, "spec": spec}
        whole = {"frames_N_L_H_W_3": frames, "weights": weights, "spec": extra}
        assert_bitwise(patch_embed(**cut), patch_embed(**whole))
        assert_bitwise(launch(cut), launch(whole))


def crops(frames: torch.Tensor, patch: int) -> list[torch.Tensor]:
    """Every patch of every group alone, in token order."""
    _, _, height, width, _ = frames.shape
    return [
        group[None, :, y : y + patch, x : x + patch].contiguous()
        for group in frames
        for y in range(0, height, patch)
        for x in range(0, width, patch)
    ]


@pytest.mark.parametrize("spec", [SMALL, TINY, PatchSpec(6, 2, (3, 2), (24, 40))])
def test_token_does_not_depend_on_neighbours(spec: PatchSpec) -> None:
    p, weights = spec.patch, make_weights(spec, 72, "cpu")
    frames = frames_of(3, 2, p * 3, p * 5, 3)
    together = patch_embed(frames, weights, spec=spec)
    alone = [patch_embed(crop, weights, spec=spec) for crop in crops(frames, p)]
    assert_bitwise(together, torch.cat(alone))


@pytest.mark.gpu
def test_gpu_token_does_not_depend_on_neighbours() -> None:
    """One token has the same bits in every product configuration, first and last in its call."""
    weights = make_weights(PATCH_40, 4096, "cuda", torch.bfloat16)
    frames = frames_of(300, 2, 40, 40, 3).cuda()
    together = patch_embed(frames, weights)
    for count in (1, 4, 8, 9, 16, 17, 64, 65, 128, 129, 256, 257):
        first = patch_embed(frames[:count].contiguous(), weights)
        last = patch_embed(frames[-count:].contiguous(), weights)
        assert_bitwise(first, together[:count])
        assert_bitwise(last, together[-count:])


def test_scratch_may_hold_anything(device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = Case(2, 16, 24, 72, SMALL, dtype).make_inputs(device)
    expected = launch(inputs)
    size = scratch_buffers(SMALL, 12, 72, dtype)[-1].end
    for value in (0, 127, 255):  # 255 everywhere is NaN
        scratch = torch.full((size + 5,), value, dtype=torch.uint8, device=device)
        assert_bitwise(launch(inputs, scratch), expected)
        assert (scratch[size:] == value).all()


@pytest.mark.gpu
def test_gpu_captured_call_allocates_nothing_and_replays() -> None:
    inputs = Case(2, 80, 80, 256, PATCH_40, torch.bfloat16).make_inputs("cuda")
    out = torch.empty(8, 256, dtype=torch.bfloat16, device="cuda")
    size = scratch_bytes(PATCH_40, 8, 256, torch.bfloat16)
    scratch = torch.empty(size, dtype=torch.uint8, device="cuda")
    expected = patch_embed(**inputs)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    patch_embed(**inputs, out_T_D=out, scratch_B=scratch)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        patch_embed(**inputs, out_T_D=out, scratch_B=scratch)
    out.fill_(float("nan"))
    graph.replay()
    assert_bitwise(out, expected)


def test_out_is_used_and_rounded_once() -> None:
    inputs = Case(1, 8, 16, 64, SMALL).make_inputs("cpu")
    expected = patch_embed(**inputs)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.empty(2, 64, dtype=dtype)
        assert patch_embed(**inputs, out_T_D=out) is out
        assert_bitwise(out, expected.to(dtype))


def test_sixteen_bit_weights_with_float32_norms() -> None:
    inputs = Case(1, 16, 16, 64, SMALL, torch.bfloat16).make_inputs("cpu")
    out = patch_embed(**inputs)
    assert out.dtype == torch.bfloat16
    assert_matches(out, patch_embed_ref(**inputs))


def test_opcheck() -> None:
    inputs = Case(1, 8, 16, 64, SMALL).make_inputs("cpu")
    for scratch in (None, torch.empty(8, dtype=torch.uint8)):
        args = op_args(inputs, torch.empty(2, 64), scratch)
        torch.library.opcheck(torch.ops.tml_kernels.patch_embed.default, args)


def test_cost_counts_every_layer_of_the_public_model() -> None:
    case = Case(1, 80, 40, 4096, PATCH_40, torch.bfloat16)  # two tokens
    per_token = 128 * 75 * 128 + 32 * 512 * 320 + 2 * 5120 * 4800 + 9600 * 4096
    weights = 75 * 128 + 512 * 320 + 5120 * 4800 + 9600 * 4096
    assert case.cost().flops == 2 * 2 * per_token
    assert case.cost().bytes == 2 * weights + 2 * 80 * 40 * 3 + 2 * 2 * 4096


def test_every_row_count_has_a_product_configuration() -> None:
    chosen = [choose_product(rows) for rows in (1, 16, 17, 128, 129, 512, 513, 10**6)]
    assert chosen == [config for _, config in PRODUCTS for _ in range(2)]


@pytest.mark.parametrize("features", [1, 64, 65, 128, 4096, 4800, 6144])
def test_host_and_kernel_agree_on_the_pitch_of_partial_sums(features: int) -> None:
    assert num_slots(features) == _slots(features, 64)


def test_scratch_buffers_are_aligned_and_apart() -> None:
    for spec in (PATCH_40, SMALL, PatchSpec(6, 3, (3, 2), (24, 40))):
        for tokens in (1, 3, 1024):
            buffers = scratch_buffers(spec, tokens, 72, torch.bfloat16)
            assert len(buffers) == 1 + 2 * (len(spec.folds) - 1)
            assert all(b.offset % 256 == 0 for b in buffers)
            assert all(a.end <= b.offset for a, b in pairwise(buffers))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch": 5, "folds": (5,), "widths": (128,)}, "two folds"),
        ({"patch": 40, "folds": (20, 2), "widths": (64, 64)}, "first layer is too large"),
        ({"widths": (257, 320, 64)}, "first layer is too large"),
        ({"widths": (128, 321, 64)}, "245760 bytes of shared memory"),
    ],
)
def test_towers_without_a_kernel(change: dict, words: str) -> None:
    spec = replace(PATCH_40, **change)
    reason = stem_why_not(spec)
    assert reason is not None and words in reason
    assert kernel_why_not(spec, torch.bfloat16) == reason
    assert scratch_bytes(spec, 4, 64, torch.bfloat16) == 0
    inputs = Case(1, spec.patch, spec.patch, 16, spec).make_inputs("cpu")
    with pytest.raises(ValueError, match=words):
        launch(inputs)


def test_which_dtypes_have_a_kernel() -> None:
    for spec in (PATCH_40, TINY):
        assert kernel_why_not(spec, torch.bfloat16) is None
        assert kernel_why_not(spec, torch.float16) is None
    assert "16-bit" in (kernel_why_not(PATCH_40, torch.float32) or "")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"folds": (5, 2, 2)}, r"\(5, 2, 2\).*patch=40"),
        ({"folds": ()}, r"folds=\(\)"),
        ({"folds": (-5, -2, 4)}, "-5"),
        ({"widths": (128, 320)}, r"\(128, 320\)"),
        ({"widths": (128, 0, 4800)}, "0"),
        ({"frames": 0}, "frames=0"),
        ({"std": (0.1, 0.0, 0.1)}, "0.0"),
        ({"mean": (0.1, 0.1)}, r"\(0.1, 0.1\)"),
    ],
)
def test_bad_spec(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(PATCH_40, **change)


def bad_weights(**change: Any) -> PatchWeights:
    """Weights of SMALL for width 64, where `linear1=f` replaces linears[1] by f(linears[1])."""
    weights = make_weights(SMALL, 64, "cpu")
    linears, norms, final = list(weights.linears), list(weights.norms), weights.final_norm
    for name, function in change.items():
        if name == "final":
            final = function(final)
        else:
            group = linears if name.startswith("linear") else norms
            group[int(name[-1])] = function(group[int(name[-1])])
    return PatchWeights(tuple(linears), tuple(norms), final)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"frames_N_L_H_W_3": frames_of(1, 2, 12, 16, 3)}, ValueError, "height 12 .* of 8"),
        ({"frames_N_L_H_W_3": frames_of(1, 2, 16, 12, 3)}, ValueError, "width 12 .* of 8"),
        ({"frames_N_L_H_W_3": frames_of(1, 3, 16, 16, 3)}, ValueError, "L=3, but L=2"),
        ({"frames_N_L_H_W_3": frames_of(1, 2, 16, 16, 4)}, ValueError, "3=4"),
        ({"frames_N_L_H_W_3": frames_of(2, 16, 16, 3)}, ValueError, "5 axes"),
        ({"frames_N_L_H_W_3": torch.zeros(1, 2, 16, 16, 3)}, TypeError, "torch.float32"),
        ({"frames_N_L_H_W_3": [[0]]}, TypeError, "list"),
        ({"frames_N_L_H_W_3": frames_of(1, 2, 16, 3, 16).mT}, ValueError, "contiguous"),
        ({"spec": (2, 2, 2)}, TypeError, "tuple"),
        ({"spec": PATCH_40}, ValueError, "height 16 is not a multiple of 40"),
        ({"weights": tuple(bad_weights())}, TypeError, "tuple"),
        ({"weights": bad_weights()._replace(norms=())}, ValueError, "4 linears and 3 norms"),
        ({"weights": bad_weights(linear1=lambda w: w[:-1])}, ValueError, "linear1_O_I: O=31"),
        ({"weights": bad_weights(linear2=lambda w: w[:, 1:])}, ValueError, "linear2_O_I: I=127"),
        ({"weights": bad_weights(linear3=lambda w: w[:, 1:])}, ValueError, "linear3_O_I: I=127"),
        ({"weights": bad_weights(linear3=lambda w: w[:0])}, ValueError, "D=0"),
        ({"weights": bad_weights(linear0=torch.Tensor.double)}, TypeError, "linear0.*float64"),
        ({"weights": bad_weights(linear0=torch.Tensor.bfloat16)}, TypeError, "linear0.*bfloat16"),
        ({"weights": bad_weights(norm1=lambda w: w[1:])}, ValueError, "norm1_O: O=31"),
        ({"weights": bad_weights(norm2=torch.Tensor.half)}, TypeError, "norm2_O.*float16"),
        ({"weights": bad_weights(final=lambda w: w[1:])}, ValueError, "final_norm_D: D=63"),
        ({"weights": bad_weights(final=torch.nn.Parameter)}, RuntimeError, "no backward"),
        ({"out_T_D": torch.zeros(3, 64)}, ValueError, "T=3, but T=4"),
        ({"out_T_D": torch.zeros(4, 64, dtype=torch.float64)}, TypeError, "float64"),
        ({"scratch_B": torch.zeros(8)}, TypeError, "scratch_B.*float32"),
        ({"scratch_B": torch.zeros(8, dtype=torch.uint8)[1:]}, ValueError, "1 bytes into"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], words: str) -> None:
    inputs = {
        "frames_N_L_H_W_3": frames_of(1, 2, 16, 16, 3),
        "weights": make_weights(SMALL, 64, "cpu"),
        "spec": SMALL,
    }
    with pytest.raises(error, match=words):
        patch_embed(**(inputs | change))


def test_short_scratch_is_refused() -> None:
    inputs = Case(1, 16, 16, 64, SMALL, torch.bfloat16).make_inputs("cpu")
    needed = scratch_bytes(SMALL, 4, 64, torch.bfloat16)
    assert needed > 0
    with pytest.raises(ValueError, match=f"{needed} bytes are needed, got B={needed - 1}"):
        patch_embed(**inputs, scratch_B=torch.empty(needed - 1, dtype=torch.uint8))
    patch_embed(**inputs, scratch_B=torch.empty(needed, dtype=torch.uint8))
