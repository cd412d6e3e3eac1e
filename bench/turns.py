"""Processes that prepare side by side and are timed one after another.

Starting, compiling and checking an op takes longer than timing it. So all start together; each says
when it is ready, and when all are, or have had long enough, they take turns by a file lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

PATIENCE_S = 120.0  # for the others, after being ready oneself: one may have crashed


@contextlib.contextmanager
def turn(
    folder: Path | None, name: str, num_processes: int, *, patience_s: float = PATIENCE_S
) -> Iterator[None]:
    """The body runs while no other process's does. Files are made in `folder`, which they share;
    None: there are no others."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.ready").touch()
    give_up = time.monotonic() + patience_s
    while len(list(folder.glob("*.ready"))) < num_processes and time.monotonic() < give_up:
        time.sleep(0.02)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel gives it back whatever becomes of us
        yield
