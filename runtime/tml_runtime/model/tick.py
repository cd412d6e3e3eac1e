"""A whole tick: the host lays out what came and where keys go, then the device runs on that."""

# Dimension key: S session rows, R runs of a row (its input blocks, then its output steps),
# T tokens, D model width, K output steps, B mel bands.

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tml_kernels.kv_cache import CacheError

from .._tick import now_ns
from .buffers import Bucket
from .config import ModelConfig
from .device_tick import Runner, wait
from .frontend import Frontend
from .output import TickOutput
from .passes import classes_of, fill_passes
from .state import ModelState
from .tick_input import TickInput


def run_tick(state: ModelState, tick: TickInput, runner: Runner) -> TickOutput:
    """A whole tick: reserve, stage, run, wait, commit.

    Raises TypeError or ValueError before anything is changed; whatever else raises, the sessions
    are as they were.
    """
    begin_ns = now_ns()
    config = state.config
    tick.check(config, state)
    slots = tick.slot_S.tolist()
    rows = [row for row, slot in enumerate(slots) if slot >= 0]
    if not rows:
        return _quiet(config, len(slots), {})
    count_S_R = tick.counts(config)
    heard = runner.begin(tick, shapes_of(config, count_S_R[rows]))
    if heard is not tick:
        count_S_R = heard.counts(config)
    refused = _reserve(state, slots, rows, count_S_R)
    rows = [row for row in rows if row not in refused]
    if not rows:
        return _quiet(config, len(slots), refused)
    live_slots, count_S_R = [slots[row] for row in rows], count_S_R[rows]
    try:
        bucket = runner.choose(shapes_of(config, count_S_R))
        heard.fill(state, rows, count_S_R, bucket)
        fill_passes(state, live_slots, bucket)
        stage_ns = now_ns() - begin_ns
        ran = runner.run(bucket)
    except BaseException:
        state.cache.send_again()
        state.roll_back(live_slots)
        raise
    state.commit(live_slots)
    output = _quiet(config, len(slots), refused)
    output.stage_ns.update(stage=stage_ns, **ran.stage_ns)
    for page_class, count in zip(
        classes_of(config.layout.blocks), count_S_R.sum(0).tolist(), strict=True
    ):
        output.tokens[page_class.value] += count
    output.kv_pages[:] = state.kv_pages(live_slots)
    output.kv_dropped[:] = state.take_dropped()
    said = state.buffers.heard(bucket)
    live = slice(None) if len(rows) == len(slots) else rows  # a slice takes no time
    output.token_S_K.numpy()[live] = said.token_S_O[: len(rows)]
    output.mel_S_K_B.numpy()[live] = said.mel_S_F_B[: len(rows)]
    output.fault_S.numpy()[live] = said.fault_S[: len(rows)]
    passes, drafts, kept = config.layout.num_steps, 0, 0
    if state.num_drafts:
        drafts = state.num_drafts * len(rows)
        kept = int(said.known_S[: len(rows)].sum()) - 2 * len(rows)
        passes = 2 if kept == drafts else passes
    return replace(
        output,
        bucket=bucket,
        gpu_ns=ran.gpu_ns,
        shed={} if heard is tick else tick.frames_beyond(heard),
        passes=passes,
        drafts=drafts,
        drafts_kept=kept,
    )


def shapes_of(config: ModelConfig, count_S_R: np.ndarray) -> Bucket:
    """Of live rows that append so much."""
    later_steps = config.layout.num_steps - 1  # which have passes of their own
    count_R = count_S_R.sum(0).tolist()
    patches = count_R[config.layout.blocks.index("video")]
    return Bucket(len(count_S_R), sum(count_R) - later_steps * len(count_S_R), patches)


def embed_rows(frontend: Frontend, state: ModelState, tick: TickInput) -> tuple[Tensor, Tensor]:
    """(x_T_D, start_S1) of a tick whose rows are all live: what its first pass over the layers
    takes. Advances the audio tails and nothing else. Waits for the device."""
    config, rows = state.config, list(range(len(tick.slot_S)))
    count_S_R = tick.counts(config)
    bucket = shapes_of(config, count_S_R)
    tick.fill(state, rows, count_S_R, bucket)
    state.buffers.send(bucket)
    inputs = state.buffers.inputs(bucket)
    x_T_D = frontend.embed_tick(state, inputs)
    start_S1 = inputs.start_S1.clone()
    wait(state.device)  # before the buffers are another tick's
    return x_T_D, start_S1


def _reserve(
    state: ModelState, slots: list[int], rows: list[int], count_S_R: np.ndarray
) -> dict[int, CacheError]:
    """Room for what the rows append; those for which there is none, and why."""
    classes = classes_of(state.config.layout.blocks)
    refused = state.reserve_all([slots[row] for row in rows], classes, count_S_R[rows])
    return {rows[at]: error for at, error in refused.items()}


def _quiet(config: ModelConfig, num_rows: int, refused: dict[int, CacheError]) -> TickOutput:
    """What idle rows say, and those that were refused."""
    layout = config.layout
    mel = (num_rows, layout.mel_frames, layout.dmel.num_bands)
    fault_S = np.zeros(num_rows, np.bool_)
    fault_S[list(refused)] = True
    return TickOutput(
        torch.from_numpy(np.full((num_rows, layout.num_steps), -1, np.int32)),
        torch.from_numpy(np.full(mel, layout.dmel.level_min, np.float32)),
        torch.from_numpy(fault_S),
        {"stage": 0},
        refused=refused,
    )
