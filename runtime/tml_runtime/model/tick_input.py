"""What one tick brings, and how the host lays it out for the device."""

# Dimension key: S session rows, R runs of a row (its input blocks, then its output steps),
# T tokens, W samples of a tick, P patches, L frames in a group, H_W_3 rows and columns of an RGB
# frame.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tml_kernels._dims import Dims

from .._tick import cut_patches
from .backbone import check_slots
from .buffers import Bucket, TickInputs
from .config import ModelConfig
from .state import ModelState

Groups = Sequence[Sequence[np.ndarray]]  # of frames [height, width, 3]
Frames = Tensor | np.ndarray | Groups
HOST = torch.device("cpu")
UINT8 = np.dtype(np.uint8)  # text is slow to compare


@dataclass(frozen=True)
class TickInput:
    """What one tick brings, on the host. Row s of everything is the session in slot `slot_S[s]`.

    slot: int32, -1 idle. pcm: float32, the samples of one tick, zeros where none came. missing:
    bool, something of this tick was lost; the session is told so by a token before its text.
    frames: per row None or uint8 [groups, frames, height, width, 3], RGB, in one piece or, for
    each group, its frames [height, width, 3] one by one. text: per row token ids. frames and text
    may be left empty when no row has any.
    """

    slot_S: Tensor
    pcm_S_W: Tensor
    missing_S: Tensor
    frames: Sequence[Frames | None] = field(default=())
    text: Sequence[Sequence[int]] = field(default=())

    def check(self, config: ModelConfig, state: ModelState) -> None:
        """TypeError or ValueError naming what does not fit."""
        layout = config.layout
        dims = Dims(W=layout.samples_per_tick)
        dims.check(slot_S=self.slot_S, dtype=torch.int32, device=HOST)
        dims.check(pcm_S_W=self.pcm_S_W, dtype=torch.float32, device=HOST)
        dims.check(missing_S=self.missing_S, dtype=torch.bool, device=HOST)
        check_slots(config, state, self.slot_S.tolist())
        for name, rows in {"frames": self.frames, "text": self.text}.items():
            if len(rows) not in (0, dims["S"]):
                raise ValueError(f"{name}: {len(rows)} rows, but S={dims['S']}")
        for row, frames in enumerate(self.frames):
            if frames is not None:
                _check_frames(config, f"frames[{row}]", frames)
        for row, ids in enumerate(self.text):
            if len(ids) == 0:
                continue
            check_ids(config, f"text[{row}]", ids)
            if len(ids) > layout.max_text_tokens:
                raise ValueError(
                    f"text[{row}]: {len(ids)} tokens, a tick takes {layout.max_text_tokens}"
                )

    def counts(self, config: ModelConfig) -> np.ndarray:
        """int64 [S, R] tokens that each row appends, of the classes `passes.classes_of`."""
        blocks = config.layout.blocks
        count_S_R = np.empty((len(self.slot_S), len(blocks) + 1), np.int64)
        count_S_R[:] = config.layout.quiet_tokens
        text, video = blocks.index("text"), blocks.index("video")
        count_S_R[:, text] += self.missing_S.numpy()
        for row, ids in enumerate(self.text):
            if len(ids) > 0:
                count_S_R[row, text] += len(ids)
        for row, frames in enumerate(self.frames):
            if frames is not None:
                count_S_R[row, video] = self.num_patches(config, row)
        return count_S_R

    def of_rows(self, rows: Sequence[int]) -> TickInput:
        """With these rows alone, in ascending order; itself where they are all."""
        if len(rows) == len(self.slot_S):
            return self
        return TickInput(
            self.slot_S[rows],
            self.pcm_S_W[rows],
            self.missing_S[rows],
            [self.frames[row] for row in rows] if self.frames else (),
            [self.text[row] for row in rows] if self.text else (),
        )

    def frames_beyond(self, less: TickInput) -> dict[int, int]:
        """By row, frames of this tick that one without the video of some rows lacks."""
        if less is self:
            return {}
        return {
            row: sum(len(group) for group in frames)
            for row, (frames, kept) in enumerate(zip(self.frames, less.frames, strict=True))
            if frames is not None and kept is None
        }

    def num_patches(self, config: ModelConfig, row: int) -> int:
        frames = self.frames[row] if self.frames else None
        if frames is None or len(frames) == 0:
            return 0
        patch_rows, patch_columns = config.patch.grid(*frames[0][0].shape[:2])
        return len(frames) * patch_rows * patch_columns

    def fill(self, state: ModelState, count_S_R: np.ndarray, bucket: Bucket) -> None:
        """Stage the rows' tokens, sound and patches in the bucket, back to back; none is idle.
        count: of each, as `counts` has it."""
        staged, num_patches = state.buffers.staged(bucket), 0
        for row, frames in enumerate(self.frames):
            if frames is not None:
                num_patches += self._fill_patches(state.config, row, staged, num_patches)
        layout = state.buffers.layout(bucket)
        layout.writer.fill(self.slot_S.tolist(), count_S_R, self._all_ids(state.config))
        staged.pcm_S_W[: len(self.slot_S)] = self.pcm_S_W.numpy()

    def _all_ids(self, config: ModelConfig) -> list[int]:
        """Text of all rows, one behind another."""
        ids: list[int] = []
        for row, missing in enumerate(self.missing_S.tolist()):
            if missing:
                ids.append(config.vocab.missing)
            if self.text:
                ids += self.text[row]
        return ids

    def _fill_patches(
        self, config: ModelConfig, row: int, staged: TickInputs[np.ndarray], first: int
    ) -> int:
        """Cut a row's frames; groups, then patch rows, then patch columns. Returns how many."""
        num_patches = self.num_patches(config, row)
        if num_patches == 0:
            return 0
        frames = self.frames[row]
        assert frames is not None
        groups = frames.cpu().numpy() if isinstance(frames, Tensor) else frames
        pictures = [np.ascontiguousarray(frame_H_W_3) for group in groups for frame_H_W_3 in group]
        height, width, _ = pictures[0].shape
        rows, columns = config.patch.grid(height, width)
        part = slice(first, first + num_patches)
        if config.patch.extra_column:
            side, sizes = config.patch.patch, (height, width)
            ends = [np.minimum(side, size - np.arange(0, size + side, side)) for size in sizes]
            extents = np.stack(np.meshgrid(ends[0][:rows], ends[1][:columns], indexing="ij"), -1)
            staged.extent_P_2[part].reshape(-1, rows, columns, 2)[:] = extents
        cut_patches(pictures, columns, staged.patch_P_L_Y_Y_3[part])
        return num_patches


def check_ids(config: ModelConfig, name: str, ids: Sequence[int]) -> None:
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
            raise TypeError(f"{name}: expected token ids, got {token!r}")
        if not 0 <= token < config.vocab.num_valid:
            raise ValueError(f"{name}: id {token} is not in 0..{config.vocab.num_valid - 1}")


def _check_frames(config: ModelConfig, name: str, frames: Frames) -> None:
    shape, length = _shape_of(name, frames), config.patch.frames
    if len(shape) != 5 or shape[1] != length or shape[4] != 3:
        raise ValueError(f"{name}: expected [n, {length}, height, width, 3], got {shape}")
    rows, columns = config.patch.grid(shape[2], shape[3])
    tokens, limit = shape[0] * rows * columns, config.layout.max_video_tokens
    if tokens > limit:
        raise ValueError(f"{name}: {shape} is {tokens} tokens, a tick takes {limit}")


def _shape_of(name: str, frames: Frames) -> tuple[int, ...]:
    """As if they were in one piece."""
    if isinstance(frames, (Tensor, np.ndarray)):
        _check_pixels(name, frames)
        return tuple(frames.shape)
    groups = frames if isinstance(frames, Sequence) else ()
    parts = [part for group in groups if isinstance(group, Sequence) for part in group]
    if not parts or not all(isinstance(part, np.ndarray) for part in parts):
        kind = type(frames).__name__
        raise TypeError(f"{name}: expected a tensor, an array or groups of arrays, got {kind}")
    for part in parts:
        _check_pixels(name, part)
    lengths, shapes = {len(group) for group in groups}, {part.shape for part in parts}
    if len(lengths) > 1 or len(shapes) > 1:
        raise ValueError(f"{name}: groups of {lengths} frames of {shapes}: expected one size")
    return (len(groups), *lengths, *parts[0].shape)


def _check_pixels(name: str, array: Tensor | np.ndarray) -> None:
    if array.dtype != (torch.uint8 if isinstance(array, Tensor) else UINT8):
        raise TypeError(f"{name}: expected uint8, got {array.dtype}")
