"""A tick as one CUDA graph: which shapes are captured, when, and how a tick is replayed.

Nothing compiles, captures or allocates after `TickGraphs` is made: a tick runs in the smallest
bucket that holds it, and shapes that were not captured are an error, never a fallback. All graphs
read and write the buffers of one `ModelState` and share one pool of memory.
"""

# Dimension key: S session rows.

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from . import _env
from .clock import garbage_waits
from .errors import InputValueError, NotCaptured
from .graph_launch import capture, make_launch
from .model import InteractionModel, KvBudget, ModelState, TickInput, TurnLayout
from .model.buffers import Bucket
from .model.device_tick import DirectRunner, Ran, has_rest, wait
from .model.parts import cache_groups

GROWTH = (1, 2, 4, 16)  # tokens per row of a bucket, in those of a row that hears and says a step
MAX_TOKENS = 4096  # of a bucket, unless all rows need more without any video
MARGIN = 1 << 30  # bytes left to other libraries and to fragmentation


def buckets_of(layout: TurnLayout, num_slots: int) -> list[Bucket]:
    """The shapes that ticks of up to `num_slots` sessions run in, smallest first.

    Rows 1, 2, 4, ... and num_slots. Tokens per row: what a row has that only listens (audio, and
    the step), 2, 4 and 16 times as much, and the layout's most, as far as a bucket has no more than
    MAX_TOKENS; but all rows always fit with their longest text. Each without video and, where there
    is room for any, with as many patches as it holds.

    >>> buckets_of(TurnLayout(), 1)[:4]
    [Bucket(rows=1, tokens=5, patches=0), Bucket(rows=1, tokens=10, patches=0), \
Bucket(rows=1, tokens=10, patches=5), Bucket(rows=1, tokens=20, patches=0)]
    """
    quiet, longest = layout.audio_tokens + 1, layout.max_prefill_tokens
    buckets = set()
    for rows in {*(1 << n for n in range(num_slots.bit_length())), num_slots}:
        unseen = rows * (longest - layout.max_video_tokens)
        most = min(rows * longest, max(MAX_TOKENS, unseen))
        for tokens in {*(min(rows * quiet * growth, most) for growth in GROWTH), most}:
            patches = min(tokens - rows * quiet, rows * layout.max_video_tokens)
            buckets |= {Bucket(rows, tokens, 0), Bucket(rows, tokens, patches)}
    return sorted(buckets)


def pages_that_fit(
    free_bytes: int, page_bytes: int, *, held: int, wanted: int, margin: int = MARGIN
) -> int:
    """Pages that a pool can have where `free_bytes` are free beside one of `held` pages: no more
    than `wanted`, and `margin` bytes stay free.

    >>> pages_that_fit(10 << 30, 1 << 20, held=100, wanted=20_000)
    9316
    """
    return min(wanted, held + max(0, free_bytes - margin) // page_bytes)


class TickGraphs:
    """The ticks of one model and state: from here on `InteractionModel.tick` runs that state's in
    these buckets. For one thread.

    mode: "graph" replays captured graphs; "eager" runs the same shapes op by op; "debug" does that
    with a wait and a look at the numbers after each stage, and raises FloatingPointError naming
    stage and row. By default what the environment says, else "graph"; only "graph" needs a GPU.
    """

    def __init__(
        self,
        model: InteractionModel,
        state: ModelState,
        *,
        buckets: Sequence[Bucket] | None = None,
        mode: str | None = None,
    ) -> None:
        """Captures everything. Raises CaptureError naming the bucket that could not be."""
        if buckets is None:
            buckets = buckets_of(model.config.layout, state.num_slots)
        self.mode = mode or mode_of(model)
        self.buckets = sorted(buckets)
        self._model = model
        self._state = state
        self._device = state.device
        self._direct = DirectRunner(model.device_tick, state)
        self._graphs: dict[Bucket, torch.cuda.CUDAGraph] = {}
        self._rest: dict[Bucket, torch.cuda.CUDAGraph] = {}  # of ticks that draft, see `has_rest`
        self._kept: list[Tensor] = []
        self._bytes = 0
        self._last_shed = -1  # row
        announce = getattr(model, "announce_graphs", None)  # other ranks of the model do the same
        if announce is not None:
            announce(state, self.buckets, self.mode)
        if self._device.type == "cuda":
            with torch.inference_mode(), torch.cuda.device(self._device):
                self._prepare()
        state.buffers.runner = self

    def close(self) -> None:
        """The state's ticks are run op by op again."""
        self._state.buffers.runner = None

    def report(self) -> dict[str, Any]:
        """Plain data. bytes: of device memory that capturing took, buffers and all."""
        return {
            "mode": self.mode,
            "buckets": len(self.buckets),
            "captured": len(self._graphs) + len(self._rest),
            "largest": self.buckets[-1]._asdict(),
            "bytes": self._bytes,
        }

    # As a Runner

    def begin(self, tick: TickInput, needed: Bucket) -> TickInput:
        """Where no bucket has room for all video, the rows with most of it lose theirs; of equal
        ones those behind the row that was the last to."""
        if self._smallest(needed) is not None:
            return tick
        rows = range(len(tick.slot_S))
        patches = [tick.num_patches(self._model.config, row) for row in rows]
        turn = [(row - self._last_shed - 1) % len(rows) for row in rows]
        frames = list(tick.frames)
        for row in sorted(rows, key=lambda row: (-patches[row], turn[row])):
            if patches[row] == 0 or self._smallest(needed) is not None:
                break
            frames[row], self._last_shed = None, row
            needed = needed._replace(
                tokens=needed.tokens - patches[row], patches=needed.patches - patches[row]
            )
        return replace(tick, frames=frames)

    def choose(self, needed: Bucket) -> Bucket:
        """Raises NotCaptured."""
        bucket = self._smallest(needed)
        if bucket is None:
            raise NotCaptured(
                f"no bucket holds {needed}; the largest of {len(self.buckets)} is "
                f"{self.buckets[-1]}: make the runtime with more slots, or capture more buckets"
            )
        return bucket

    def run(self, bucket: Bucket) -> Ran:
        if self.mode == "eager":
            return self._direct.run(bucket)
        if self.mode == "debug":
            check = FiniteCheck(self._state, bucket)
            self._model.device_tick.run_all(self._state, bucket, check)
            return Ran({})
        with torch.cuda.device(self._device):
            ran = self._replay(self._graphs[bucket])
            if not has_rest(self._state, bucket):
                return ran
            return _in_turn(ran, self._replay(self._rest[bucket]))

    def _smallest(self, needed: Bucket) -> Bucket | None:
        first = bisect_left(self.buckets, (needed.rows,))
        return next((bucket for bucket in self.buckets[first:] if bucket.holds(needed)), None)

    # Graphs

    def _prepare(self) -> None:
        """First every bucket is run, largest first: then kernels are compiled, and scratch is as
        large as it will be. The ticks are idle ones, which leave no trace in the state."""
        free_bytes = torch.cuda.mem_get_info()[0]
        side = torch.cuda.Stream(priority=-1)  # graphs keep it: a background model gives way
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for bucket in reversed(self.buckets):
                self._state.buffers.stage_nothing(bucket)
                self._direct.run(bucket)
                if self._state.num_drafts:
                    self._model.device_tick.run_rest(self._state, bucket, _nothing)
        torch.cuda.current_stream().wait_stream(side)
        self._kept = self._state.scratch.buffers()  # a later, larger call may replace them
        torch.cuda.empty_cache()  # graphs take their memory from a pool of their own
        if self.mode == "graph":
            with garbage_waits():  # once for all of them
                self._capture(side)
        torch.cuda.synchronize()
        # Of the GPU, not of this process: what another takes or gives back meanwhile counts too.
        self._bytes = max(0, free_bytes - torch.cuda.mem_get_info()[0])

    def _capture(self, stream: torch.cuda.Stream) -> None:
        self._launch = make_launch()
        pool = torch.cuda.graph_pool_handle()
        device_tick = self._model.device_tick
        parts = [(self._graphs, device_tick.run)]
        if self._state.num_drafts:
            parts.append((self._rest, device_tick.run_rest))
        for bucket in reversed(self.buckets):
            for graphs, run in parts:
                what = f"{bucket}, which TML_EAGER=1 would run op by op,"
                with capture(what, stream=stream, pool=pool) as graph:
                    self._launch.mark_start()
                    run(self._state, bucket, _nothing)
                graphs[bucket] = graph

    def _replay(self, graph: torch.cuda.CUDAGraph) -> Ran:
        launched = self._launch.run(graph)
        return Ran(launched.stage_ns(), (launched.start_ns, launched.end_ns))


class FiniteCheck:
    """Waits after each stage, and raises FloatingPointError where a live row is not finite."""

    def __init__(self, state: ModelState, bucket: Bucket) -> None:
        staged = state.buffers.staged(bucket)
        self._device = state.device
        self._slots = staged.slot_S.tolist()
        self._start = staged.start_S1.tolist()

    def __call__(self, stage: str, made: Tensor) -> None:
        wait(self._device)
        finite = made.isfinite().flatten(1).all(1).tolist()
        for row, slot in enumerate(self._slots):
            of_row = slice(row, row + 1)
            if not stage.startswith("step"):  # made for tokens
                of_row = slice(self._start[row], self._start[row + 1])
            if slot >= 0 and not all(finite[of_row]):
                raise FloatingPointError(f"{stage}: row {row}, of {slot=}, is not finite")


def mode_of(model: InteractionModel) -> str:
    if _env.debug_graph():
        return "debug"
    # float32 products have no kernels: their plain paths ask the host, which no graph can hold.
    return "eager" if _env.eager() or model.dtype == torch.float32 else "graph"


def graphs_for(model: InteractionModel, state: ModelState, num_rows: int) -> TickGraphs | None:
    """For ticks of up to `num_rows` sessions on a GPU, captured. None on a CPU, where a tick takes
    the shapes it has, since padding costs time there; but with TML_DEBUG_GRAPH its buckets are run
    there too."""
    if not isinstance(model, InteractionModel):
        return None
    if model.device.type != "cuda" and not _env.debug_graph():
        return None
    return TickGraphs(model, state, buckets=buckets_of(model.config.layout, num_rows))


def page_count(
    model: InteractionModel,
    num_slots: int,
    budget: KvBudget,
    global_pages: int | Literal["auto"] | None,
    page_dtype: torch.dtype | None = None,
    drafts: bool = False,
) -> int | None:
    """`global_pages` as a number: with "auto", as many as fit beside the graphs.

    Everything is captured over the fewest pages that serve one session, so that what is free then
    is free for more; then all of it is given back. Raises InputValueError for "auto" on a CPU.
    """
    if global_pages != "auto":
        return global_pages
    if model.device.type != "cuda":
        raise InputValueError("global_pages='auto' is for a GPU; on a CPU give a number")
    if model.ranks is not None:
        raise InputValueError("global_pages='auto' is for one rank; on several give a number")
    longest = model.config.layout.max_tokens_per_tick
    config = model.config.with_drafts(model.config.num_drafts) if drafts else model.config
    groups = cache_groups(config, num_slots, budget, longest)
    spec = next((group for group in groups if group.window is None), None)
    if spec is None:
        return None
    held = 1 + spec.columns
    probe = model.new_state(
        num_slots, budget=budget, global_pages=held, page_dtype=page_dtype, drafts=drafts
    )
    graphs = TickGraphs(model, probe)
    free_bytes = torch.cuda.mem_get_info(model.device)[0]
    graphs.close()
    del graphs, probe
    gc.collect()
    torch.cuda.empty_cache()
    page_bytes = spec.page_bytes(page_dtype or model.dtype)
    page_bytes += 8 * spec.page_rows  # a position for each row
    return pages_that_fit(free_bytes, page_bytes, held=held, wanted=spec.pages)


def _in_turn(first: Ran, then: Ran) -> Ran:
    """Two graphs of one tick; what is between them is part of neither's stages."""
    stage_ns = {name: ns + then.stage_ns[name] for name, ns in first.stage_ns.items()}
    assert first.gpu_ns is not None and then.gpu_ns is not None
    return Ran(stage_ns, (first.gpu_ns[0], then.gpu_ns[1]))


def _nothing(stage: str, made: Tensor) -> None:
    pass
