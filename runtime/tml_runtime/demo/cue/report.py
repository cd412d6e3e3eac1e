"""report.json and report.md of a training run: how the weights were made and how good they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import TmlRuntimeError
from ...model.weights import named_tensors
from .evaluate import LONG, LOST, SHORT
from .speech import digest
from .trainer import WEIGHTS, Trainer
from .words import CONFIG

REPORT, TEXT = "report.json", "report.md"

# What the model is meant to reach on held-out clean episodes: (kind, task, figure, least or most).
TARGETS = (
    ("clean", "wait_tone", "exact_percent", 97.0),
    ("clean", "wait_flash", "exact_percent", 97.0),
    ("clean", "speak", "yielded_percent", 98.0),
    ("clean", "speak", "held_percent", 98.0),
    ("clean", "count_tone", "near_percent", 95.0),
    ("clean", "count_flash", "near_percent", 95.0),
    ("clean", "count_motion", "near_percent", 95.0),
    ("long", "count_tone", "near_percent", 95.0),
    ("long", "count_flash", "near_percent", 95.0),
    ("long", "count_motion", "near_percent", 95.0),
    ("clean", "cue", "exact_percent", 97.0),
    ("clean", "cue", "false_yes_a_minute_of_speech", 1.0),
)


class ReportError(TmlRuntimeError):
    """A report that is missing or cannot be read; says what to do."""


def training_report(trainer: Trainer, loss: Mapping[str, float]) -> dict[str, Any]:
    """loss: of tokens by task, a mean over the newest steps."""
    weights = named_tensors(CONFIG, trainer.weights)
    return {
        "schema": "tml-cue-report",
        "version": 1,
        "seed": trainer.seed,
        "steps": trainer.step,
        "cpu_seconds": round(trainer.cpu_seconds, 1),
        "parameters": sum(named.view.numel() for named in weights),
        "loss": {task: round(value, 5) for task, value in sorted(loss.items())},
        "trained_on": {**trainer.speech.hashes, **trainer.footage.hashes},
    }


def weights_digest(folder: Path) -> str:
    """SHA-256 of a folder's checkpoint, by which figures belong to it."""
    import numpy as np

    return digest(np.frombuffer((folder / WEIGHTS).read_bytes(), np.uint8))


def read_report(folder: Path) -> dict[str, Any]:
    """Raises ReportError."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="ascii"))
        assert isinstance(report["trained_on"], dict)
        return report
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ReportError(
            f"{folder / REPORT}: no report of a training run ({error!r}), so nobody knows what the "
            "model was trained on; train one with `python -m tml_runtime.demo.train --out DIR`"
        ) from error


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    text = json.dumps(report, indent=2, ensure_ascii=True, allow_nan=False)
    (folder / REPORT).write_text(text + "\n", encoding="ascii")
    (folder / TEXT).write_text("\n".join(_lines(report)) + "\n", encoding="ascii")


def target_rows(figures: Mapping[str, Any]) -> list[tuple[str, float, float, bool]]:
    """(what, figure, target, reached) of every target that was measured."""
    rows = []
    for kind, task, name, target in TARGETS:
        value = figures.get(kind, {}).get(task, {}).get(name)
        if value is not None:
            reached = value <= target if "minute" in name else value >= target
            rows.append((f"{kind} {task} {name}", value, target, reached))
    return rows


def _lines(report: Mapping[str, Any]) -> list[str]:
    lines = [
        "# Training report of the cue model",
        "",
        f"{report['parameters']:,} parameters, {report['steps']} steps, seed {report['seed']}, "
        f"{report['cpu_seconds']:.0f} CPU seconds.",
        "Written by `python -m tml_runtime.demo.train`.",
        "",
        "| task | loss of first-step tokens for each word due, last steps |",
        "| --- | --- |",
        *(f"| {task} | {value:.4f} |" for task, value in report["loss"].items()),
        "",
        "Trained on (SHA-256 of the samples as decoded):",
        "",
        *(f"- {name} `{value}`" for name, value in report["trained_on"].items()),
    ]
    if "figures" in report:
        lines += ["", *_figures(report)]
    return lines


def _figures(report: Mapping[str, Any]) -> list[str]:
    figures = report["figures"]
    lines = [
        "## Held-out seeds and recordings, streamed",
        "",
        "Through `InteractionModel.tick`, nothing teacher-forced, greedy draws. exact: words in",
        "the very tick in which they are due; yielded: interruptions with no word from the second",
        "tick after their first on; held: one-tick backchannels that stopped nothing; near: counts",
        f"right within one. An episode has {SHORT} ticks (clean; lossy: {100 * LOST:g} % of quiet",
        f"ticks lost) or {LONG} (long); ten seconds of sound and pictures stay in the cache.",
        "",
        "| target | figure | reached |",
        "| --- | --- | --- |",
    ]
    for what, value, target, reached in target_rows(figures):
        relation = "<=" if "minute" in what else ">="
        lines.append(f"| {what} {relation} {target:g} | {value:g} | {'yes' if reached else 'NO'} |")
    for kind, tasks in figures.items():
        for task, row in tasks.items():
            values = ", ".join(f"{name} {value:g}" for name, value in row.items())
            lines += ["", f"**{kind} {task}**: {values}"]
    lines += ["", "Measured with (SHA-256 of the samples as decoded):", ""]
    lines += [f"- {name} `{value}`" for name, value in report["measured_with"].items()]
    return lines
