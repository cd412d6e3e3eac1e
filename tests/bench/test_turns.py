from __future__ import annotations

import fcntl
import sys
import threading
import time
from pathlib import Path

from bench.paths import child_env
from bench.process import run
from bench.turns import turn


def test_one_at_a_time_and_none_before_all_are_ready(tmp_path: Path) -> None:
    inside, together, begun = [0], [0], []

    def take(name: str, delay_s: float) -> None:
        time.sleep(delay_s)
        ready = time.monotonic()
        with turn(tmp_path, name, 3):
            begun.append((time.monotonic(), ready))
            inside[0] += 1
            together[0] = max(together[0], inside[0])
            time.sleep(0.02)
            inside[0] -= 1

    threads = [threading.Thread(target=take, args=(f"op{i}", 0.1 * i)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [1]
    last_ready = max(ready for _, ready in begun)
    assert all(at >= last_ready for at, _ in begun)


def test_one_that_never_comes_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with turn(tmp_path, "here", 2, patience_s=0.05):
        pass


def test_a_killed_process_gives_its_turn_back(tmp_path: Path) -> None:
    code = (
        "import os, pathlib\nfrom bench.turns import turn\n"
        f"with turn(pathlib.Path({str(tmp_path)!r}), 'dead', 1):\n    os.abort()"
    )
    done = run((sys.executable, "-c", code), limit_s=60, env=child_env())
    assert done.rc < 0
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while it is taken
