"""tml_kernels._cuda: its refusals anywhere, its kernels and graph launch on a GPU."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import pytest
import torch

from tml_runtime._tick import TickThread, now_ns

_cuda = pytest.importorskip("tml_kernels._cuda", reason="built without nvcc")


def test_device_info_without_torch() -> None:
    info = _cuda.device_info()
    assert info["runtime_version"] >= 12000
    assert info["num_devices"] == torch.cuda.device_count()
    assert (info["error"] is None) == (info["num_devices"] > 0)


def apply_deltas(**changes: int) -> None:
    names = ("delta_ptr", "row_ptr", "position_ptr", "page_ptr", "base_ptr", "rows_ptr")
    counts = ("num_deltas", "num_positions", "num_keys", "num_rows")
    given = dict.fromkeys((*names, "row_position_ptr"), 16) | dict.fromkeys(counts, 1)
    _cuda.apply_deltas(**given | {"stream": 0} | changes)


def move_pages(**changes: int) -> None:
    names = ("source_ptr", "target_ptr", "from_ptr", "to_ptr")
    counts = ("source_pages", "target_pages", "num_moves", "num_layers", "page_bytes")
    _cuda.move_pages(
        **dict.fromkeys(names, 16) | dict.fromkeys(counts, 1) | {"stream": 0} | changes
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: _cuda.stream_read(16, 15, 16, 1, 0), "num_bytes=15"),
        (lambda: _cuda.stream_read(16, -16, 16, 1, 0), "num_bytes=-16"),
        (lambda: _cuda.stream_read(8, 16, 16, 1, 0), "data: misaligned"),
        (lambda: _cuda.stream_read(0, 16, 16, 1, 0), "data=null"),
        (lambda: _cuda.stream_read(16, 16, 0, 1, 0), "out: null or misaligned"),
        (lambda: _cuda.stream_read(16, 16, 2, 1, 0), "out: null or misaligned"),
        (lambda: _cuda.stream_read(16, 16, 16, 0, 0), "num_blocks=0"),
        *(
            (functools.partial(apply_deltas, **{name: -1}), f"{name}=-1")
            for name in ("num_deltas", "num_positions", "num_keys", "num_rows")
        ),
        *(
            (
                functools.partial(apply_deltas, **{f"{name}_ptr": value}),
                f" {name}: null or misaligned, num_",
            )
            for name in ("delta", "row", "position", "base", "row_position")
            for value in (4, 0)  # not of 8 bytes, null
        ),
        *(
            (
                functools.partial(apply_deltas, **{f"{name}_ptr": value}),
                f" {name}: null or misaligned, num_",
            )
            for name in ("page", "rows")
            for value in (2, 0)
        ),
        *(
            (functools.partial(move_pages, **{name: -1}), f"{name}=-1")
            for name in ("source_pages", "target_pages", "num_moves", "num_layers", "page_bytes")
        ),
        *(
            (
                functools.partial(move_pages, **{f"{name}_ptr": value}),
                f" {name}: null or misaligned, num_",
            )
            for name in ("from", "to")
            for value in (4, 0)
        ),
        (lambda: move_pages(source_ptr=0), "source=null source_bytes=1"),
        (lambda: move_pages(target_ptr=0, target_pages=3), "target=null target_bytes=3"),
    ],
)
def test_bad_value(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_nothing_to_do_launches_nothing() -> None:
    """Null pointers are fine then, and no device is asked for."""
    apply_deltas(num_deltas=0, num_positions=0, delta_ptr=0, row_ptr=0, position_ptr=0)
    for name in ("num_layers", "page_bytes"):
        move_pages(source_ptr=0, target_ptr=0, **{name: 0})
    move_pages(num_moves=0, from_ptr=0, to_ptr=0)
    move_pages(source_ptr=0, source_pages=0)
    move_pages(target_ptr=0, target_pages=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_device_is_a_runtime_error() -> None:
    with pytest.raises(RuntimeError, match=r"stream_read\.cu:\d+: cudaGetDevice.*: cudaError"):
        _cuda.stream_read_num_blocks()
    for call in (apply_deltas, move_pages):
        with pytest.raises(RuntimeError, match=r"launch\.h:\d+: cudaGetDevice.*: cudaError"):
            call()
    with pytest.raises(RuntimeError, match=r"graph_launch\.cpp:\d+: cudaEventCreate.*: cudaError"):
        _cuda.GraphLaunch()


TILE = 256 * 8 * 16  # bytes that a block reads at a time


@pytest.mark.gpu
# Nothing, one vector, around one tile, several tiles with a partial one, more tiles than blocks.
@pytest.mark.parametrize(
    "num_bytes", [0, 16, TILE - 16, TILE, TILE + 16, 7 * TILE + 48, 2**28 + 16]
)
def test_stream_read_reads_every_word_once(num_bytes: int) -> None:
    words = torch.randint(-(2**31), 2**31, (num_bytes // 4,), dtype=torch.int32, device="cuda")
    for num_blocks in (1, 3, _cuda.stream_read_num_blocks()):
        out = torch.full((num_blocks,), -1, dtype=torch.int32, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream
        _cuda.stream_read(words.data_ptr(), num_bytes, out.data_ptr(), num_blocks, stream)
        assert xor(out) == xor(words)


def xor(words: torch.Tensor) -> int:
    while len(words) > 1:
        if len(words) % 2:
            words = torch.cat([words, words.new_zeros(1)])
        words = words[: len(words) // 2] ^ words[len(words) // 2 :]
    return int(words[0]) if len(words) else 0


@pytest.mark.gpu
def test_graph_launch_waits_and_tells_when() -> None:
    """From a tick thread, and what it waits for takes no interpreter: the main thread goes on."""
    spin_cycles = 20_000_000  # some 10 ms
    count = torch.zeros(1, dtype=torch.int64, device="cuda")
    launch, graph = _cuda.GraphLaunch(), torch.cuda.CUDAGraph(keep_graph=True)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        launch.mark_start(torch.cuda.current_stream().cuda_stream)
        torch.cuda._sleep(spin_cycles)
        count += 1
    graph.instantiate()
    stream, seen, turns, meanwhile = torch.cuda.Stream(), [], 0, 0

    def step(tick: int) -> None:
        nonlocal meanwhile
        before_ns, before = now_ns(), turns
        times = launch.run(graph.raw_cuda_graph_exec(), stream.cuda_stream)
        meanwhile += turns - before
        seen.append((before_ns, *times, now_ns()))

    thread = TickThread(step, 100_000_000)
    thread.start()
    end = time.monotonic() + 30
    while len(seen) < 10 and time.monotonic() < end:
        turns += 1
    thread.stop()
    assert len(seen) >= 10 and int(count) == len(seen)
    for times in seen:
        assert list(times) == sorted(times)
        launch_ns, start_ns, end_ns = times[1:4]
        assert end_ns - start_ns > 5_000_000 > start_ns - launch_ns
    assert meanwhile > 1000


@pytest.mark.gpu
def test_graph_launch_refuses_what_is_no_graph() -> None:
    with pytest.raises(ValueError, match="graph_exec=0"):
        _cuda.GraphLaunch().run(0, 0)
