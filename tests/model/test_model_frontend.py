"""What the model hears, sees and reads, against transformers' input processors and by hand."""

from __future__ import annotations

import wave
from dataclasses import replace

import numpy as np
import pytest
import torch
from inkling_oracle import inkling_levels, inkling_pixels
from small_model import PATCH_8, small_config
from torch import Tensor

from tml_kernels.ops.dmel import DMEL_20HZ, dmel_levels
from tml_kernels.ops.patch_embed import PATCH_40
from tml_kernels.ops.patch_embed.reference import divide_frames
from tml_kernels.testing import assert_bitwise
from tml_runtime.demo.media import MediaError, speech_path
from tml_runtime.model import InteractionModel, ModelState, TickInput, TurnLayout
from tml_runtime.model.tick import embed_rows

CONFIG = small_config()
TICK = CONFIG.layout.samples_per_tick


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """30 s of a real conversation, float32."""
    try:
        path = speech_path(say=lambda text: None)
    except MediaError as error:
        pytest.skip(f"the recording is not cached and cannot be fetched: {error}")
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16_000, 1, 2)
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    return samples.astype(np.float32) / 32768


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_tick(slots: tuple[int, ...] = (0,), **changes: object) -> TickInput:
    rows = len(slots)
    tick = TickInput(
        slot_S=int32(*slots),
        pcm_S_W=0.1 * torch.randn(rows, TICK),
        missing_S=torch.zeros(rows, dtype=torch.bool),
        frames=[None] * rows,
        text=[()] * rows,
    )
    return replace(tick, **changes)


def random_frames(num_groups: int, height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (num_groups, 2, height, width, 3), dtype=torch.uint8)


@pytest.mark.parametrize("samples", [480_000, TICK], ids=["whole", "200ms"])
def test_levels_of_real_speech_are_exactly_those_of_transformers(
    speech: np.ndarray, samples: int
) -> None:
    expected = inkling_levels(speech).to(torch.uint8)
    tail_N_L = torch.zeros(1, DMEL_20HZ.tail)
    pieces = [
        dmel_levels(piece[None], tail_N_L, int32(0), spec=DMEL_20HZ)[0]
        for piece in torch.from_numpy(speech).split(samples)
    ]
    assert_bitwise(torch.cat(pieces), expected)
    assert expected.unique().numel() > 8  # not silence


def test_ticks_hear_the_speech_that_transformers_hears(speech: np.ndarray) -> None:
    """The tail is the slot's own, though two sessions hear different parts in one call."""
    model = InteractionModel.random(CONFIG)
    state = model.new_state(2)
    halves = [speech[: 10 * TICK], speech[200_000 : 200_000 + 10 * TICK]]
    expected = [model.embed_levels(inkling_levels(half).to(torch.uint8)) for half in halves]
    for n in range(10):
        pcm = np.stack([half[n * TICK : (n + 1) * TICK] for half in halves])
        tick = make_tick((1, 0), pcm_S_W=torch.from_numpy(pcm))
        x_T_D, start_S1 = embed_rows(model.frontend, state, tick)
        assert start_S1.tolist() == [0, 5, 10]
        for row in range(2):
            heard = x_T_D[5 * row : 5 * row + 4]
            assert_bitwise(heard, expected[row][4 * n : 4 * n + 4])


@pytest.mark.parametrize(
    ("spec", "height", "width"),
    [(PATCH_8, 16, 24), (PATCH_8, 8, 8), (PATCH_40, 80, 80), (PATCH_40, 240, 320)],
)
def test_patches_are_those_of_transformers(spec, height: int, width: int) -> None:
    """The extra column that its image processor adds is the last of each row, and dropped."""
    frames = random_frames(2, height, width)
    rows, columns = spec.grid(height, width)
    expected = inkling_pixels(frames, spec).unflatten(0, (2, rows, columns + 1))
    assert_bitwise(divide_frames(frames, spec), expected[:, :, :-1].flatten(0, 2).contiguous())


@pytest.mark.parametrize(("height", "width"), [(80, 80), (61, 95), (40, 39)])
def test_patches_with_the_extra_column(height: int, width: int) -> None:
    frames = random_frames(1, height, width)
    spec = replace(PATCH_40, extra_column=True)
    assert_bitwise(divide_frames(frames, spec), inkling_pixels(frames, spec).contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_text_video_audio_and_the_first_step(dtype: torch.dtype) -> None:
    """With the bits of its parts made by themselves, of two sizes of frames among them."""
    model = InteractionModel.random(CONFIG, dtype=dtype)
    state = model.new_state(3)
    state.token_N[:] = torch.tensor([5, 6, 7])
    state.levels_N_F_B[:] = torch.tensor([3, 4, 5], dtype=torch.uint8)[:, None, None]
    frames = [random_frames(2, 8, 16), None, random_frames(1, 8, 8)]
    text = [(1, 2, 3), (), (4,)]
    missing = torch.tensor([False, True, True])
    tick = make_tick((2, 0, 1), frames=frames, text=text, missing_S=missing)
    tails = state.tail_N_W.clone()
    x_T_D, start_S1 = embed_rows(model.frontend, state, tick)

    levels = dmel_levels(tick.pcm_S_W, tails, tick.slot_S, spec=CONFIG.layout.dmel)
    assert_bitwise(state.tail_N_W, tails)
    marker = CONFIG.vocab.missing
    ids = [[1, 2, 3], [marker], [marker, 4]]
    for row, slot in enumerate((2, 0, 1)):
        said = model.embed_text([5 + slot]) + model.embed_levels(state.levels_N_F_B[slot])
        seen = [] if frames[row] is None else [model.embed_frames(frames[row])]
        parts = [model.embed_text(ids[row]), *seen, model.embed_levels(levels[row]), said]
        assert_bitwise(x_T_D[start_S1[row] : start_S1[row + 1]], torch.cat(parts))
    assert start_S1[-1] == len(x_T_D)


@pytest.mark.parametrize(("height", "width"), [(13, 16), (8, 23), (3, 5), (16, 8)])
def test_frames_with_the_extra_column_are_cut_on_the_host(height: int, width: int) -> None:
    """With the bits of whole frames, whatever the patch before them left in the buffer."""
    model = InteractionModel.random(replace(CONFIG, patch=replace(PATCH_8, extra_column=True)))
    state, expected = model.new_state(2), random_frames(2, height, width)
    for frames in (random_frames(3, 16, 24), expected):
        tick = make_tick((0, 1), frames=[None, frames])
        x_T_D, start_S1 = embed_rows(model.frontend, state, tick)
    num_patches = 2 * -(-height // 8) * (width // 8 + 1)
    assert start_S1.tolist() == [0, 5, 5 + num_patches + 5]
    assert_bitwise(x_T_D[5 : 5 + num_patches], model.embed_frames(expected))


def test_a_step_of_several_frames_adds_them_in_order() -> None:
    layout = TurnLayout(num_steps=2, mel_frames_per_step=2)
    model = InteractionModel.random(replace(CONFIG, layout=layout), dtype=torch.bfloat16)
    token_S = int32(5, 6, 7)
    levels_S_F_B = torch.randint(16, (3, 2, 80), dtype=torch.uint8)
    x_S_D = model.frontend.embed_step(token_S, levels_S_F_B)
    expected = model.embed_text([5, 6, 7])
    for f in range(2):
        expected = expected + model.embed_levels(levels_S_F_B[:, f].contiguous())
    assert_bitwise(x_S_D, expected)


def test_block_order_is_the_layout_s() -> None:
    layout = TurnLayout(blocks=("audio", "text", "video"))
    model = InteractionModel.random(replace(CONFIG, layout=layout))
    tick = make_tick(text=[(1, 2)], frames=[random_frames(1, 8, 8)])
    x_T_D, _ = embed_rows(model.frontend, model.new_state(1), tick)
    assert_bitwise(x_T_D[4:6], model.embed_text([1, 2]))
    assert_bitwise(x_T_D[6:7], model.embed_frames(tick.frames[0]))


def test_frames_may_be_arrays_read_only_and_empty() -> None:
    model = InteractionModel.random(CONFIG)
    frames = random_frames(1, 8, 8)
    array = frames.numpy().copy()
    array.flags.writeable = False
    rows = [array, np.empty((0, 2, 16, 16, 3), np.uint8)]
    tick = make_tick((0, 1), frames=rows)
    x_T_D, start_S1 = embed_rows(model.frontend, model.new_state(2), tick)
    assert start_S1.tolist() == [0, 6, 11]
    assert_bitwise(x_T_D[:1], model.embed_frames(frames))


def test_frames_may_lie_apart_and_not_in_order() -> None:
    model = InteractionModel.random(CONFIG)
    whole = random_frames(2, 16, 24)
    wide = np.zeros((16, 30, 3), np.uint8)  # a frame within a larger one
    wide[:, 3:27] = whole[0, 0].numpy()
    upside_down = whole[0, 1].numpy()[::-1].copy()[::-1]
    groups = [(wide[:, 3:27], upside_down), tuple(frame.numpy() for frame in whole[1])]
    tick = make_tick((0, 1), frames=[groups, None])
    x_T_D, start_S1 = embed_rows(model.frontend, model.new_state(2), tick)
    assert start_S1.tolist() == [0, 12 + 5, 12 + 5 + 5]
    assert_bitwise(x_T_D[:12], model.embed_frames(whole))


@pytest.mark.parametrize(
    ("ids", "error"),
    [([100], ValueError), ([-1], ValueError), ([1.0], TypeError), ([True], TypeError)],
)
def test_ids_are_tokens(ids: list, error: type) -> None:
    with pytest.raises(error, match="ids: "):
        InteractionModel.random(CONFIG).embed_text(ids)


def picture(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


def changed(state: ModelState, before: ModelState) -> list[str]:
    tensors = {n: t for n, t in vars(state).items() if isinstance(t, Tensor)}
    return [n for n, t in tensors.items() if not torch.equal(t, getattr(before, n))]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"slot_S": int32(0, 0)}, ValueError, "slot 0 is given twice"),
        ({"slot_S": int32(0, 3)}, ValueError, "slot_S: 3"),
        ({"slot_S": torch.tensor([0, 1])}, TypeError, "slot_S: .*int64"),
        ({"slot_S": [0, 1]}, TypeError, "slot_S: .*list"),
        ({"pcm_S_W": torch.zeros(2, TICK - 1)}, ValueError, "W=3199"),
        ({"pcm_S_W": torch.zeros(1, TICK)}, ValueError, "S=1, but S=2"),
        ({"pcm_S_W": torch.zeros(2, TICK, dtype=torch.int16)}, TypeError, "int16"),
        ({"missing_S": torch.zeros(2)}, TypeError, "missing_S: .*float32"),
        ({"text": [(1,)]}, ValueError, "text: 1 rows"),
        ({"text": [(1,), (100,)]}, ValueError, r"text\[1\]: id 100"),
        ({"text": [(), (1, "a")]}, TypeError, r"text\[1\]: .*'a'"),
        ({"text": [(1,) * 65, ()]}, ValueError, r"text\[0\]: 65 tokens, a tick takes 64"),
        ({"frames": [None]}, ValueError, "frames: 1 rows"),
        ({"frames": [None, [1]]}, TypeError, r"frames\[1\]: .*list"),
        ({"frames": [None, [(1, 2)]]}, TypeError, r"frames\[1\]: .*list"),
        ({"frames": [None, 1]}, TypeError, r"frames\[1\]: .*int"),
        ({"frames": [[picture(8, 8)] * 2, None]}, TypeError, r"frames\[0\]: .*list"),
        ({"frames": [[(picture(8, 8), picture(8, 16))], None]}, ValueError, "one size"),
        ({"frames": [[(picture(8, 8),)], None]}, ValueError, r"frames\[0\]: .*\(1, 1, 8, 8, 3\)"),
        ({"frames": [[(picture(8, 8) / 1.0,) * 2], None]}, TypeError, "float64"),
        ({"frames": [None, torch.zeros(1, 2, 8, 8, 3)]}, TypeError, "float32"),
        ({"frames": [None, np.zeros((1, 2, 8, 8, 3))]}, TypeError, "float64"),
        ({"frames": [None, random_frames(1, 8, 8)[0]]}, ValueError, r"frames\[1\]: expected"),
        ({"frames": [random_frames(1, 8, 9), None]}, ValueError, "width 9 is not a multiple of 8"),
        ({"frames": [random_frames(5, 64, 64), None]}, ValueError, "320 tokens, a tick takes 256"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_tick_changes_nothing(change: dict, error: type, words: str) -> None:
    model = InteractionModel.random(CONFIG)
    state, before = model.new_state(3), model.new_state(3)
    with pytest.raises(error, match=words):
        model.tick(state, make_tick((0, 1), **change))
    assert changed(state, before) == []
