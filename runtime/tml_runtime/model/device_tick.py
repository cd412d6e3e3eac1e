"""The device's half of a tick: ops of fixed shapes on fixed buffers, which ask the host nothing, so
that a CUDA graph can hold them."""

# Dimension key: S session rows, T tokens, D model width.

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .._tick import now_ns
from .backbone import Backbone
from .buffers import Bucket
from .drafts import Drafter
from .frontend import Frontend
from .output import Done, Speaker
from .passes import passes_of
from .state import ModelState
from .tick_input import TickInput


class DeviceTick:
    """The device's half of a tick, of one set of weights."""

    def __init__(self, backbone: Backbone, frontend: Frontend) -> None:
        self.backbone = backbone
        self.frontend = frontend
        self.speaker = Speaker(backbone, frontend)
        self.drafter = Drafter(self.speaker)

    def run(self, state: ModelState, bucket: Bucket, done: Done) -> None:
        """Queue everything between the copy to the device and the copy back. What the host staged
        is read from `state.buffers`, and what the rows say is left there. Where the state drafts,
        `run_rest` may have to follow, see `has_rest`.

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
        said = buffers.said(bucket)
        if state.num_drafts:
            self.drafter.run_first(state, h_S_D, passes[0], inputs, said, done)
        else:
            self.speaker.run_steps(state, h_S_D, passes, inputs, said, done)
        buffers.receive(bucket)

    def run_rest(self, state: ModelState, bucket: Bucket, done: Done) -> None:
        """Queue the output steps of rows whose drafts were wrong, and the copy back."""
        buffers = state.buffers
        self.drafter.run_rest(state, buffers.inputs(bucket), buffers.said(bucket), done)
        buffers.receive(bucket)

    def run_all(self, state: ModelState, bucket: Bucket, done: Done) -> None:
        """`run`, and `run_rest` where it has to be; returns once what was said is on the host."""
        self.run(state, bucket, done)
        wait(state.device)
        if has_rest(state, bucket):
            self.run_rest(state, bucket, done)
            wait(state.device)


def has_rest(state: ModelState, bucket: Bucket) -> bool:
    """Whether a row has output steps left, once what `run` did is on the host."""
    known_S = state.buffers.heard(bucket).known_S  # no rows where ticks do not draft
    return bool((known_S < state.config.layout.num_steps).any())


class Ran(NamedTuple):
    """How long each stage of the device's half took, one after the other; and from when to when the
    GPU worked, on the clock of `_tick.now_ns`, where that was measured."""

    stage_ns: dict[str, int]
    gpu_ns: tuple[int, int] | None = None


class Runner(Protocol):
    """How the device's half of one state's ticks is run, and in which shapes."""

    def begin(self, tick: TickInput, needed: Bucket) -> TickInput:
        """What of a checked tick of these shapes, whose rows are all live, there are shapes for:
        all of it, or less video."""
        ...

    def choose(self, needed: Bucket) -> Bucket:
        """The bucket for a tick of these shapes. What it raises ends the tick."""
        ...

    def run(self, bucket: Bucket) -> Ran:
        """Run what was staged in the bucket; returns once what was said is on the host."""
        ...


class DirectRunner:
    """Op by op, in the shapes that a tick has."""

    def __init__(self, device_tick: DeviceTick, state: ModelState) -> None:
        self._device_tick = device_tick
        self._state = state

    def begin(self, tick: TickInput, needed: Bucket) -> TickInput:
        return tick

    def choose(self, needed: Bucket) -> Bucket:
        return needed

    def run(self, bucket: Bucket) -> Ran:
        laps = Laps()
        self._device_tick.run_all(self._state, bucket, laps)
        return Ran(laps.ns)


class Laps:
    """A `Done` that takes the time of each stage on the host."""

    def __init__(self) -> None:
        self.ns: dict[str, int] = {}
        self._last_ns = now_ns()

    def __call__(self, stage: str, made: Tensor) -> None:
        lap_ns = now_ns()
        name = "steps" if stage.startswith("step") else stage
        self.ns[name] = self.ns.get(name, 0) + lap_ns - self._last_ns
        self._last_ns = lap_ns


def wait(device: torch.device) -> None:
    """For what was queued on the current stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
