"""`tml-runtime serve` as a child process on a free local port, for as long as a context lasts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

_END_S = 10.0


@contextlib.contextmanager
def local_service(*arguments: str) -> Iterator[str]:
    """The URL of a service with these arguments of `tml-runtime serve`, and --port 0.

    Its errors go to this process's stderr. Raises RuntimeError when it does not start.
    """
    command = [sys.executable, "-m", "tml_runtime.cli", "serve", "--port", "0", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("TML_SERVE_TOKEN", None)  # it listens on loopback
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        try:
            assert child.stdout is not None
            line = child.stdout.readline()  # ends also when the child does
            if not line.startswith("listening on "):
                raise RuntimeError(
                    f"the service did not start: {line.strip() or 'it said nothing'}"
                )
            yield line.split()[-1]
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(_END_S)
            except subprocess.TimeoutExpired:
                child.kill()
