"""A whole tick: the host lays out what came and where keys go, then the device runs on that."""

# Dimension key: S session rows, T tokens, D model width, K output steps, B mel bands.

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from tml_kernels.kv_cache import CacheError

from .._tick import now_ns
from .buffers import Bucket
from .config import ModelConfig
from .device_tick import Runner, wait
from .frontend import Frontend
from .output import TickOutput
from .passes import fill_passes
from .state import ModelState, Run
from .tick_input import TickInput


def run_tick(state: ModelState, tick: TickInput, runner: Runner) -> TickOutput:
    """A whole tick: reserve, stage, run, wait, commit.

    Raises TypeError or ValueError before anything is changed; whatever else raises, the sessions
    are as they were.
    """
    begin_ns = now_ns()
    config = state.config
    tick.check(config, state)
    output = _quiet(config, len(tick.slot_S))
    heard = runner.begin(tick)
    rows, runs = _reserve(state, heard, output)
    if not rows:
        return output
    slots = tick.slot_S[rows].tolist()
    try:
        bucket = runner.choose(_shapes(config, heard, rows, runs))
        staged = state.buffers.staged(bucket)
        heard.fill(config, rows, staged)
        fill_passes(state, slots, runs, staged)
        output.stage_ns["stage"] = now_ns() - begin_ns
        ran = runner.run(bucket)
    except BaseException:
        state.roll_back(slots)
        raise
    state.commit(slots)
    for page_class, count in chain.from_iterable(runs):
        output.tokens[page_class.value] += count
    output.stage_ns.update(ran.stage_ns)
    output.kv_pages[:] = state.kv_pages(slots)
    output.kv_dropped[:] = state.take_dropped()
    said = state.buffers.heard(bucket)
    output.token_S_K[rows] = said.token_S_O[: len(rows)]
    output.mel_S_K_B[rows] = said.mel_S_F_B[: len(rows)]
    output.fault_S[rows] = said.fault_S[: len(rows)]
    shed = tick.num_frames() - heard.num_frames()
    return replace(output, bucket=bucket, gpu_ns=ran.gpu_ns, shed_frames=shed)


def needed_for(config: ModelConfig, tick: TickInput) -> Bucket:
    """The shapes of a tick of which no row is refused."""
    rows = [row for row, slot in enumerate(tick.slot_S.tolist()) if slot >= 0]
    return _shapes(config, tick, rows, [tick.runs(config, row) for row in rows])


def embed_rows(frontend: Frontend, state: ModelState, tick: TickInput) -> tuple[Tensor, Tensor]:
    """(x_T_D, start_S1) of a tick whose rows are all live: what its first pass over the layers
    takes. Advances the audio tails and nothing else. Waits for the device."""
    config, rows = state.config, list(range(len(tick.slot_S)))
    bucket = needed_for(config, tick)
    tick.fill(config, rows, state.buffers.staged(bucket))
    state.buffers.send(bucket)
    inputs = state.buffers.inputs(bucket)
    x_T_D = frontend.embed_tick(state, inputs)
    start_S1 = inputs.start_S1.clone()
    wait(state.device)  # before the buffers are another tick's
    return x_T_D, start_S1


def _reserve(
    state: ModelState, tick: TickInput, output: TickOutput
) -> tuple[list[int], list[list[Run]]]:
    """Live rows with room for what they will append, and that; the others are refused."""
    ready, all_runs = [], []
    for row, slot in enumerate(tick.slot_S.tolist()):
        if slot < 0:
            continue
        runs = tick.runs(state.config, row)
        try:
            state.reserve(slot, runs)
        except CacheError as error:
            output.refused[row] = error
            output.fault_S[row] = True
            continue
        ready.append(row)
        all_runs.append(runs)
    return ready, all_runs


def _shapes(config: ModelConfig, tick: TickInput, rows: list[int], runs: list[list[Run]]) -> Bucket:
    later_steps = config.layout.num_steps - 1  # which have passes of their own
    tokens = sum(tokens for row in runs for _, tokens in row) - later_steps * len(rows)
    return Bucket(len(rows), tokens, sum(tick.num_patches(config, row) for row in rows))


def _quiet(config: ModelConfig, num_rows: int) -> TickOutput:
    """What idle rows say."""
    layout = config.layout
    mel = (num_rows, layout.mel_frames, layout.dmel.num_bands)
    return TickOutput(
        torch.full((num_rows, layout.num_steps), -1, dtype=torch.int32),
        torch.full(mel, layout.dmel.level_min),
        torch.zeros(num_rows, dtype=torch.bool),
        {"stage": 0},
    )
