"""What a tick sends to the device and what comes back: two flat buffers, seen as typed tensors.

The host fills one buffer, pinned where the device is a GPU, and one copy sends it. On a CPU host
and device share the memory, and nothing is copied.
"""

# Dimension key: S session rows, T tokens of the first pass, O output steps, Z = T + (O - 1) * S
# tokens of all passes, K layer groups, X = Z tokens of each group with positions of its own,
# U changes of page lists, N slots, W samples of a tick, P patches, L frames in a group, Y patch
# side, F mel frames of a tick, B mel bands, A runs of a row: its input blocks, then its steps.

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from tml_kernels.kv_cache import CacheGroup
from tml_kernels.ops.embed_tokens import TokenKind

from .._tick import TickLayout
from .config import ModelConfig

if TYPE_CHECKING:
    from .device_tick import Runner

ALIGN = 256  # bytes: what the strictest kernel wants of a pointer
KEPT_VIEWS = 128  # shapes whose views are kept; a runtime with graphs has fewer buckets
KIND_OF = {
    "text": TokenKind.TEXT,
    "video": TokenKind.EMBEDDED,
    "audio": TokenKind.LEVELS,
    "step": TokenKind.STEP,
}

Array = TypeVar("Array", Tensor, np.ndarray)
Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Bucket(NamedTuple):
    """The shapes of a tick: session rows, tokens of the first pass over the layers, patches of
    video. A tick may run in any bucket that holds its own: what is more is padding."""

    rows: int
    tokens: int
    patches: int

    def holds(self, other: Bucket) -> bool:
        return (
            self.rows >= other.rows
            and self.tokens >= other.tokens
            and self.patches >= other.patches
        )


@dataclass(frozen=True)
class TickInputs(Generic[Array]):
    """Everything that a tick reads. Rows beyond the tick's own are idle, tokens beyond are nothing.

    Two rows of slots 3 and 1 in a bucket of four, with 6 and 5 tokens of the 20 it has:
        slot = [3, 1, -1, -1]   at = [3, 1, 0, 0]   start = [0, 6, 11, 11, 11]
        last = [5, 10, 0, 0]    said = [0, 5, 2, 4] with four slots: slots 1 and 3 take rows 1 and 0
                                of what is said, which lie behind the slots' own 0..3
    """

    slot_S: Array  # int32, -1: idle
    at_S: Array  # int64, the slot, 0 of an idle row
    start_S1: Array  # int32, prefix sums of the rows' tokens
    last_S: Array  # int64, each row's last token of the first pass
    length_O_S: Array  # int64, tokens of each row's session at the end of a pass
    kind_T: Array  # int32, a TokenKind
    index_T: Array  # int32, row of the kind's source
    row_K_Z: Array  # int64, row in a group's pool where a token's keys go, -1: nowhere
    placed_X: Array  # int64, as `RollingKVCache.write` takes them
    position_X: Array  # int64
    delta_U_4: Array  # int64
    said_N: Array  # int64, where a slot's last step is among the slots' own and then the rows
    steps_N: Array  # int64, output steps that a slot takes part in
    pcm_S_W: Array  # float32
    patch_P_L_Y_Y_3: Array  # uint8, RGB
    extent_P_2: Array  # int32, rows and columns of a patch that its frame has; no rows where all


@dataclass(frozen=True)
class TickSaid(Generic[Array]):
    """What the rows said; of idle ones anything."""

    token_S_O: Array  # int32
    mel_S_F_B: Array  # float32
    fault_S: Array  # bool
    known_S: Array  # int32, steps known before any is taken by itself; no rows without drafts


class Layout(NamedTuple):
    """Who writes where tokens lie to what is staged, and what of that stays on the host."""

    writer: TickLayout
    tokens_S_A: np.ndarray  # int64
    column_S_A: np.ndarray  # int64, where a run's first token is in the Z of row_K_Z
    position_Z: np.ndarray  # int64, in its session


@dataclass(frozen=True)
class TickShape:
    """The sizes that no tick changes."""

    kinds: tuple[TokenKind, ...]  # of a row's runs in the first pass
    num_slots: int
    num_groups: int
    num_tables: int  # groups with positions of their own
    num_keys: int
    num_steps: int
    num_samples: int
    patch: tuple[int, ...]  # [L, Y, Y, 3]
    has_extents: bool  # patches may lie partly beyond their frame
    mel: tuple[int, int]  # [F, B]
    largest: Bucket
    drafts: bool = False

    @classmethod
    def of(
        cls, config: ModelConfig, specs: Sequence[CacheGroup], slots: int, *, drafts: bool = False
    ) -> TickShape:
        layout, patch = config.layout, config.patch
        return cls(
            kinds=tuple(KIND_OF[block] for block in (*layout.blocks, "step")),
            num_slots=slots,
            num_groups=len(specs),
            num_tables=sum(spec.window is None for spec in specs),
            num_keys=slots * sum(spec.columns for spec in specs),
            num_steps=layout.num_steps,
            num_samples=layout.samples_per_tick,
            patch=(patch.frames, patch.patch, patch.patch, 3),
            has_extents=patch.extra_column,
            mel=(layout.mel_frames, layout.dmel.num_bands),
            largest=Bucket(
                slots, slots * layout.max_prefill_tokens, slots * layout.max_video_tokens
            ),
            drafts=drafts,
        )

    def inputs(self, bucket: Bucket) -> Shapes:
        rows, tokens, patches = bucket
        int32, int64, steps = torch.int32, torch.int64, self.num_steps
        all_tokens = tokens + (steps - 1) * rows
        return {
            "slot_S": (int32, (rows,)),
            "at_S": (int64, (rows,)),
            "start_S1": (int32, (rows + 1,)),
            "last_S": (int64, (rows,)),
            "length_O_S": (int64, (steps, rows)),
            "kind_T": (int32, (tokens,)),
            "index_T": (int32, (tokens,)),
            "row_K_Z": (int64, (self.num_groups, all_tokens)),
            "placed_X": (int64, (self.num_tables * all_tokens,)),
            "position_X": (int64, (self.num_tables * all_tokens,)),
            "delta_U_4": (int64, (self.num_keys, 4)),
            "said_N": (int64, (self.num_slots,)),
            "steps_N": (int64, (self.num_slots,)),
            "pcm_S_W": (torch.float32, (rows, self.num_samples)),
            "patch_P_L_Y_Y_3": (torch.uint8, (patches, *self.patch)),
            "extent_P_2": (int32, (patches if self.has_extents else 0, 2)),
        }

    def said(self, num_rows: int) -> Shapes:
        return {
            "token_S_O": (torch.int32, (num_rows, self.num_steps)),
            "mel_S_F_B": (torch.float32, (num_rows, *self.mel)),
            "fault_S": (torch.bool, (num_rows,)),
            "known_S": (torch.int32, (num_rows if self.drafts else 0,)),
        }


class TickBuffers:
    """Both buffers of one state, allocated once, large enough for every bucket up to
    `shape.largest`. For one thread, one tick at a time."""

    def __init__(self, shape: TickShape, device: torch.device) -> None:
        self.shape = shape
        self.runner: Runner | None = None  # who runs ticks in these buffers; None: op by op
        self._is_cpu = device.type == "cpu"
        size, said_size = size_of(shape.inputs(shape.largest)), size_of(shape.said(shape.num_slots))
        self._staged, self._sent = _buffer_pair(size, device)
        self._heard, self._said = _buffer_pair(said_size, device)
        self._views = functools.lru_cache(KEPT_VIEWS)(self._make_views)

    @property
    def num_bytes(self) -> int:
        return len(self._sent) + len(self._said)

    def staged(self, bucket: Bucket) -> TickInputs[np.ndarray]:
        """For the host to fill before `send`; what it does not write is of an earlier tick."""
        return self._views(bucket)[0]

    def layout(self, bucket: Bucket) -> Layout:
        """For the host: fills most of `staged`."""
        return self._views(bucket)[4]

    def stage_nothing(self, bucket: Bucket) -> None:
        """A tick whose rows are all idle: what runs on it leaves no trace in a state."""
        staged = self.staged(bucket)
        for array in vars(staged).values():
            array[...] = 0
        for array in (staged.slot_S, staged.row_K_Z, staged.placed_X, staged.delta_U_4[:, 0]):
            array[...] = -1
        staged.said_N[:] = np.arange(len(staged.said_N))

    def inputs(self, bucket: Bucket) -> TickInputs[Tensor]:
        """What was sent, on the device."""
        return self._views(bucket)[1]

    def said(self, bucket: Bucket) -> TickSaid[Tensor]:
        """For the device to fill before `receive`."""
        return self._views(bucket)[2]

    def heard(self, bucket: Bucket) -> TickSaid[np.ndarray]:
        """What was received, on the host, once the device has come that far."""
        return self._views(bucket)[3]

    def send(self, bucket: Bucket) -> None:
        """Queue one copy, of as many bytes as the bucket takes."""
        if not self._is_cpu:
            used = slice(size_of(self.shape.inputs(bucket)))
            self._sent[used].copy_(self._staged[used], non_blocking=True)

    def receive(self, bucket: Bucket) -> None:
        """Queue one copy back."""
        if not self._is_cpu:
            used = slice(size_of(self.shape.said(bucket.rows)))
            self._heard[used].copy_(self._said[used], non_blocking=True)

    def _make_views(
        self, bucket: Bucket
    ) -> tuple[
        TickInputs[np.ndarray], TickInputs[Tensor], TickSaid[Tensor], TickSaid[np.ndarray], Layout
    ]:
        if not self.shape.largest.holds(bucket):
            raise ValueError(f"{bucket} does not fit buffers made for {self.shape.largest}")
        shapes, said = self.shape.inputs(bucket), self.shape.said(bucket.rows)
        with torch.inference_mode(False):  # else they could not be used outside of it
            staged = TickInputs(*(view.numpy() for view in _views(self._staged, shapes)))
            heard = (view.numpy() for view in _views(self._heard, said))
            return (
                staged,
                TickInputs(*_views(self._sent, shapes)),
                TickSaid(*_views(self._said, said)),
                TickSaid(*heard),
                self._make_layout(staged),
            )

    def _make_layout(self, staged: TickInputs[np.ndarray]) -> Layout:
        num_rows, num_columns = len(staged.slot_S), staged.row_K_Z.shape[1]
        num_runs = len(self.shape.kinds) - 1 + self.shape.num_steps
        tokens_S_A, column_S_A = np.zeros((2, num_rows, num_runs), np.int64)
        position_Z = np.zeros(num_columns, np.int64)
        writer = TickLayout(
            self.shape.kinds,
            kind_T=staged.kind_T,
            index_T=staged.index_T,
            slot_S=staged.slot_S,
            start_S1=staged.start_S1,
            at_S=staged.at_S,
            last_S=staged.last_S,
            length_O_S=staged.length_O_S,
            said_N=staged.said_N,
            steps_N=staged.steps_N,
            tokens_S_A=tokens_S_A,
            column_S_A=column_S_A,
            position_Z=position_Z,
        )
        return Layout(writer, tokens_S_A, column_S_A, position_Z)


def size_of(shapes: Shapes) -> int:
    """Bytes of a buffer that holds all of them."""
    return _places(shapes)[-1].stop


def _places(shapes: Shapes) -> list[slice]:
    """Where each lies in its buffer, back to back on aligned addresses."""
    places, at = [], 0
    for dtype, shape in shapes.values():
        begin = -(-at // ALIGN) * ALIGN
        at = begin + dtype.itemsize * math.prod(shape)
        places.append(slice(begin, at))
    return places


def _views(flat: Tensor, shapes: Shapes) -> list[Tensor]:
    return [
        flat[place].view(dtype).view(shape)
        for place, (dtype, shape) in zip(_places(shapes), shapes.values(), strict=True)
    ]


def _buffer_pair(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The host's and the device's, uint8. On a CPU pages of it take memory once they are used."""
    if device.type == "cpu":
        flat = torch.from_numpy(np.zeros(size, np.uint8))
        return flat, flat
    host = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return host, torch.zeros(size, dtype=torch.uint8, device=device)
