"""Processes that wait for jobs: a rank for each, started once for many tests."""

from __future__ import annotations

import multiprocessing as mp
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

DEADLINE = 90.0  # seconds for a job; one that takes longer hangs


@dataclass(frozen=True)
class Raised:
    """What a rank raised in place of a result; `kind` is the name of its class."""

    kind: str
    message: str
    trace: str


@dataclass(frozen=True)
class Ended:
    """A rank's process ended in the middle of its job."""

    exitcode: int | None


class Crew:
    def __init__(self) -> None:
        self._members: list[tuple[BaseProcess, Connection]] = []

    def run(self, num_ranks: int, job: Callable[..., Any], path: Path, *args: Any) -> list[Any]:
        """`job(rank, num_ranks, init_method, *args)` on every rank; its results, by rank."""
        self._members = [m for m in self._members if m[0].is_alive()]
        while len(self._members) < num_ranks:
            self._members.append(_start())
        init_method = f"file://{path / job.__name__}"
        members = self._members[:num_ranks]
        for rank, (_, connection) in enumerate(members):
            connection.send((job, (rank, num_ranks, init_method, *args)))
        end = time.monotonic() + DEADLINE
        results = [_receive(*member, end) for member in members]
        if any(result == Ended(None) for result in results):
            self.dismiss()
            raise AssertionError(f"a rank hangs after {DEADLINE} s: {results}")
        if any(isinstance(r, Raised) and r.message.startswith("joining") for r in results):
            self.dismiss()  # torch counts the groups of a process, those that came to nothing too
        return results

    def dismiss(self) -> None:
        for process, _ in self._members:
            process.kill()
            process.join()
        self._members = []


def values(results: list[Any]) -> list[Any]:
    """Of ranks none of which raised."""
    for result in results:
        assert not isinstance(result, (Raised, Ended)), getattr(result, "trace", result)
    return results


def _start() -> tuple[BaseProcess, Connection]:
    ours, theirs = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _receive(process: BaseProcess, connection: Connection, end: float) -> Any:
    while True:
        try:
            if connection.poll(max(0.0, min(0.2, end - time.monotonic()))):
                return connection.recv()
        except (EOFError, ConnectionError):
            process.join(5)
            return Ended(process.exitcode)
        if time.monotonic() > end:
            return Ended(None)


def _work(connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            job, args = connection.recv()
        except EOFError:
            return
        try:
            with torch.inference_mode():
                result = job(*args)
        except BaseException as error:
            result = Raised(type(error).__name__, str(error), traceback.format_exc())
        if dist.is_initialized():
            dist.destroy_process_group()
        connection.send(result)
