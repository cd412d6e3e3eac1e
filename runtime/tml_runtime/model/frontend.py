"""The input side of a tick: text, pictures and sound of every session as one ragged block."""

# Dimension key: S session rows, T tokens, D model width, W samples of a tick, N frame groups,
# L frames in a group, Y and X height and width of a frame, F mel frames of an output step,
# B mel bands, K blocks of a row, P embedded patches, A dMel frames of all rows.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tml_kernels._dims import Dims
from tml_kernels.kv_cache import PageClass
from tml_kernels.ops.dmel import dmel_embed, dmel_levels
from tml_kernels.ops.embed_tokens import TokenKind, embed_tokens
from tml_kernels.ops.patch_embed import patch_embed
from tml_kernels.ops.rms_norm import rms_norm

from .backbone import check_slots
from .config import ModelConfig
from .state import ModelState, Run
from .weights import ModelWeights

Frames = Tensor | np.ndarray
CLASS_OF = {"text": PageClass.TEXT, "video": PageClass.VIDEO, "audio": PageClass.AUDIO}
KIND_OF = {
    "text": TokenKind.TEXT,
    "video": TokenKind.EMBEDDED,
    "audio": TokenKind.LEVELS,
    "step": TokenKind.STEP,
}


@dataclass(frozen=True)
class TickInput:
    """What one tick brings. Row s of everything is the session in state slot `slot_S[s]`.

    slot: int32, -1 idle. pcm: float32, the samples of one tick, zeros where none came. missing:
    bool, something of this tick was lost; the session is told so by a token before its text.
    frames: per row None or uint8 [groups, frames, height, width, 3], RGB. text: per row token ids.
    frames and text may be left empty when no row has any.
    """

    slot_S: Tensor
    pcm_S_W: Tensor
    missing_S: Tensor
    frames: Sequence[Frames | None] = field(default=())
    text: Sequence[Sequence[int]] = field(default=())

    def check(self, config: ModelConfig, state: ModelState) -> None:
        """TypeError or ValueError naming what does not fit. Reads slots and ids on the host."""
        layout, device = config.layout, state.device
        dims = Dims(W=layout.samples_per_tick)
        dims.check(slot_S=self.slot_S, dtype=torch.int32, device=device)
        dims.check(pcm_S_W=self.pcm_S_W, dtype=torch.float32, device=device)
        dims.check(missing_S=self.missing_S, dtype=torch.bool, device=device)
        check_slots(config, state, self.slot_S.tolist())
        for name, rows in {"frames": self.frames, "text": self.text}.items():
            if len(rows) not in (0, dims["S"]):
                raise ValueError(f"{name}: {len(rows)} rows, but S={dims['S']}")
        for row, frames in enumerate(self.frames):
            if frames is not None:
                _check_frames(config, f"frames[{row}]", frames)
        for row, ids in enumerate(self.text):
            check_ids(config, f"text[{row}]", ids)
            if len(ids) > layout.max_text_tokens:
                raise ValueError(
                    f"text[{row}]: {len(ids)} tokens, a tick takes {layout.max_text_tokens}"
                )

    def live_rows(self) -> list[int]:
        return [row for row, slot in enumerate(self.slot_S.tolist()) if slot >= 0]

    def runs(self, config: ModelConfig) -> list[list[Run]]:
        """What each row appends: its input blocks, then its output steps. Of a tick that `select`
        made."""
        blocks = []
        for lost, ids, frames in zip(self.missing_S.tolist(), self.text, self.frames, strict=True):
            groups = 0 if frames is None else len(frames)
            per_group = 0
            if frames is not None and groups > 0:
                patch_rows, patch_columns = config.patch.grid(frames.shape[2], frames.shape[3])
                per_group = patch_rows * patch_columns
            counts = {
                "text": len(ids) + bool(lost),
                "video": groups * per_group,
                "audio": config.layout.audio_tokens,
            }
            row = [(CLASS_OF[block], counts[block]) for block in config.layout.blocks]
            blocks.append([*row, (PageClass.REPLY, config.layout.num_steps)])
        return blocks

    def select(self, rows: list[int]) -> TickInput:
        """Those rows alone, with frames and text filled in for each."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.slot_S.device)
        return TickInput(
            slot_S=self.slot_S[index],
            pcm_S_W=self.pcm_S_W[index],
            missing_S=self.missing_S[index],
            frames=[self.frames[row] if self.frames else None for row in rows],
            text=[self.text[row] if self.text else () for row in rows],
        )


class Frontend:
    """Turns token ids, frames and samples into tokens of the backbone."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config = config
        self.weights = weights

    def embed_text(self, ids_T: Tensor) -> Tensor:
        """[T, D] of int64 token ids, which must be in range."""
        rows_T_D = self.weights.embed_V_D[ids_T]
        return rms_norm(rows_T_D, self.weights.embed_norm_D, eps=self.config.norm_eps)

    def embed_levels(self, levels_T_B: Tensor) -> Tensor:
        """[T, D] of dMel frames given as uint8 levels."""
        return dmel_embed(
            levels_T_B,
            self.weights.audio_table_Y_D,
            self.weights.audio_norm_D,
            num_levels=self.config.layout.dmel.num_levels,
            eps=self.config.norm_eps,
        )

    def embed_frames(self, frames_N_L_Y_X_3: Tensor) -> Tensor:
        """[T, D] of uint8 frame groups: groups, then patch rows, then patch columns."""
        return patch_embed(
            frames_N_L_Y_X_3, self.weights.patch, spec=self.config.patch, eps=self.config.norm_eps
        )

    def embed_step(self, token_S: Tensor, levels_S_F_B: Tensor) -> Tensor:
        """[S, D], the input of an output step: what the step before said, in both its forms."""
        row_S = torch.arange(len(token_S), dtype=torch.int32, device=token_S.device)
        kind_S = torch.full_like(row_S, TokenKind.STEP)
        return self._embed(kind_S, row_S, token_N=token_S, levels_N_F_B=levels_S_F_B)

    def embed_tick(self, state: ModelState, tick: TickInput) -> tuple[Tensor, Tensor]:
        """(x_T_D, start_S1) of live rows: each row's input blocks, then its first output step.

        The first step's input is known before the tick runs, it is what the session said last; so
        the step is part of the same pass. Advances the audio tails and nothing else.
        """
        rows = {"text": self._text(tick)}
        x_P_D, rows["video"] = self._video(tick)
        levels_S_F_B = dmel_levels(
            tick.pcm_S_W, state.tail_N_W, tick.slot_S, spec=self.config.layout.dmel
        )
        frames = np.arange(levels_S_F_B.shape[0] * levels_S_F_B.shape[1])
        rows["audio"] = list(frames.reshape(levels_S_F_B.shape[:2]))
        rows["step"] = [np.array([slot]) for slot in tick.slot_S.tolist()]
        start_S1, kind_T, index_T = _describe(
            rows, (*self.config.layout.blocks, "step"), tick.slot_S.device
        )
        x_T_D = self._embed(
            kind_T,
            index_T,
            levels_A_B=levels_S_F_B.flatten(0, 1),
            x_P_D=x_P_D,
            token_N=state.token_N,
            levels_N_F_B=state.levels_N_F_B,
        )
        return x_T_D, start_S1

    def _embed(self, kind_T: Tensor, index_T: Tensor, **sources: Tensor | None) -> Tensor:
        return embed_tokens(
            kind_T,
            index_T,
            self.weights.embed_V_D,
            self.weights.embed_norm_D,
            self.weights.audio_table_Y_D,
            self.weights.audio_norm_D,
            num_levels=self.config.layout.dmel.num_levels,
            eps=self.config.norm_eps,
            **sources,
        )

    def _text(self, tick: TickInput) -> list[np.ndarray]:
        """Each row's token ids."""
        marker = (self.config.vocab.missing,)
        missing = tick.missing_S.tolist()
        return [
            np.array((*marker, *ids) if lost else ids, np.int64)
            for lost, ids in zip(missing, tick.text, strict=True)
        ]

    def _video(self, tick: TickInput) -> tuple[Tensor | None, list[np.ndarray]]:
        """Embedded patches of all rows, and each row's share of them."""
        by_size: dict[torch.Size, list[tuple[int, Tensor]]] = {}
        for row, frames in enumerate(tick.frames):
            if frames is not None and len(frames) > 0:
                group = _as_tensor(frames, tick.slot_S.device)
                by_size.setdefault(group.shape[1:], []).append((row, group))
        share = [np.arange(0)] * len(tick.frames)
        embedded, offset = [], 0
        for rows in by_size.values():  # sessions with frames of one size share a call
            embedded.append(self.embed_frames(torch.cat([group for _, group in rows])))
            per_group = len(embedded[-1]) // sum(len(group) for _, group in rows)
            for row, group in rows:
                share[row] = np.arange(offset, offset + len(group) * per_group)
                offset += len(share[row])
        return (torch.cat(embedded) if embedded else None), share


def _describe(
    rows: dict[str, list[np.ndarray]], blocks: tuple[str, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """(start_S1, kind_T, index_T), int32: row by row its blocks' indices, in one transfer."""
    parts = [rows[block][s] for s in range(len(rows["step"])) for block in blocks]
    count_S_K = np.array([len(part) for part in parts]).reshape(-1, len(blocks))
    kind_SK = np.tile([KIND_OF[block] for block in blocks], len(count_S_K))
    kind_T, index_T = np.repeat(kind_SK, count_S_K.ravel()), np.concatenate(parts)
    end_S = np.cumsum(count_S_K.sum(1))
    packed = np.concatenate([[0], end_S, kind_T, index_T]).astype(np.int32)
    start_S1, kind_T, index_T = (
        torch.from_numpy(packed).to(device).split([len(end_S) + 1, len(kind_T), len(index_T)])
    )
    return start_S1, kind_T, index_T


def check_ids(config: ModelConfig, name: str, ids: Sequence[int]) -> None:
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
            raise TypeError(f"{name}: expected token ids, got {token!r}")
        if not 0 <= token < config.vocab.num_valid:
            raise ValueError(f"{name}: id {token} is not in 0..{config.vocab.num_valid - 1}")


def _check_frames(config: ModelConfig, name: str, frames: Frames) -> None:
    if not isinstance(frames, (Tensor, np.ndarray)):
        raise TypeError(f"{name}: expected a tensor or array, got {type(frames).__name__}")
    if str(frames.dtype).removeprefix("torch.") != "uint8":
        raise TypeError(f"{name}: expected uint8, got {frames.dtype}")
    shape, group = tuple(frames.shape), config.patch.frames
    if len(shape) != 5 or shape[1] != group or shape[4] != 3:
        raise ValueError(f"{name}: expected [n, {group}, height, width, 3], got {shape}")
    rows, columns = config.patch.grid(shape[2], shape[3])
    tokens, limit = shape[0] * rows * columns, config.layout.max_video_tokens
    if tokens > limit:
        raise ValueError(f"{name}: {shape} is {tokens} tokens, a tick takes {limit}")


def _as_tensor(frames: Frames, device: torch.device) -> Tensor:
    if isinstance(frames, np.ndarray):
        frames = torch.from_numpy(frames.copy())  # torch wants arrays it may write to
    return frames.to(device).contiguous()
