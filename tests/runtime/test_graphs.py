"""Ticks as CUDA graphs: in the loop, and on a GPU against the same ops one by one."""

from __future__ import annotations

import gc
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tml_kernels.testing import assert_bitwise
from tml_runtime import InteractionModel, ModelConfig, Runtime, errors
from tml_runtime._tick import now_ns
from tml_runtime.graph import TickGraphs, graphs_for, mode_of, page_count, pages_that_fit
from tml_runtime.graph_launch import NativeLaunch, TorchLaunch, capture
from tml_runtime.model import KvBudget, ModelState, TickInput
from tml_runtime.model.buffers import Bucket
from tml_runtime.session import SpeechOut

CONFIG = ModelConfig.preset("tiny")
LAYOUT = CONFIG.layout
GIB = 1 << 30
# Two pages of each class: every one of them rolls within forty ticks.
FEW = KvBudget(anchor=1, text=1, audio=1, video=1, reply=1, rewind=16)


@pytest.fixture(scope="module")
def model() -> InteractionModel:
    return InteractionModel.random(CONFIG)


def make_tick(num_rows: int, seed: int) -> TickInput:
    """Of slots in changing places, some of them idle."""
    rng = np.random.default_rng(seed)
    slots = rng.permutation(num_rows).astype(np.int32)
    slots[rng.random(num_rows) < 0.2] = -1
    video = [rng.integers(0, 256, (rng.integers(1, 4), 2, 80, 80, 3), np.uint8) for _ in slots]
    return TickInput(
        torch.from_numpy(slots),
        0.1
        * torch.from_numpy(rng.standard_normal((num_rows, LAYOUT.samples_per_tick), np.float32)),
        torch.from_numpy(rng.random(num_rows) < 0.1),
        [pair if rng.random() < 0.4 else None for pair in video],
        [rng.integers(0, 90, rng.integers(0, 8)).tolist() for _ in range(num_rows)],
    )


def said(runtime: Runtime, num_ticks: int) -> list[bytes]:
    with runtime:
        session = runtime.open_session(seed=1)
        for tick in range(num_ticks):
            rng = np.random.default_rng(tick)
            samples = rng.normal(0, 0.1, LAYOUT.samples_per_tick).astype(np.float32)
            session.push_audio(samples, session.open_t)
            if tick % 2:
                session.push_video(rng.integers(0, 256, (40, 80, 3), np.uint8), session.open_t)
            runtime.run_ticks(1)
        return [out.pcm.tobytes() for out in session.poll() if isinstance(out, SpeechOut)]


def test_the_loop_says_the_same_in_buckets(
    model: InteractionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Runtime(model, num_slots=2, realtime=False)
    assert plain.report()["graphs"] is None
    expected = said(plain, 3)
    monkeypatch.setenv("TML_DEBUG_GRAPH", "1")
    debugged = Runtime(model, num_slots=2, realtime=False)
    assert said(debugged, 3) == expected and len(expected) == 3
    graphs = debugged.report()["graphs"]
    assert graphs["mode"] == "debug" and graphs["buckets"] > 5 and graphs["captured"] == 0


def test_the_environment_chooses_the_mode(
    model: InteractionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = InteractionModel.random(CONFIG, dtype=torch.bfloat16)
    assert (mode_of(model), mode_of(half)) == ("eager", "graph")  # float32 has no kernels
    monkeypatch.setenv("TML_EAGER", "1")
    assert mode_of(half) == "eager"
    assert graphs_for(model, model.new_state(1), 1) is None  # a CPU takes the shapes there are
    monkeypatch.setenv("TML_DEBUG_GRAPH", "1")
    assert mode_of(half) == "debug"


def test_pages_that_fit() -> None:
    """As many as wanted, or as the memory that is free leaves after the margin."""
    fit = {"held": 100, "wanted": 5000}
    assert pages_that_fit(80 * GIB, 1 << 20, **fit) == 5000
    assert pages_that_fit(3 * GIB, 1 << 20, **fit) == 100 + 2048
    assert pages_that_fit(3 * GIB, 1 << 20, **fit, margin=0) == 100 + 3072
    assert pages_that_fit(GIB, 1 << 20, **fit) == 100
    assert pages_that_fit(GIB + (1 << 20), 1 << 20, **fit) == 101
    assert pages_that_fit(0, 1 << 20, **fit) == 100
    assert pages_that_fit(80 * GIB, 1 << 20, held=10, wanted=10) == 10


def test_pages_are_counted_on_a_gpu_alone(model: InteractionModel) -> None:
    assert page_count(model, 2, KvBudget(), None) is None
    assert page_count(model, 2, KvBudget(), 300) == 300
    with pytest.raises(errors.InputValueError, match="global_pages='auto' is for a GPU"):
        Runtime(model, realtime=False, global_pages="auto")


@pytest.fixture(scope="module")
def gpu_model() -> InteractionModel:
    return InteractionModel.random(CONFIG, device="cuda", dtype=torch.bfloat16)


def open_sessions(state: ModelState) -> None:
    for slot in range(state.num_slots):
        min_p = 0.05 if slot % 2 else 0.0
        state.set_sampling(slot, temperature=0.8, top_k=50, min_p=min_p, seed=slot)


@pytest.mark.gpu
def test_gpu_a_graph_says_what_eager_says_through_rollover(gpu_model: InteractionModel) -> None:
    """Over 200 ticks, in which every page has been replaced; the same bits in the state too."""
    states = [gpu_model.new_state(4, budget=FEW) for _ in range(2)]
    graphs = [
        TickGraphs(gpu_model, state, mode=mode)
        for state, mode in zip(states, ("graph", "eager"), strict=True)
    ]
    assert graphs[0].report()["captured"] == len(graphs[0].buckets)
    assert graphs[1].report()["captured"] == 0
    buckets, dropped = set(), np.zeros(5, np.int64)
    for state in states:
        open_sessions(state)
    with torch.inference_mode():
        for n in range(200):
            tick = make_tick(4, seed=n)
            replayed, eager = (gpu_model.tick(state, tick) for state in states)
            assert_bitwise(replayed.token_S_K, eager.token_S_K)
            assert_bitwise(replayed.mel_S_K_B, eager.mel_S_K_B)
            assert not replayed.fault_S.any() and not eager.fault_S.any()
            assert replayed.bucket == eager.bucket
            if replayed.bucket is not None:
                assert replayed.gpu_ns is not None and replayed.gpu_ns[1] > replayed.gpu_ns[0]
            buckets.add(replayed.bucket)
            dropped += replayed.kv_dropped
            if n % 50 == 49:
                for state in states:  # a slot's next session
                    state.reset(n % 4)
                    state.set_sampling(n % 4, seed=n)
    for name, x in vars(states[0]).items():
        if isinstance(x, torch.Tensor):
            assert_bitwise(x, getattr(states[1], name))
    assert len(buckets) > 4 and (dropped[2:] > 4).all()
    for state in states:
        state.cache.check_invariants()


@pytest.mark.gpu
@pytest.mark.parametrize("quiet", [True, False])
def test_gpu_both_graphs_of_a_tick_that_drafts_say_what_eager_says(quiet: bool) -> None:
    """The second is launched where a row's drafts were wrong, and nothing is allocated for it."""
    config = replace(CONFIG, mtp_layers=("local", "global"))
    model = InteractionModel.random(config, device="cuda", dtype=torch.bfloat16)
    if quiet:  # at a high temperature drafts are often right, and in loud speech never
        model.weights.flow.output_B_W.zero_()
        model.weights.flow.output_bias_B.fill_(-100.0)
    states = [model.new_state(4, budget=FEW, drafts=True) for _ in range(2)]
    graphs = [
        TickGraphs(model, state, mode=mode)
        for state, mode in zip(states, ("graph", "eager"), strict=True)
    ]
    assert graphs[0].report()["captured"] == 2 * len(graphs[0].buckets)
    for state in states:
        for slot in range(4):
            state.set_sampling(slot, temperature=(0.0, 1.0, 100.0, 100.0)[slot], seed=slot)
    passes, kept, segments = [], 0, set()
    ticks = [make_tick(4, seed=n) for n in range(60)]
    with torch.inference_mode():
        expected = [model.tick(states[1], tick) for tick in ticks]
        for tick, eager in zip(ticks, expected, strict=True):
            replayed = model.tick(states[0], tick)
            assert_bitwise(replayed.token_S_K, eager.token_S_K)
            assert_bitwise(replayed.mel_S_K_B, eager.mel_S_K_B)
            assert not replayed.fault_S.any()
            assert (replayed.passes, replayed.drafts_kept) == (eager.passes, eager.drafts_kept)
            passes.append(replayed.passes)
            kept += replayed.drafts_kept
            segments.add(torch.cuda.memory_stats()["segment.all.allocated"])
    assert len(segments) == 1
    assert (kept > 0) == quiet and LAYOUT.num_steps in passes
    for name, x in vars(states[0]).items():
        if isinstance(x, torch.Tensor):
            assert_bitwise(x, getattr(states[1], name))
    for state in states:
        state.cache.check_invariants()


@pytest.mark.gpu
def test_gpu_nothing_is_allocated_after_ready(gpu_model: InteractionModel) -> None:
    """Neither by torch's allocator nor behind its back; of free memory one quiet round in ten will
    do, since other processes may have the GPU too."""
    state = gpu_model.new_state(4, budget=FEW)
    TickGraphs(gpu_model, state)
    open_sessions(state)
    counters = ("allocation.all.allocated", "segment.all.allocated", "num_alloc_retries")
    with torch.inference_mode():
        gpu_model.tick(state, make_tick(4, seed=0))
        torch.cuda.synchronize()
        before = [torch.cuda.memory_stats()[name] for name in counters]
        taken = []
        for n in range(10):
            free_bytes = torch.cuda.mem_get_info()[0]
            for m in range(20):
                gpu_model.tick(state, make_tick(4, seed=1 + 20 * n + m))
            torch.cuda.synchronize()
            taken.append(free_bytes - torch.cuda.mem_get_info()[0])
    assert [torch.cuda.memory_stats()[name] for name in counters] == before
    assert 0 in taken


@pytest.mark.gpu
def test_gpu_no_capture_is_spoilt_by_graphs_that_nobody_needs(
    gpu_model: InteractionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state and its graphs know each other, so a collection frees them; CUDA refuses to while
    another graph is captured, and ends that capture."""
    run = gpu_model.device_tick.run

    def run_and_collect(*args: Any) -> None:
        run(*args)
        if torch.cuda.is_current_stream_capturing() and gc.isenabled():
            gc.collect()  # as one that begins here by itself

    monkeypatch.setattr(gpu_model.device_tick, "run", run_and_collect)
    for _ in range(3):  # nobody keeps any of them
        state = gpu_model.new_state(1)
        assert TickGraphs(gpu_model, state, buckets=[Bucket(1, 5, 0)]).report()["captured"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("make", [NativeLaunch, TorchLaunch])
def test_gpu_a_launch_waits_and_says_when_the_gpu_worked(make: type) -> None:
    """By C++ and by torch alike."""
    if make is NativeLaunch:
        pytest.importorskip("tml_kernels._cuda", reason="built without nvcc")
    launch = make()
    with capture("a pause", stream=torch.cuda.Stream()) as graph:
        launch.mark_start()
        torch.cuda._sleep(20_000_000)  # cycles, some 10 ms
    for _ in range(3):
        times = [now_ns(), *(launched := launch.run(graph)), now_ns()]
        assert times == sorted(times)
        assert launched.stage_ns()["gpu"] > 5_000_000 > launched.stage_ns()["launch_gap"]


A_LOOK_FROM_THE_HOST = """
import torch
from tml_runtime.errors import CaptureError
from tml_runtime.graph_launch import capture

before, x = torch.cuda.current_stream(), torch.zeros(1, device="cuda")
try:
    with capture("a look from the host", stream=torch.cuda.Stream()):
        x.item()
except CaptureError as error:
    print(error)
print(torch.cuda.current_stream() == before, float(x + 1))
"""


@pytest.mark.gpu
def test_gpu_a_capture_that_fails_says_of_what_and_gives_the_stream_back() -> None:
    """In a process of its own: torch's allocator takes that capture for one that goes on, and
    gives no memory back any more."""
    command = [sys.executable, "-c", A_LOOK_FROM_THE_HOST]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("a look from the host could not be captured: "), done.stderr
    assert done.stdout.endswith("\nTrue 1.0\n"), done.stderr


@pytest.mark.gpu
def test_gpu_shapes_that_were_not_captured_are_refused(gpu_model: InteractionModel) -> None:
    state = gpu_model.new_state(2)
    graphs = TickGraphs(gpu_model, state, buckets=[Bucket(1, 20, 15)])
    tick = TickInput(
        torch.arange(2, dtype=torch.int32),
        torch.zeros(2, LAYOUT.samples_per_tick),
        torch.zeros(2, dtype=torch.bool),
    )
    with torch.inference_mode():
        with pytest.raises(errors.NotCaptured, match="no bucket holds"):
            gpu_model.tick(state, tick)
        assert [state.length(slot) for slot in range(2)] == [0, 0]
        alone = replace(tick, slot_S=torch.tensor([-1, 1], dtype=torch.int32))
        assert gpu_model.tick(state, alone).bucket == graphs.buckets[0]


@pytest.mark.gpu
def test_gpu_a_float32_model_runs_op_by_op() -> None:
    model = InteractionModel.random(CONFIG, device="cuda")
    runtime = Runtime(model, num_slots=1, realtime=False)
    assert runtime.report()["graphs"]["mode"] == "eager"
    assert len(said(runtime, 2)) == 2


@pytest.mark.gpu
def test_gpu_the_runtime_replays_and_reports(gpu_model: InteractionModel) -> None:
    runtime = Runtime(gpu_model, num_slots=2, realtime=False, global_pages="auto")
    assert len(said(runtime, 5)) == 5
    report, records = runtime.report(), runtime.metrics.records()
    assert report["graphs"]["captured"] == report["graphs"]["buckets"] > 5
    sizes = [report["graphs"]["bytes"]]  # of the GPU: another process may give back more meanwhile
    for _ in range(2):
        again = Runtime(gpu_model, num_slots=2, realtime=False)
        sizes.append(again.report()["graphs"]["bytes"])
    assert max(sizes) > 0
    assert report["stages_ms"]["model.gpu"]["p50"] > 0
    assert (records["gpu_end_ns"] > records["gpu_start_ns"]).all()
    assert (records["bucket_rows"] == 1).all() and (records["bucket_tokens"] >= 5).all()


@pytest.mark.gpu
def test_gpu_eager_calls_between_ticks_spoil_no_graph(gpu_model: InteractionModel) -> None:
    """A long append takes more scratch than any tick; graphs keep what they were captured with."""
    states = [gpu_model.new_state(2, max_append=2048) for _ in range(2)]
    TickGraphs(gpu_model, states[0])
    TickGraphs(gpu_model, states[1], mode="eager")
    outs = []
    with torch.inference_mode():
        for state in states:
            open_sessions(state)
            gpu_model.read(state, 1, [5] * 60)
            x_T_D = gpu_model.embed_text([7] * 1500)
            start_S1, slot_S = (
                torch.tensor(v, dtype=torch.int32, device="cuda") for v in ([0, 1500], [0])
            )
            gpu_model.append(state, x_T_D, start_S1, slot_S)
            torch.cuda.empty_cache()
            outs.append([gpu_model.tick(state, make_tick(2, seed=n)) for n in range(10)])
    for replayed, eager in zip(*outs, strict=True):
        assert_bitwise(replayed.token_S_K, eager.token_S_K)
        assert_bitwise(replayed.mel_S_K_B, eager.mel_S_K_B)
