"""How far a long run is, on a terminal or in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(total: float) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """(what is run now, one of `total` is done). A bar on a terminal, which takes rich; elsewhere a
    line for each thing run."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        console = None
    else:
        console = Console(stderr=True)
    if console is None or not console.is_terminal:
        yield lambda name: print(name, file=sys.stderr, flush=True), lambda: None
        return
    # Drawn when something is done and only then: a thread that draws would disturb what is
    # measured.
    with Progress(console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=total)

        def begin(name: str) -> None:
            bar.update(task, description=name, refresh=True)

        yield begin, lambda: bar.update(task, advance=1, refresh=True)
