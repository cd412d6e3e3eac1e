from __future__ import annotations

import wave
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from tml_kernels.ops.dmel import DMEL_20HZ, DMEL_40HZ, DmelSpec, dmel, dmel_levels
from tml_kernels.ops.dmel.cases import BENCH, EDGE, MODEL, SMALL, Case, speech_like
from tml_kernels.ops.dmel.configs import SPECTRUM, SpectrumConfig
from tml_kernels.ops.dmel.constants import level_centres
from tml_kernels.ops.dmel.kernel import launch_dmel, launch_dmel_levels
from tml_kernels.ops.dmel.reference import (
    dmel_embed_ref,
    dmel_levels_ref,
    log_mel_ref,
    quantise_ref,
)
from tml_kernels.testing import assert_bitwise, assert_matches, randn

Levels = Callable[[Tensor, Tensor, Tensor, DmelSpec], Tensor]
PRESETS = [pytest.param(DMEL_20HZ, id="20hz"), pytest.param(DMEL_40HZ, id="40hz")]
DMEL_25HZ = replace(DMEL_20HZ, window=1280, fft=1280, hop=640)  # what 80 and 160 ms ticks take


# The interpreter pays for every tile, whatever its size: with these a second of sound takes seconds
# and not minutes. The tiles that ship run on a small spec, on one frame of each, and on a GPU.
LARGE_TILES = SpectrumConfig(block_r=32, block_q=512, block_k=512, num_warps=4, num_stages=1)


def tiles(spec: DmelSpec, device: torch.device) -> SpectrumConfig:
    return LARGE_TILES if device.type == "cpu" and spec != SMALL else SPECTRUM


def ints(values: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def kernel_dmel(inputs: dict) -> tuple[Tensor, Tensor]:
    pcm, table, spec = inputs["pcm_S_W"], inputs["table_V_D"], inputs["spec"]
    shape = (pcm.shape[0], pcm.shape[1] // spec.hop)
    work = pcm.new_empty(*shape, spec.num_bins)
    levels = pcm.new_empty(*shape, spec.num_bands, dtype=torch.uint8)
    out = table.new_empty(*shape, table.shape[1])
    sound = (pcm, inputs["tail_N_L"], inputs["slot_S"])
    if levels.numel():
        launch_dmel(
            *sound, table, inputs["norm_weight_D"], spec.pack(), 1e-6, work, levels, out,
            tiles(spec, pcm.device),
        )  # fmt: skip
    return out, levels


def public_levels(pcm: Tensor, tail: Tensor, slot: Tensor, spec: DmelSpec) -> Tensor:
    return dmel_levels(pcm, tail, slot, spec=spec)


def kernel_levels(pcm: Tensor, tail: Tensor, slot: Tensor, spec: DmelSpec) -> Tensor:
    shape = (pcm.shape[0], pcm.shape[1] // spec.hop)
    work = pcm.new_empty(*shape, spec.num_bins)
    levels = pcm.new_empty(*shape, spec.num_bands, dtype=torch.uint8)
    launch_dmel_levels(pcm, tail, slot, spec.pack(), work, levels, tiles(spec, pcm.device))
    return levels


PATHS = [
    pytest.param(public_levels, "cpu", id="public"),
    pytest.param(kernel_levels, None, id="kernel"),
    pytest.param(public_levels, "cuda", id="gpu", marks=pytest.mark.gpu),
]


def assert_levels(actual: Tensor, log_mel: Tensor, spec: DmelSpec) -> None:
    """The oracle's levels; the neighbour's only where log10 of the energy is within 1e-4 of their
    midpoint, four times the float32 spectrum's error on speech (2.5e-5, in float64 units)."""
    actual, log_mel = actual.cpu().long(), log_mel.cpu()
    expected = quantise_ref(log_mel, spec).long()
    centre = torch.from_numpy(level_centres(spec)).double()
    lower = torch.minimum(actual, expected)
    midpoint = (centre[lower] + centre[(lower + 1).clamp(max=spec.num_levels - 1)]) / 2
    close = ((actual - expected).abs() == 1) & ((log_mel - midpoint).abs() < 1e-4)
    wrong = (actual != expected) & ~close
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} levels are wrong"


def check(case: Case, run: Callable[[dict], tuple[Tensor, Tensor]], device: str) -> None:
    inputs = case.make_inputs(device)
    pcm, tail = inputs["pcm_S_W"].cpu(), inputs["tail_N_L"].cpu()
    slot, table = inputs["slot_S"].cpu(), inputs["table_V_D"]
    live = slot >= 0
    _, expected_tail = dmel_levels_ref(pcm, tail, slot, case.spec)
    signal = torch.cat([tail[slot[live].long()], pcm[live]], dim=1)
    out, levels = run(inputs)

    assert levels.shape == (case.num_sessions, case.num_frames, case.spec.num_bands)
    assert_bitwise(inputs["tail_N_L"], expected_tail)
    if levels[live].numel():
        assert_levels(levels[live], log_mel_ref(signal, case.spec), case.spec)
    rows = levels.cpu().flatten(0, 1)
    if rows.numel():
        tokens = dmel_embed_ref(
            rows, table.cpu(), inputs["norm_weight_D"].cpu(), num_levels=case.spec.num_levels
        ).view(out.shape)
        assert_matches(out.cpu()[live], tokens[live], dtype=case.dtype)
    assert not out.cpu()[~live].any()
    assert not levels.cpu()[~live].any()


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_public(case: Case) -> None:
    check(case, lambda inputs: dmel(**inputs), "cpu")


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_kernel(case: Case, device: str) -> None:
    check(case, kernel_dmel, device)


@pytest.mark.gpu
@pytest.mark.parametrize("case", EDGE + MODEL + BENCH, ids=str)
def test_gpu(case: Case) -> None:
    check(case, lambda inputs: dmel(**inputs), "cuda")


def test_public_rounds_tokens_once() -> None:
    check(Case(2, 2, 96, idle=(0,), dtype=torch.bfloat16), lambda inputs: dmel(**inputs), "cpu")


def transformers_levels(pcm: Tensor) -> Tensor:
    """int [F, 80] of a whole file by the public model's own front end, in its float32."""
    features = pytest.importorskip("transformers.models.inkling.feature_extraction_inkling")
    processing = pytest.importorskip("transformers.models.inkling.processing_inkling")
    extractor = features.InklingFeatureExtractor()
    log_mel = extractor(pcm.numpy(), sampling_rate=16_000, return_tensors="pt")["input_features"]
    # The three attributes of InklingProcessor that the quantiser reads, as its __init__ sets them.
    processor = SimpleNamespace(
        bin_centers=torch.linspace(-7.0, 2.0, 16, dtype=torch.float64).float(),
        dmel_min_value=-7.0,
        dmel_max_value=2.0,
    )
    return processing.InklingProcessor._extract_dmel_bins(processor, log_mel)[0]


def in_pieces(pcm: Tensor, run: Levels, spec: DmelSpec, hops: list[int], device: str) -> Tensor:
    """Levels [F, B] of one stream cut into calls of so many hops, over and over."""
    tail = torch.zeros(2, spec.tail, device=device)
    slot, pieces, at, call = ints([1], device), [], 0, 0
    while at < len(pcm):
        end = min(at + hops[call % len(hops)] * spec.hop, len(pcm))
        piece = pcm[None, at:end].contiguous().to(device)
        pieces.append(run(piece, tail, slot, spec)[0])
        at, call = end, call + 1
    return torch.cat(pieces)


def real_speech() -> Tensor:
    """float32 [480000]: the cached 30 s conversation; skips where it cannot be had."""
    media = pytest.importorskip("tml_runtime.demo.media")
    try:
        path = media.speech_path()
    except media.MediaError as error:
        pytest.skip(f"no recording: {error}")
    with wave.open(str(path)) as file:
        assert file.getparams()[:3] == (1, 2, 16_000)
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    return torch.from_numpy(samples.astype(np.float32) / 32768)


@pytest.mark.parametrize("source", ["synthetic", "real"])
def test_levels_equal_those_of_transformers(source: str) -> None:
    """Exactly, for a whole file and for 200 ms pieces of it."""
    pcm = speech_like(5 * 16_000) if source == "synthetic" else real_speech()
    expected = transformers_levels(pcm)
    for hops in ([len(pcm) // 800], [4]):
        levels = in_pieces(pcm, public_levels, DMEL_20HZ, hops, "cpu")
        assert_bitwise(levels.int(), expected)
    assert expected.unique().numel() >= 8  # loud and soft bands, not one constant


@pytest.mark.parametrize("place", [None, pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("spec", PRESETS)
def test_kernel_has_no_other_level_on_speech(spec: DmelSpec, place: str | None, device: str):
    """The kernel's float32 spectrum flips no level of this clip. (Of the 30 s recording, none of
    48,000 at 20 Hz and none of 96,000 at 40 Hz, in the interpreter.)"""
    device = place or device
    torch.manual_seed(0)  # this clip, whatever the test's own seed
    pcm = speech_like(16_000 if place is None else 30 * 16_000)
    expected = in_pieces(pcm, public_levels, spec, [len(pcm) // spec.hop], "cpu")
    levels = in_pieces(pcm, kernel_levels, spec, [len(pcm) // spec.hop], device)
    assert int((levels.cpu() != expected).sum()) == 0


@pytest.mark.parametrize("spec", PRESETS)
def test_shipped_tiles(spec: DmelSpec, device: str) -> None:
    pcm = speech_like(spec.fft)[None]
    tail = pcm[:, : spec.tail].clone().to(device)  # moved in place
    work = torch.empty(1, 1, spec.num_bins, device=device)
    levels = torch.empty(1, 1, spec.num_bands, dtype=torch.uint8, device=device)
    hop = pcm[:, spec.tail :].contiguous().to(device)
    launch_dmel_levels(hop, tail, ints([0], device), spec.pack(), work, levels)
    assert_levels(levels, log_mel_ref(pcm, spec), spec)


@pytest.mark.parametrize("spec", [*PRESETS, pytest.param(DMEL_25HZ, id="25hz")])
def test_log_mel_is_that_of_torch_stft(spec: DmelSpec) -> None:
    """The left padding, the window's place in a longer FFT and the mel range, in float64."""
    audio_utils = pytest.importorskip("transformers.audio_utils")
    pcm = speech_like(8000).double()
    padded = torch.nn.functional.pad(pcm, (spec.tail, 0))
    stft = torch.stft(
        padded,
        spec.fft,
        hop_length=spec.hop,
        win_length=spec.window,
        window=torch.hann_window(spec.window, dtype=torch.float64),
        center=False,
        return_complex=True,
    )
    magnitude = stft.abs().square().clamp_min(1e-10).sqrt()
    filters = audio_utils.mel_filter_bank(
        spec.num_bins, 80, spec.f_min, spec.f_max, 16_000, norm="slaney", mel_scale="slaney"
    )
    expected = (magnitude.T @ torch.from_numpy(filters)).clamp_min(1e-10).log10()
    # Ours takes window and filters rounded to float32, as the source does.
    assert (log_mel_ref(padded[None], spec)[0] - expected).abs().max() < 2e-6


@pytest.mark.parametrize(("run", "place"), PATHS)
@pytest.mark.parametrize("spec", [*PRESETS, pytest.param(SMALL, id="small")])
def test_any_split_gives_the_same_levels(
    run: Levels, place: str | None, spec: DmelSpec, device: str
) -> None:
    device = place or device
    pcm = speech_like(6 * spec.hop)
    whole = in_pieces(pcm, run, spec, [6], device)
    assert_bitwise(in_pieces(pcm, run, spec, [1, 3, 2], device), whole)
    if run is public_levels:
        assert_bitwise(in_pieces(pcm, run, spec, [1], device), whole)


@pytest.mark.parametrize(("run", "place"), PATHS)
def test_alone_equals_among_others(run: Levels, place: str | None, device: str) -> None:
    device = place or device
    num_sessions, num_frames, spec = 9, 2, DMEL_40HZ
    pcm = randn(num_sessions, num_frames * spec.hop, device=device, scale=0.1)
    tail = randn(num_sessions, spec.tail, device=device, scale=0.1)
    alone = []
    for s in range(num_sessions):
        own_tail = tail[s : s + 1].clone()
        own = run(pcm[s : s + 1].contiguous(), own_tail, ints([0], device), spec)
        alone.append((own[0], own_tail[0]))
    order = [4, 0, 8, 2, 6, 1, 3, 7, 5]
    levels = run(pcm[order].contiguous(), tail, ints(order, device), spec)
    for row, s in enumerate(order):
        assert_bitwise(levels[row], alone[s][0])
        assert_bitwise(tail[s], alone[s][1])


@pytest.mark.parametrize(("run", "place"), PATHS)
def test_nan_stays_in_its_session(run: Levels, place: str | None, device: str) -> None:
    device = place or device
    pcm = randn(2, 1600, device=device, scale=0.1)
    clean = run(pcm, torch.zeros(2, 800, device=device), ints([0, 1], device), DMEL_20HZ)
    pcm[1, 1000] = float("nan")  # in frame 1 of session 1, and in its tail from then on
    tail = torch.zeros(2, 800, device=device)
    levels = run(pcm, tail, ints([0, 1], device), DMEL_20HZ)
    assert_bitwise(levels[0], clean[0])
    assert_bitwise(levels[1, 0], clean[1, 0])
    assert not levels[1, 1].any()  # NaN takes the lowest level, as argmin does in the source
    assert tail.isnan().sum(1).tolist() == [0, 1]


@pytest.mark.parametrize("run", [public_levels, kernel_levels])
def test_silence_is_the_level_of_the_power_floor(run: Levels, device: str) -> None:
    """Magnitude 1e-5 in every bin and filters of area 1 Hz over 10 Hz bins: about -6, level 2."""
    place = "cpu" if run is public_levels else device
    levels = run(
        torch.zeros(1, 1600, device=place),
        torch.zeros(1, 800, device=place),
        ints([0], place),
        DMEL_20HZ,
    )
    assert levels.unique().tolist() == [2]


def test_a_slot_outside_the_tails_is_idle_to_the_kernel(device: str) -> None:
    tail = torch.zeros(2, 800, device=device)
    pcm = randn(2, 800, device=device)
    assert not kernel_levels(pcm, tail, ints([2, -7], device), DMEL_20HZ).any()
    assert not tail.any()


def test_out_buffers_are_used() -> None:
    inputs = Case(2, 3, 16).make_inputs("cpu")
    out, levels = torch.empty(2, 3, 16), torch.zeros(2, 3, 80, dtype=torch.uint8)
    work = torch.empty(2, 3, 801)
    given = dmel(**inputs, out_S_F_D=out, levels_S_F_B=levels, work_S_F_Q=work)
    assert given[0] is out
    assert given[1] is levels
    assert out.isfinite().all()
    assert levels.any()


def test_opcheck() -> None:
    inputs = Case(2, 2, 8, spec=SMALL).make_inputs("cpu")
    pcm, tail, slot, table, norm_weight, spec = inputs.values()
    tail = tail.nan_to_num()
    work, levels = torch.zeros(2, 2, 51), torch.zeros(2, 2, 4, dtype=torch.uint8)
    args = (pcm, tail, slot, table, norm_weight, spec.pack(), 1e-6, work, levels)
    torch.library.opcheck(torch.ops.tml_kernels.dmel.default, (*args, torch.zeros(2, 2, 8)))
    args = (pcm, tail, slot, spec.pack(), work, levels)
    torch.library.opcheck(torch.ops.tml_kernels.dmel_levels.default, args)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"pcm_S_W": torch.zeros(1600)}, ValueError, "pcm_S_W: expected 2 axes"),
        ({"pcm_S_W": torch.zeros(1, 1600).half()}, TypeError, "float16"),
        ({"pcm_S_W": torch.zeros(1, 1500)}, ValueError, "1500 samples are not a multiple"),
        ({"pcm_S_W": torch.zeros(1600, 1).T[:, ::2]}, ValueError, "contiguous"),
        ({"tail_N_L": torch.zeros(2, 799)}, ValueError, "L=799, but L=800"),
        ({"tail_N_L": torch.zeros(2, 800).double()}, TypeError, "float64"),
        ({"slot_S": torch.zeros(1, dtype=torch.int64)}, TypeError, "int64"),
        ({"slot_S": ints([0, 1])}, ValueError, "S=2, but S=1"),
        ({"slot_S": ints([2])}, ValueError, "or 0..1, got [2]"),
        ({"slot_S": ints([-2])}, ValueError, "got [-2]"),
        ({"pcm_S_W": torch.zeros(2, 800), "slot_S": ints([1, 1])}, ValueError, "named twice"),
        ({"table_V_D": torch.zeros(1279, 8)}, ValueError, "80 bands * 16 levels = 1280 rows"),
        ({"table_V_D": torch.zeros(1280, 8).double()}, TypeError, "float64"),
        ({"norm_weight_D": torch.ones(9)}, ValueError, "D=9, but D=8"),
        ({"table_V_D": torch.zeros(1280, 16385)}, ValueError, "16385"),
        ({"out_S_F_D": torch.zeros(1, 3, 8)}, ValueError, "F=3, but F=2"),
        ({"levels_S_F_B": torch.zeros(1, 2, 80)}, TypeError, "uint8"),
        ({"work_S_F_Q": torch.zeros(1, 2, 800)}, ValueError, "Q=800, but Q=801"),
        ({"spec": DMEL_40HZ}, ValueError, "L=800, but L=624"),
        ({"spec": "40 Hz"}, TypeError, "spec: expected a DmelSpec, got str"),
        ({"pcm_S_W": torch.zeros(1, 1600, requires_grad=True)}, RuntimeError, "no backward"),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    tail = randn(2, 800)
    inputs = {
        "pcm_S_W": torch.zeros(1, 1600),
        "tail_N_L": tail,
        "slot_S": ints([0]),
        "table_V_D": torch.zeros(1280, 8),
        "norm_weight_D": torch.ones(8),
    } | change
    before = tail.clone()
    with pytest.raises(error, match=words.replace("[", r"\[").replace("*", r"\*")):
        dmel(**inputs)
    assert_bitwise(tail, before)
