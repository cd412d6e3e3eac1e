"""Run one command under a time limit, with everything it started, and keep what it printed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .paths import ROOT

GRACE_S = 10.0  # after an interrupt: pytest then still writes its report
_running: set[subprocess.Popen] = set()  # of all threads
_lock = threading.Lock()  # of _running


@dataclass(frozen=True)
class Finished:
    """rc: exit status; negative for a signal. output: stdout and stderr together, in order. cut:
    what it ran out of is the time of all, not its own."""

    command: tuple[str, ...]
    rc: int
    seconds: float
    timed_out: bool
    output: str
    cut: bool = False

    def why(self) -> str:
        """How it ended, for a report: "exit status 1", "killed by SIGSEGV", ..."""
        if self.timed_out:
            return f"stopped after {self.seconds:.0f} s"
        if self.rc < 0:
            return f"killed by {signal.Signals(-self.rc).name}"
        return f"exit status {self.rc}"


def run(command: Sequence[str], *, limit_s: float, env: Mapping[str, str]) -> Finished:
    """Run in the checkout's root. At the limit the command is interrupted, then its whole process
    group is killed. An absent program is exit status 127, as in a shell."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=dict(env), stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Finished(tuple(command), 127, 0.0, False, str(error))
        with _lock:
            _running.add(process)
        try:
            timed_out = not _wait(process, limit_s)
            if timed_out:
                process.send_signal(signal.SIGINT)
                _wait(process, GRACE_S)
        finally:
            with _lock:
                _running.remove(process)
                _kill(process)  # what it left behind, or itself
        rc = process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Finished(tuple(command), rc, time.monotonic() - started, timed_out, text)


def stop_all() -> None:
    """Kill every command that runs now, with everything it started; each `run` then returns."""
    with _lock:
        for process in _running:
            _kill(process)


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen, seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
