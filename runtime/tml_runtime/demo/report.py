"""report.json: what a run was and what came of it. docs/report.md describes every field."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tml_kernels

from ..host import host_facts
from ..model import InteractionModel, ModelConfig
from ..model.parts import PAGE_ROWS
from .client import Client
from .decode import SAMPLE_RATE
from .prepare import TIMED, Options, make_budget, tokens_per_tick

SCHEMA = "tml-runtime-report"
SCHEMA_VERSION = 1
UNTRAINED = "untrained weights: shows the loop, not a conversation"


def note_on(model: InteractionModel) -> str:
    """What a reader must know about a run of `model`; empty when its weights are trained."""
    return UNTRAINED if model.report.random else ""


def build_report(
    *,
    options: dict[str, Any],
    model: InteractionModel,
    runtime_report: dict[str, Any],
    clients: Sequence[Client],
    media: dict[str, Any],
    kv: dict[str, Any],
    speech_s: float,
    interrupted: bool,
) -> dict[str, Any]:
    """The report as plain data, in the order in which it is written.

    Of a run on a virtual clock it holds no measured time: the same options on the same machine
    give the same report. `runtime_report` is `Runtime.report`'s; `options`, `media` and `kv` go in
    as they are.
    """
    virtual = runtime_report["mode"] == "virtual"
    counts = ("skipped", "missing", "dropped_samples", "shed_frames", "lost_outputs", "faults")
    nothing = dict.fromkeys(("p50", "p99", "p999", "max"))
    device, ops = model.device.type, tml_kernels.backend_info()["ops"]
    return {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "mode": "fast" if virtual else "realtime",
        "interrupted": interrupted,
        **options,
        "period_ms": runtime_report["period_ms"],
        "ticks": runtime_report["ticks"] + runtime_report["skipped"],
        "misses": runtime_report["misses"],
        "misses_by_reason": runtime_report["misses_by_reason"],
        "tick_ms": nothing if virtual else _rounded(runtime_report["tick_ms"]),
        "wake_ms": nothing if virtual else _rounded(runtime_report["wake_ms"]),
        "stages_ms": {}
        if virtual
        else {name: _rounded(ms) for name, ms in runtime_report["stages_ms"].items()},
        **{name: runtime_report[name] for name in counts},
        "kv": kv,
        "scheduling": runtime_report["scheduling"],
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": str(model.report),
        "note": note_on(model),
        "backends": {op: info[device] for op, info in ops.items()},
        "backend_reasons": {op: info["why"] for op, info in ops.items() if device == "cuda"},
        "media": media,
        "clients": [client_report(client, speech_s) for client in clients],
        "host": host_facts(),
        "tml_kernels": tml_kernels.__version__,
    }


def kv_report(
    options: Options, config: ModelConfig, runtime_report: dict[str, Any]
) -> dict[str, Any]:
    """What was to stay in the model's memory, and the pages that it took.

    `kept_s`: between these two seconds' worth is what a session keeps once its pages are dropped,
    since the newest page holds anything from one token up to a page.
    """
    budget = {c.name.lower(): pages for c, pages in make_budget(options, config).pages().items()}
    period_s = config.layout.period_ms / 1000
    kept_s = {}
    for name, count in tokens_per_tick(options, config).items():
        page_s = PAGE_ROWS / count * period_s
        kept_s[name] = [round((budget[name] - n) * page_s, 3) for n in (1, 0)]
    return {
        "keep_s": {name: options.keep_s(name) for name in TIMED},
        "kept_s": kept_s,
        "page_tokens": PAGE_ROWS,
        "budget_pages": budget,
        "pages": runtime_report["kv_pages"],
        "pages_most": runtime_report["kv_pages_most"],
        "pages_dropped": runtime_report["kv_pages_dropped"],
    }


def client_report(client: Client, speech_s: float) -> dict[str, Any]:
    """What one session was given and what it answered."""
    source, answers = client.source, client.answers
    stats = client.session.stats
    pcm = answers.pcm(speech_s)
    actions = [out.name for out in answers.actions]
    return {
        "media_start_s": source.start_s,
        "audio_pieces": source.num_pieces,
        "video_frames": source.num_frames,
        "refused": source.refused,
        "late": source.late,
        "ticks": stats.ticks,
        "missing_windows": stats.missing_windows,
        "shed_frames": stats.shed_frames,
        "speech_s": sum(len(out.pcm) for out in answers.speech) / SAMPLE_RATE,
        "speech_dbfs": dbfs(pcm),
        "speech_sha256": hashlib.sha256(pcm.tobytes()).hexdigest(),
        "text": answers.text,
        "text_tokens": sum(len(out.ids) for out in answers.texts),
        "actions": {name: actions.count(name) for name in sorted(set(actions))},
        "fault": answers.fault,
    }


def dbfs(pcm: np.ndarray) -> float | None:
    """RMS in dB of a full-scale square wave, rounded to 0.01 dB; None for silence."""
    power = float(np.mean(np.square(pcm, dtype=np.float64))) if pcm.size else 0.0
    return round(10 * math.log10(power), 2) if power > 0 else None


def write_report(path: Path, report: dict[str, Any]) -> None:
    """ASCII JSON, keys in the order of docs/report.md; NaN is refused."""
    text = json.dumps(report, indent=2, ensure_ascii=True, allow_nan=False)
    path.write_text(text + "\n", encoding="ascii")


def summary_lines(report: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """The last lines of a run. measured: `Runtime.report`'s percentiles, also of a fast run."""
    times = ", ".join(
        f"{label} {measured['tick_ms'][key]:.1f}"
        for label, key in (("p50", "p50"), ("p99", "p99"), ("p99.9", "p999"), ("max", "max"))
        if measured["tick_ms"][key] is not None
    )
    seconds = report["ticks"] * report["period_ms"] / 1000
    what = "on a virtual clock" if report["mode"] == "fast" else "in real time"
    return [
        f"{report['ticks']} ticks ({seconds:g} s {what}), {report['misses']} misses",
        f"tick ms: {times or 'no ticks'} of {report['period_ms']}",
    ]


def _rounded(values: dict[str, float | None]) -> dict[str, float | None]:
    return {key: None if value is None else round(value, 4) for key, value in values.items()}
