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
    num_rows = len(tick.slot_S)
    rows = [row for row, slot in enumerate(tick.slot_S.tolist()) if slot >= 0]
    if not rows:
        return _quiet(config, num_rows, {})
    asked = tick.of_rows(rows)
    count_S_R = asked.counts(config)
    needed = shapes_of(config, count_S_R)
    heard = runner.begin(asked, needed)
    if heard is not asked:
        count_S_R = heard.counts(config)
        needed = shapes_of(config, count_S_R)
    shed = {rows[at]: count for at, count in asked.frames_beyond(heard).items()}
    slots, classes = heard.slot_S.tolist(), classes_of(config.layout.blocks)
    refused = state.reserve_all(slots, classes, count_S_R)
    if refused:
        left = [at for at in range(len(rows)) if at not in refused]
        refused = {rows[at]: error for at, error in refused.items()}
        if not left:
            return _quiet(config, num_rows, refused)
        heard, count_S_R = heard.of_rows(left), count_S_R[left]
        rows, slots = [rows[at] for at in left], [slots[at] for at in left]
        needed = shapes_of(config, count_S_R)
    try:
        bucket = runner.choose(needed)
        heard.fill(state, count_S_R, bucket)
        fill_passes(state, slots, bucket)
        stage_ns = now_ns() - begin_ns
        ran = runner.run(bucket)
    except BaseException:
        state.cache.send_again()
        state.roll_back(slots)
        raise
    state.commit(slots)
    output = _quiet(config, num_rows, refused)
    output.stage_ns.update(stage=stage_ns, **ran.stage_ns)
    for page_class, count in zip(classes, count_S_R.sum(0).tolist(), strict=True):
        output.tokens[page_class.value] += count
    output.kv_pages[:] = state.kv_pages(slots)
    output.kv_dropped[:] = state.take_dropped()
    said = state.buffers.heard(bucket)
    live = slice(None) if len(rows) == num_rows else rows  # a slice takes no time
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
        shed=shed,
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
    config = state.config
    count_S_R = tick.counts(config)
    bucket = shapes_of(config, count_S_R)
    tick.fill(state, count_S_R, bucket)
    state.buffers.send(bucket)
    inputs = state.buffers.inputs(bucket)
    x_T_D = frontend.embed_tick(state, inputs)
    start_S1 = inputs.start_S1.clone()
    wait(state.device)  # before the buffers are another tick's
    return x_T_D, start_S1


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
