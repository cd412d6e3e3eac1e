"""CUDA launchers of tml_kernels: raw pointers, sizes and a stream, as integers.

A pointer is `tensor.data_ptr()`, a stream `torch.cuda.Stream.cuda_stream`. A value that cannot be
accepted is a ValueError, a CUDA call that fails a RuntimeError with its file, line and reason.
"""

from typing import TypedDict

class DeviceInfo(TypedDict):
    runtime_version: int  # 13000: the CUDA runtime that this module carries
    driver_version: int | None  # None: no driver
    num_devices: int
    error: str | None  # why there is no device

def device_info() -> DeviceInfo: ...
def stream_read_num_blocks() -> int:
    """Blocks that the current device runs at once; the grid to give to stream_read."""

def stream_read(data_ptr: int, num_bytes: int, out_ptr: int, num_blocks: int, stream: int) -> None:
    """Reads `num_bytes` once: what a kernel that streams weights can hope for is the time of this.

    data_ptr is 16-byte aligned, num_bytes a multiple of 16; out is uint32 [num_blocks], in which
    each block leaves the XOR of the 32-bit words it read. Asynchronous, on the current device.
    """

def apply_deltas(
    delta_ptr: int,
    num_deltas: int,
    row_ptr: int,
    position_ptr: int,
    num_positions: int,
    page_ptr: int,
    base_ptr: int,
    rows_ptr: int,
    num_keys: int,
    row_position_ptr: int,
    num_rows: int,
    stream: int,
) -> None:
    """delta int64 [U, 4], row and position int64 [Z], page and rows int32 [Q], base int64 [Q],
    row_position int64 [W]; see `tml_kernels.ops.apply_deltas`. Asynchronous, on the current device.
    """

def move_pages(
    source_ptr: int,
    source_pages: int,
    target_ptr: int,
    target_pages: int,
    from_ptr: int,
    to_ptr: int,
    num_moves: int,
    num_layers: int,
    page_bytes: int,
    stream: int,
) -> None:
    """source [L, P, page_bytes], target [L, N, page_bytes], contiguous, of the device or pinned;
    from and to int64 [I]; see `tml_kernels.ops.move_pages`. Asynchronous, on the current device.
    """

class GraphLaunch:
    """Starts captured graphs and waits for them without the interpreter. For one thread.

    Of the device that is current when it is made.
    """

    def __init__(self) -> None: ...
    def mark_start(self, stream: int) -> None:
        """Into a graph that `stream` is capturing, before anything else: when it starts."""

    def run(self, graph_exec: int, stream: int) -> tuple[int, int, int, int]:
        """Launches `torch.cuda.CUDAGraph.raw_cuda_graph_exec()` and sleeps until it is done.

        (launch, start, end, done) in nanoseconds of CLOCK_MONOTONIC: before the launch; the device
        came to `mark_start` of the graph run last, and to the end of this one; the thread knew.
        Nothing else is queued in the stream, else start and end are told too early.
        """
