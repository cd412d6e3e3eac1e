"""What a background model on the same GPU takes from ticks: products without end beside them, of a
prompt's shape and of one step's in turn, on a stream as a hand-off's `LocalModel` is given one."""

from __future__ import annotations

import threading
from typing import Any

import torch

KINDS = ("equal", "low", "green")  # streams: of the ticks' priority, of a lower one, of a few SMs
NUM_SMS = 16  # of the green context
WIDTH, ROWS = 8192, (4096, 8)  # 134 MB of bf16 weights; rows that they are multiplied with
AHEAD = 4  # products that are queued at most


class GpuLoad:
    """A context manager: the products go on inside it. SystemExit where there are no such streams,
    and on leaving where the products failed."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.products = 0
        self._error: BaseException | None = None
        self._stream = self._make_stream()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bench-load", daemon=True)

    def __enter__(self) -> GpuLoad:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        if self._error is not None and error[0] is None:
            raise SystemExit(f"--beside {self.kind}: {self._error}")

    def report(self) -> dict[str, Any]:
        """products: of both shapes; of a prompt's, 0.55 Tflop each, half of them."""
        sms = NUM_SMS if self.kind == "green" else None
        return {"kind": self.kind, "sms": sms, "products": self.products}

    def _make_stream(self) -> Any:
        if self.kind != "green":  # the tick's kernels are captured with this high priority
            return torch.cuda.Stream(priority=-1 if self.kind == "equal" else 0)
        try:
            from torch.cuda import green_contexts as contexts
        except ImportError:
            raise SystemExit("--beside green: this torch has no green contexts") from None
        if not contexts.SUPPORTED:
            raise SystemExit("--beside green: this driver has no green contexts")
        self._context = contexts.GreenContext.create(num_sms=NUM_SMS)  # lives as long as its stream
        return self._context.Stream()

    def _run(self) -> None:
        try:
            self._multiply()
        except Exception as error:  # the thread's: told where it is joined
            self._error = error

    @torch.inference_mode()
    def _multiply(self) -> None:
        weight = torch.randn(WIDTH, WIDTH, device="cuda", dtype=torch.bfloat16)
        inputs = [weight.new_ones(rows, WIDTH) for rows in ROWS]
        outs = [torch.empty_like(x) for x in inputs]
        done = [torch.cuda.Event(blocking=True) for _ in range(AHEAD)]
        with torch.cuda.stream(self._stream):
            while not self._over.is_set():
                event = done[self.products % AHEAD]
                event.synchronize()
                at = self.products % len(inputs)
                torch.mm(inputs[at], weight, out=outs[at])
                event.record()
                self.products += 1
        torch.cuda.synchronize()
