"""`tml-runtime top`: a live table of what a server's runtime does, from its GET /status."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO
from urllib.parse import urlsplit

from ._optional import require
from .errors import TmlRuntimeError

DEFAULT_URL = "http://127.0.0.1:8760"
MAX_BYTES = 16 << 20  # of an answer; one with a thousand sessions has some hundred KiB
TIMEOUT_S = 5.0
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 60
_PURPOSE = "show the live table"

Status = dict[str, Any]


class StatusError(TmlRuntimeError, RuntimeError):
    """The server cannot be reached, or what it answers is no status. One line."""

    def __init__(self, message: str) -> None:
        super().__init__(_plain(message))


def run_top(
    url: str,
    *,
    once: bool = False,
    as_json: bool = False,
    every_s: float = 1.0,
    token: str | None = None,
    stream: TextIO | None = None,
) -> None:
    """Poll `url`/status and show it until Ctrl-C, or once; as_json: one line of JSON each time.

    Raises StatusError, and MissingExtraError where rich is not installed and is needed.
    """
    out = sys.stdout if stream is None else stream
    if as_json:
        _repeat(
            url,
            token,
            once,
            every_s,
            lambda status: print(json.dumps(status), file=out, flush=True),
        )
        return
    console = require("rich.console", _PURPOSE, extra="serve").Console(file=out)
    if once:
        console.print(frame(fetch(url, token), url))
        return
    live = require("rich.live", _PURPOSE, extra="serve")
    first = frame(fetch(url, token), url)  # an error before the screen is taken
    with live.Live(first, console=console, auto_refresh=False, screen=console.is_terminal) as shown:
        _repeat(
            url, token, once, every_s, lambda status: shown.update(frame(status, url), refresh=True)
        )


def _repeat(
    url: str, token: str | None, once: bool, every_s: float, show: Callable[[Status], None]
) -> None:
    while True:
        show(fetch(url, token))
        if once:
            return
        time.sleep(every_s)


def fetch(url: str, token: str | None = None) -> Status:
    """The status of the server at `url`, as `Runtime.status` made it. Raises StatusError."""
    base = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        parts = urlsplit(base)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise StatusError(f"{url!r} is not an http address such as {DEFAULT_URL}")
        request = urllib.request.Request(f"{base}/status", headers={"Accept": "application/json"})
        if token is not None:
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            body = answer.read(MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise StatusError(f"{base}/status answers {error.code} {error.reason}") from error
    except (OSError, ValueError) as error:  # URLError, timeouts and resets are OSErrors
        reason = getattr(error, "reason", None) or error
        raise StatusError(f"cannot reach {base}: {reason}") from error
    except Exception as error:  # http.client has errors of its own for what is not HTTP
        raise StatusError(f"{base} does not speak HTTP: {error!r}") from error
    return _checked(body, base)


def _checked(body: bytes, base: str) -> Status:
    wrong = f"{base}/status is not the status of a tml-runtime server"
    if len(body) > MAX_BYTES:
        raise StatusError(f"{wrong}: more than {MAX_BYTES} bytes")
    try:
        status = json.loads(body)
        report, sessions = status["report"], status["sessions"]
        if not (report["period_ms"] > 0 and isinstance(report["tick_ms"], dict)):
            raise ValueError("no period, or no times")
        if not all(isinstance(session, dict) for session in sessions):
            raise ValueError("sessions are not objects")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StatusError(f"{wrong}: {error!r}") from error
    return status


def frame(status: Status, url: str) -> Any:
    """One picture of `status`, for rich. Raises StatusError for a status that lacks something."""
    try:
        return _frame(_plain_data(status), _plain(url))
    except (
        KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        raise StatusError(f"{url}: the status cannot be shown: {error!r}") from error


def _frame(status: Status, url: str) -> Any:
    group = require("rich.console", _PURPOSE, extra="serve").Group
    panel = require("rich.panel", _PURPOSE, extra="serve").Panel
    text = require("rich.text", _PURPOSE, extra="serve").Text
    report = status["report"]
    period_ms, misses = float(report["period_ms"]), int(report["misses"])
    used = report["slots"] - report["slots_free"]
    state = text(
        f"{report['mode']}   ticks {report['ticks']}   sessions {used} of {report['slots']}   "
        f"refused {_num_refused(status)}   faults {report['faults']}"
    )
    missed = text(f"misses {misses}", style="bold red" if misses else "green")
    missed.append(_counts(report["misses_by_reason"], prefix="   "), style="red")
    recent = [float(ms) for ms in status.get("recent_ms", [])][-_SPARK_WIDTH:]
    lines = [
        _times_table(report, period_ms),
        missed,
        text.assemble("recent ", (sparkline(recent, period_ms), "cyan")),
        text(f"holds {_counts(report['kv_pages']).strip() or 'no'} pages"),
        text(_gpu_line(report)),
    ]
    if (box := report["black_box"]) is not None:
        counts = _counts({name: box[name] for name in ("written", "skipped", "failed")})
        lines.append(text(f"black box {counts.strip() or 'nothing yet'}   {box['error']}"))
    return panel(
        group(state, "", *lines, "", _session_table(status["sessions"])),
        title=text(f"tml-runtime {url}"),
        title_align="left",
        border_style="cyan",
    )


def _num_refused(status: Status) -> int:
    """Of a service, what it refuses before its runtime is asked is counted, too."""
    if (service := status.get("service")) is not None:
        return sum(service["counts"]["refused"].values())
    return int(status["report"]["sessions_refused"])


def _times_table(report: Mapping[str, Any], period_ms: float) -> Any:
    table = _table("ms", "p50", "p99", "p99.9", "max", f"max of {period_ms:g} ms")
    rows = {"tick": report["tick_ms"], "wake": report["wake_ms"], **report["stages_ms"]}
    for name, ms in rows.items():
        values = [ms[key] for key in ("p50", "p99", "p999", "max")]
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        share = (values[-1] or 0.0) / period_ms
        color = "green" if share < 0.5 else ("yellow" if share < 1 else "red")
        filled = round(24 * min(1.0, max(0.0, share)))
        bar = f"[{color}]{'█' * filled}{'·' * (24 - filled)}[/]"
        table.add_row(name, *cells, bar, style="bold" if name == "tick" else None)
    return table


def _session_table(sessions: Sequence[Mapping[str, Any]]) -> Any:
    columns = ("ticks", "missing_windows", "shed_frames", "lost_outputs", "skipped_ticks")
    table = _table("session", "state", "age s", *(name.replace("_", " ") for name in columns))
    for session in sessions:
        counts = [str(session.get(name, "-")) for name in columns]
        age = f"{float(session['age_s']):.1f}"
        table.add_row(str(session["id"]), str(session["state"]), age, *counts)
    return table


def _table(*columns: str) -> Any:
    table = require("rich.table", _PURPOSE, extra="serve").Table(box=None, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", style="", no_wrap=True)
    return table


def _gpu_line(report: Mapping[str, Any]) -> str:
    gpu = report["gpu"]
    if gpu is None:
        return f"GPU: {report['gpu_note']}"
    held = ", ".join(gpu["throttle"]) or "nothing"
    return (
        f"GPU: {gpu['power_w']:.0f} W   {gpu['sm_mhz']} MHz   {gpu['temperature_c']} °C   "
        f"{gpu['memory_used_bytes'] / 2**30:.1f} GiB   clocks held by {held}"
    )


def sparkline(values_ms: Sequence[float], period_ms: float) -> str:
    """One block per tick; a full one took the period or more.

    >>> sparkline([0, 50, 100, 199, 350], 200)
    '▁▃▅██'
    """
    top = len(_SPARKS) - 1
    return "".join(
        _SPARKS[min(top, int(max(ms, 0) / period_ms * len(_SPARKS)))] for ms in values_ms
    )


def _counts(counts: Mapping[str, int], prefix: str = " ") -> str:
    return "".join(f"{prefix}{name} {count}" for name, count in counts.items() if count)


def _plain_data(value: Any) -> Any:
    """A status whose every text is plain, keys too."""
    if isinstance(value, dict):
        return {_plain(key): _plain_data(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain_data(item) for item in value]
    return _plain(value) if isinstance(value, str) else value


def _plain(text: str) -> str:
    """`text`, cut and without what a terminal or rich would take for a command."""
    clean = "".join(c if c.isprintable() else "·" for c in text[:300])
    return clean.replace("[", "(").replace("]", ")")
