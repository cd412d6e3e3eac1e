"""What a loop may have beside it in one process: a thread that burns Python, and full garbage
collections of a heap that is worth visiting."""

from __future__ import annotations

import gc
import threading
from typing import Any

EVERY_S = 1.0  # between two collections
HEAP = 200_000  # containers, as a service of some size holds


class Disturbance:
    """A context manager: both go on inside it. Enter it when the runtime runs, which freezes what
    it finds; what is frozen costs a collection nothing."""

    def __init__(self) -> None:
        self.spins = self.collections = 0
        self._heap: list[list[int]] = []
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=f"bench-{target.__name__}", daemon=True)
            for target in (self._spin, self._collect)
        ]

    def __enter__(self) -> Disturbance:
        self._heap = [[i] for i in range(HEAP)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._heap.clear()

    def report(self) -> dict[str, Any]:
        """spins: of a thousand additions each."""
        return {"spins": self.spins, "collections": self.collections, "heap": HEAP}

    def _spin(self) -> None:
        while not self._over.is_set():
            value = 0
            for i in range(1000):
                value += i
            self.spins += 1

    def _collect(self) -> None:
        while True:
            gc.collect()
            self.collections += 1
            if self._over.wait(EVERY_S):
                return
