"""What a run shows while it runs: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TextIO

import numpy as np

from .._optional import require
from ..loop import Runtime
from ..metrics import CLASS_NAMES, percentiles_ms
from .client import Client, printable

_METER_DB = (-60.0, -10.0)  # empty, full
_TAIL = 48  # characters of a session's newest text


class View(Protocol):
    """A context manager; `update` may be called as often as one likes."""

    def __enter__(self) -> View: ...

    def __exit__(self, *_: object) -> None: ...

    def update(self, seconds: float) -> None:
        """`seconds` of media time have passed."""
        ...


def make_view(
    title: str,
    note: str,
    runtime: Runtime,
    clients: Sequence[Client],
    total_s: float,
    stream: TextIO,
) -> View:
    if stream.isatty():
        return TableView(title, note, runtime, clients, total_s, stream)
    return LineView(title, note, runtime, clients, total_s, stream)


class LineView:
    """A line now and then, for logs."""

    EVERY_S = 5.0  # of real time

    def __init__(
        self,
        title: str,
        note: str,
        runtime: Runtime,
        clients: Sequence[Client],
        total_s: float,
        stream: TextIO,
    ) -> None:
        self._title, self._note = title, note
        self._runtime, self._clients = runtime, clients
        self._total_s, self._stream = total_s, stream
        self._shown = time.monotonic()

    def __enter__(self) -> LineView:
        for line in (self._title, self._note):
            if line:
                print(line, file=self._stream, flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, seconds: float) -> None:
        if time.monotonic() - self._shown < self.EVERY_S:
            return
        self._shown = time.monotonic()
        report = self._runtime.report()
        tick_ms = report["tick_ms"]
        times = "no tick yet"
        if tick_ms["p50"] is not None:
            times = f"tick p50 {tick_ms['p50']:.1f} ms, max {tick_ms['max']:.1f} ms"
        text = printable(self._clients[0].answers.text[-_TAIL:]) if self._clients else ""
        held = memory_line(report["kv_pages"].values(), report["kv_pages_dropped"].values())
        line = f"{seconds:6.1f} / {self._total_s:g} s  {times}, misses {report['misses']}  "
        line += f"{held}  {text}"
        print(line, file=self._stream, flush=True)


class TableView:
    """rich's live display: the tick's stages, then what each session hears, sees and says."""

    REFRESH_S = 0.2

    def __init__(
        self,
        title: str,
        note: str,
        runtime: Runtime,
        clients: Sequence[Client],
        total_s: float,
        stream: TextIO,
    ) -> None:
        console = require("rich.console", "show the live table")
        self._title, self._note = title, note
        self._runtime, self._clients = runtime, clients
        self._total_s = total_s
        self._console = console.Console(file=stream)
        self._live: Any = None
        self._shown = 0.0

    def __enter__(self) -> TableView:
        live = require("rich.live", "show the live table")
        self._live = live.Live(self._draw(0.0), console=self._console, auto_refresh=False)
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, seconds: float) -> None:
        if time.monotonic() - self._shown < self.REFRESH_S:
            return
        self._shown = time.monotonic()
        self._live.update(self._draw(seconds), refresh=True)

    def _draw(self, seconds: float) -> Any:
        group = require("rich.console", "show the live table").Group
        panel = require("rich.panel", "show the live table").Panel
        records = self._runtime.metrics.records()
        misses = int(records["missed"].sum() + records["skipped"].sum())
        missed = f"[bold red]{misses}[/]" if misses else "[green]0[/]"
        state = f"{seconds:.1f} / {self._total_s:g} s   ticks {len(records)}   misses {missed}"
        held = records["kv_pages"][-1:].sum(0)
        memory = memory_line(held, records["kv_dropped"].sum(0))
        return panel(
            group(state, memory, "", self._stage_table(records), "", self._session_table()),
            title=self._title,
            title_align="left",
            subtitle=self._note,
            subtitle_align="left",
            border_style="cyan",
        )

    def _stage_table(self, records: np.ndarray) -> Any:
        period_ms = self._runtime.layout.period_ms
        table = _table("stage, ms", "last", "p50", "p99", "max", f"of {period_ms} ms")
        stages = self._runtime.metrics.stages
        rows = [(name, records["stage_ns"][:, column]) for column, name in enumerate(stages)]
        whole_ns = records["woke_ns"] - records["scheduled_ns"] + records["busy_ns"]
        for name, values_ns in [*rows, ("tick", whole_ns)] if len(records) else []:
            ms = percentiles_ms(values_ns)
            last = float(values_ns[-1]) / 1e6
            cells = [f"{value:.1f}" for value in (last, ms["p50"], ms["p99"], ms["max"])]
            label = f"  {name.split('.', 1)[1]}" if "." in name else name
            style = "bold" if name == "tick" else ("dim" if "." in name else None)
            share = last / period_ms
            color = "green" if share < 0.5 else ("yellow" if share < 1 else "red")
            table.add_row(label, *cells, f"[{color}]{_bar(share, 24)}[/]", style=style)
        return table

    def _session_table(self) -> Any:
        table = _table("session", "hears", "sees", "reads", "acts", "says")
        escape = require("rich.markup", "show the live table").escape
        for index, client in enumerate(self._clients):
            answers = client.answers
            says = answers.fault or client.source.ended or printable(answers.text[-_TAIL:])
            table.add_row(
                str(index),
                f"[cyan]{meter(client.source.level, 16)}[/]",
                f"{client.source.num_frames} frames",
                escape(printable(client.source.read)),
                str(len(answers.actions)),
                escape(says),
            )
        return table


def memory_line(held: Iterable[int], dropped: Iterable[int]) -> str:
    """Pages by class, in the order of CLASS_NAMES; classes that hold none are left out.

    >>> memory_line([0, 1, 5, 5, 5], [0, 0, 2, 2, 2])
    'holds 1 text, 5 audio, 5 video, 5 reply pages, 6 dropped'
    """
    counts = [f"{n} {name}" for n, name in zip(held, CLASS_NAMES, strict=True) if n]
    return f"holds {', '.join(counts) or 'no'} pages, {sum(dropped)} dropped"


def meter(rms: float, width: int) -> str:
    """A level as a bar: -60 dBFS is empty, -10 dBFS full.

    >>> meter(0.0, 4), meter(0.0178, 4), meter(1.0, 4)
    ('····', '██··', '████')
    """
    low, high = _METER_DB
    level = 20 * math.log10(rms) if rms > 0 else low
    return _bar((level - low) / (high - low), width)


def _bar(share: float, width: int) -> str:
    filled = round(width * min(1.0, max(0.0, share)))
    return "█" * filled + "·" * (width - filled)


def _table(*columns: str) -> Any:
    table = require("rich.table", "show the live table").Table(box=None, pad_edge=False)
    numbers = {"last", "p50", "p99", "max", "acts"}
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=True)
    return table
