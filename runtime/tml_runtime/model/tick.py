"""One tick in two halves: the host lays out what came and where keys go, the device runs on that.

The device's half runs ops of fixed shapes on fixed buffers and asks the host nothing, so a CUDA
graph can hold it; `run_tick` is told which shapes to take and how to run them.
"""

# Dimension key: S session rows, K output steps, B mel bands.

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from tml_kernels.kv_cache import CacheError

from .backbone import Backbone
from .buffers import Bucket
from .config import ModelConfig
from .frontend import Frontend
from .output import Done, Speaker, TickOutput
from .passes import fill_passes, passes_of
from .state import ModelState, Run
from .tick_input import TickInput


class DeviceTick:
    """The device's half of a tick, of one set of weights."""

    def __init__(self, backbone: Backbone, frontend: Frontend) -> None:
        self.backbone = backbone
        self.frontend = frontend
        self.speaker = Speaker(backbone, frontend)

    def run(self, state: ModelState, bucket: Bucket, done: Done) -> None:
        """Queue everything between the copy to the device and the copy back. What the host staged
        is read from `state.buffers`, and what the rows say is left there.

        done: called after each stage with its name and what it made, [tokens or rows, ...].
        """
        buffers = state.buffers
        inputs = buffers.inputs(bucket)
        buffers.send(bucket)
        state.cache.write(inputs.delta_U_4, inputs.placed_X, inputs.position_X)
        passes = passes_of(state, inputs)
        x_T_D = self.frontend.embed_tick(state, inputs)
        done("frontend", x_T_D)
        h_T_D = self.backbone.run(state, x_T_D, passes[0])
        done("prefill", h_T_D)
        h_S_D = h_T_D.index_select(0, inputs.last_S)
        self.speaker.run_steps(state, h_S_D, passes, inputs, buffers.said(bucket), done)
        buffers.receive(bucket)


def embed_rows(frontend: Frontend, state: ModelState, tick: TickInput) -> tuple[Tensor, Tensor]:
    """(x_T_D, start_S1) of a tick whose rows are all live: what its first pass over the layers
    takes. Advances the audio tails and nothing else. Waits for the device."""
    config, rows = state.config, list(range(len(tick.slot_S)))
    bucket = _shapes(config, tick, rows, [tick.runs(config, row) for row in rows])
    tick.fill(config, rows, state.buffers.staged(bucket))
    state.buffers.send(bucket)
    inputs = state.buffers.inputs(bucket)
    x_T_D = frontend.embed_tick(state, inputs)
    start_S1 = inputs.start_S1.clone()
    wait(state.device)  # before the buffers are another tick's
    return x_T_D, start_S1


class Laps:
    """A `Done` that takes the time of each stage on the host."""

    def __init__(self) -> None:
        self.ns: dict[str, int] = {}
        self._last_ns = time.perf_counter_ns()

    def __call__(self, stage: str, made: Tensor) -> None:
        now_ns = time.perf_counter_ns()
        name = "steps" if stage.startswith("step") else stage
        self.ns[name] = self.ns.get(name, 0) + now_ns - self._last_ns
        self._last_ns = now_ns


def run_tick(
    state: ModelState,
    tick: TickInput,
    *,
    choose: Callable[[Bucket], Bucket],
    run: Callable[[Bucket], dict[str, int]],
) -> TickOutput:
    """A whole tick: reserve, stage, run, wait, commit.

    choose: the bucket to run a tick of these shapes in; it may raise. run: the device's half in a
    bucket; returns once the output is on the host, with how long each stage took. Raises TypeError
    or ValueError before anything is changed; whatever else raises, the sessions are as they were.
    """
    begin_ns = time.perf_counter_ns()
    config = state.config
    tick.check(config, state)
    output = _quiet(config, len(tick.slot_S))
    rows, runs = _reserve(state, tick, output)
    if not rows:
        return output
    slots = tick.slot_S[rows].tolist()
    try:
        bucket = choose(_shapes(config, tick, rows, runs))
        staged = state.buffers.staged(bucket)
        tick.fill(config, rows, staged)
        fill_passes(state, slots, runs, staged)
        output.stage_ns["stage"] = time.perf_counter_ns() - begin_ns
        output.stage_ns.update(run(bucket))
    except BaseException:
        state.roll_back(slots)
        raise
    state.commit(slots)
    for page_class, count in chain.from_iterable(runs):
        output.tokens[page_class.value] += count
    output.kv_pages[:] = state.kv_pages(slots)
    output.kv_dropped[:] = state.take_dropped()
    said = state.buffers.heard(bucket)
    output.token_S_K[rows] = said.token_S_O[: len(rows)]
    output.mel_S_K_B[rows] = said.mel_S_F_B[: len(rows)]
    output.fault_S[rows] = said.fault_S[: len(rows)]
    return replace(output, bucket=bucket)


def wait(device: torch.device) -> None:
    """For what was queued on the current stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


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
        dict.fromkeys(("stage", "frontend", "prefill", "steps"), 0),
    )
