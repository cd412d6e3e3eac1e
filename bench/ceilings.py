"""`python -m bench ceilings`: what this GPU reaches at best, measured the way the ops are.

Bandwidth of a device copy (bytes read plus bytes written) and of a read-only stream, the rate of a
bf16 matrix product of random data, and the cost of launching a kernel that does nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .machine import clocks, describe, machine
from .report import rate, read_json, text_table, write_json
from .stats import Summary
from .timing import Call, CudaTimer, Timer

STREAM_BYTES = 4 << 30
MATRIX = 8192


@dataclass(frozen=True)
class Ceilings:
    """bytes/s and flop/s; launch_us: an empty kernel between two events, and within a graph."""

    copy: float
    read: float | None
    matmul_bf16: float
    launch_event_us: float
    launch_graph_us: float
    read_why_not: str = ""

    @property
    def bandwidth(self) -> float:
        """The most bytes/s that anything reached: what a fraction is a fraction of."""
        return max(self.copy, self.read or 0.0)

    def floor_us(self, num_bytes: int, flops: int) -> float:
        """No run that moves so many bytes and does so many operations takes less."""
        return 1e6 * max(num_bytes / self.bandwidth, flops / self.matmul_bf16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")


def main(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("no GPU: there is nothing to measure")
        return 2
    before, info = clocks(), machine()
    result = measure(CudaTimer())
    after = clocks()
    print(describe(info, after))
    print(show(result))
    if args.json:
        content = {"machine": info, "clocks": {"before": before, "after": after}}
        write_json(args.json, content | {"ceilings": asdict(result)})
    return 0


def show(c: Ceilings) -> str:
    rows = [
        ("device copy, read + written", rate(c.copy, "B/s")),
        ("read-only stream", rate(c.read, "B/s") if c.read else c.read_why_not),
        (f"bf16 product, {MATRIX}^3", rate(c.matmul_bf16, "flop/s")),
        ("empty kernel between events", f"{c.launch_event_us:.2f} us"),
        ("empty kernel in a graph", f"{c.launch_graph_us:.2f} us"),
    ]
    return text_table(("ceiling", "measured"), rows)


def measure(timer: Timer, *, repeats: int = 20, device: str = "cuda", scale: int = 1) -> Ceilings:
    """scale: divides all sizes, for tests."""
    num_bytes = STREAM_BYTES // scale
    # Random bytes: constant data reads faster than any real tensor would.
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    half = num_bytes // 2
    read, why_not = _read_call(source)
    side = MATRIX // scale
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(left)
    one = torch.zeros(1, device=device)
    calls: dict[str, list[Call]] = {
        "copy": [lambda: source[:half].copy_(source[half:])],
        "matmul": [lambda: torch.mm(left, right, out=product)],
        "empty": [lambda: one.zero_()],
    }
    if read is not None:
        calls["read"] = [read]
    us = {name: Summary.of(x).median for name, x in timer.events(calls, repeats).us.items()}
    graph_us = Summary.of(timer.graph({"empty": calls["empty"]}, repeats).us["empty"]).median
    return Ceilings(
        copy=2 * half / us["copy"] * 1e6,
        read=num_bytes / us["read"] * 1e6 if "read" in us else None,
        matmul_bf16=2 * side**3 / us["matmul"] * 1e6,
        launch_event_us=us["empty"],
        launch_graph_us=graph_us,
        read_why_not=why_not,
    )


def known(path: Path | None, timer: Timer) -> Ceilings:
    """Those that --json wrote to `path` just before, or else measured now."""
    if path is not None and path.exists():
        return Ceilings(**read_json(path)["ceilings"])
    return measure(timer)


def _read_call(source: torch.Tensor) -> tuple[Call | None, str]:
    """A call that reads `source` once and writes next to nothing, or why there is none."""
    if source.device.type != "cuda":
        return None, "no GPU"
    try:
        from tml_kernels import _cuda
    except ImportError as error:
        return None, f"tml_kernels._cuda is not built: {error}"[:200]
    num_blocks = _cuda.stream_read_num_blocks()
    sink = torch.zeros(num_blocks, dtype=torch.int32, device=source.device)

    def read() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        _cuda.stream_read(source.data_ptr(), source.numel(), sink.data_ptr(), num_blocks, stream)

    return read, ""
