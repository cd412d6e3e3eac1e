"""`python -m bench accept --out DIR`: everything that can be checked on this machine, in one run.

Builds the extensions in place, runs the GPU tests, measures ceilings, times each op against its
floor and peers, runs a short tick and ticks of the host alone, compiles the kernels, runs the other
tests. Writes DIR/accept.json, accept.md and log.txt. Each section is a process of its own with a
time limit; one that crashes is a failed check and the others go on. What cannot run here is listed
with its reason. Ctrl-C and SIGTERM end it and all that it started; what phases before had found
stays written. Exit status 1 when a check failed or none was real.
"""

from __future__ import annotations

import argparse
import signal
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from . import sections
from .checks import Check, totals
from .machine import clocks, describe, machine
from .paths import child_env
from .process import run, stop_all
from .report import clip, markdown_table, read_json, write_json
from .sections import Section

LOG_LIMIT = 60_000  # characters of one section's output kept in log.txt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="time for it all (default %(default)g)"
    )
    parser.add_argument(
        "--ops-seconds", type=float, default=180.0, metavar="S", help="for timing (default 180)"
    )
    parser.add_argument("--smoke", action="store_true", help="a little of everything, no build")
    parser.add_argument("--only", action="append", metavar="SECTION", help="may be repeated")


def main(args: argparse.Namespace) -> int:
    started = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):  # a background job may ignore the first
        signal.signal(number, signal.default_int_handler)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        plan = sections.plan(
            Path(scratch),
            smoke=args.smoke,
            gpu=torch.cuda.is_available(),
            ops_seconds=args.ops_seconds,
            only=args.only,
        )
        report = Report(args.out, started)
        for phase in plan:
            report.run_phase(phase, started + 60 * args.minutes)
            report.write(Path(scratch))  # after every phase: a killed run leaves what it found
    counts = totals(report.checks)
    print(f"\n{_verdict(counts)}\nwritten: {args.out}/accept.json, accept.md, log.txt")
    return 1 if counts["failed"] or not counts["real"] else 0


def _verdict(counts: dict[str, int]) -> str:
    return (
        f"{counts['real']} real checks: {counts['passed']} passed, {counts['failed']} failed; "
        f"{counts['skipped']} skipped"
    )


class Report:
    """Runs sections and keeps what they found."""

    def __init__(self, out: Path, started: float) -> None:
        self.out = out
        self.started = started
        self.checks: list[Check] = []
        self.timings: list[dict[str, Any]] = []
        self.logs: list[str] = []

    def run_phase(self, phase: Sequence[Section], deadline: float) -> None:
        """Sections of one phase run side by side; those of a timing phase stand alone."""
        with ThreadPoolExecutor(max(1, len(phase))) as pool:
            futures = [pool.submit(self._run, section, deadline) for section in phase]
            try:
                done = [future.result() for future in futures]
            except BaseException:  # an interrupt; the pool would wait until each command has ended
                stop_all()
                while wait(futures, timeout=0.1).not_done:  # one may only now have started
                    stop_all()
                raise
        for section, checks, log, seconds in done:
            self.checks += checks
            self.logs.append(log)
            self.timings.append({"section": section.name, "seconds": round(seconds, 1)})

    def _run(self, section: Section, deadline: float) -> tuple[Section, list[Check], str, float]:
        left = deadline - time.monotonic()
        why_not = section.why_not or ("" if left > 10 else "no time left")
        if why_not:
            print(f"{section.name}: skipped: {why_not}", flush=True)
            return section, [Check(section.name, section.name, "skipped", why_not)], "", 0.0
        print(f"{section.name}: {' '.join(section.command)}", flush=True)
        env = child_env() | section.env
        done = run(section.command, limit_s=min(section.limit_s, left), env=env)
        done = replace(done, cut=done.timed_out and left < section.limit_s)
        try:
            checks = section.read(done)
        except Exception as error:  # a result in an unforeseen form must not end the run
            text = f"cannot read the result: {type(error).__name__}: {error}\n{done.output}"
            checks = [Check(section.name, section.name, "failed", clip(text))]
        counts = totals(checks)
        print(f"{section.name}: {done.seconds:.0f} s, {done.why()}: {_verdict(counts)}", flush=True)
        head = f"===== {section.name}: {' '.join(done.command)} ({done.why()})\n"
        return section, checks, head + clip(done.output, LOG_LIMIT), done.seconds

    def write(self, scratch: Path) -> None:
        """accept.json, accept.md and log.txt, of all phases so far."""
        info, now = machine(), clocks()
        ops = [_result(path) for path in sorted((scratch / "ops").glob("*.json"))]
        content = {
            "kind": "accept",
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "machine": info,
            "clocks": now,
            "totals": totals(self.checks),
            "seconds": round(time.monotonic() - self.started, 1),
            "sections": self.timings,
            "checks": [asdict(check) for check in self.checks],
            "ceilings": _result(scratch / "ceilings.json").get("ceilings"),
            "ops": [op for op in ops if op],
            "tick": _result(scratch / "tick.json") or None,
            "host": _result(scratch / "host.json") or None,
        }
        write_json(self.out / "accept.json", content)
        (self.out / "accept.md").write_text(self._markdown(content))
        (self.out / "log.txt").write_text("\n".join(log for log in self.logs if log))

    def _markdown(self, content: dict[str, Any]) -> str:
        head = ("section", "check", "result", "time", "of ceiling", "detail")
        ran = [c for c in self.checks if c.result != "skipped"]
        skipped = [c for c in self.checks if c.result == "skipped"]
        failed = [c for c in self.checks if c.result == "failed"]
        parts = [
            f"# {_verdict(content['totals'])}",
            f"{content['date']}, {content['seconds']:.0f} s\n\n"
            f"{describe(content['machine'], content['clocks'])}",
            markdown_table(head, [_cells(check) for check in ran]),
            "## Skipped, and why",
            markdown_table(
                ("section", "check", "number", "reason"),
                [(c.section, c.name, str(c.count), clip(c.detail, 300)) for c in skipped],
            ),
        ]
        for check in failed:
            parts.append(f"## Failed: {check.section}: {check.name}\n\n```\n{check.detail}\n```")
        return "\n\n".join(parts) + "\n"


def _cells(check: Check) -> tuple[str, ...]:
    result = check.result if check.count == 1 else f"{check.count} {check.result}"
    time_us = "" if check.us is None else _duration(check.us)
    part = "" if check.fraction is None else f"{100 * check.fraction:.1f} %"
    detail = check.detail.splitlines()[0][:160] if check.detail else ""
    return check.section, check.name, result, time_us, part, detail


def _duration(us: float) -> str:
    return f"{us:.2f} us" if us < 10_000 else f"{us / 1000:.2f} ms"


def _result(path: Path) -> dict[str, Any]:
    """{} for a result that is not there or was cut off."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}
