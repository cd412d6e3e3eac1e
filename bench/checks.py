"""What one section of `bench accept` found, read from the files that its command wrote.

A check is real when something was run and compared. What could not run is a skipped check with its
reason; it never counts as passed.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .paths import ROOT
from .process import Finished
from .report import clip, rate, read_json

Result = Literal["passed", "failed", "skipped"]
TEXT_LIMIT = 4000  # characters of one failure that are kept
MAX_FAILURES = 200  # of one section that are listed one by one


@dataclass(frozen=True)
class Check:
    """count: how many checks of one kind and result this line stands for.

    us, fraction: of a timed one, microseconds and the part of the measured ceiling it reached.
    """

    section: str
    name: str
    result: Result
    detail: str = ""
    count: int = 1
    us: float | None = None
    fraction: float | None = None


def _output(text: str) -> str:
    """Of a command, without this machine's folders, since results are shared."""
    return clip(text.replace(f"{ROOT}/", ""), TEXT_LIMIT)


def unfinished(section: str, done: Finished) -> Check:
    """For a command that left no readable result. One name for all: `compare` looks for it."""
    detail = f"{done.why()}\n{_output(done.output)}"
    return Check(section, "ran to its end", "failed", detail)


def from_build(section: str, done: Finished) -> list[Check]:
    ok = done.rc == 0
    detail = "" if ok else f"{done.why()}\n{_output(done.output)}"
    return [Check(section, "extensions build in place", "passed" if ok else "failed", detail)]


def from_backends(section: str, done: Finished) -> list[Check]:
    """Of backend_info(), printed as JSON in the last line."""
    try:
        info = json.loads(done.output.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return [unfinished(section, done)]
    checks = [Check(section, "the package imports", "passed", f"version {info['version']}")]
    for name, state in info["extensions"].items():
        built = state == "built"
        checks.append(Check(section, name, "passed" if built else "skipped", clip(state, 500)))
    for name, backends in info["ops"].items():
        if backends["why"]:
            checks.append(Check(section, f"kernel of {name}", "skipped", backends["why"]))
    return checks


def from_pytest(section: str, done: Finished, report: Path, *, all_needed: bool) -> list[Check]:
    """Of a junit file. all_needed: running out of time is a failure, not a skipped rest."""
    checks: list[Check] = []
    passed, reasons = 0, Counter()
    if report.exists():
        try:
            cases = list(ElementTree.parse(report).getroot().iter("testcase"))
        except ElementTree.ParseError as error:
            return [Check(section, "pytest's report", "failed", f"{error}\n{done.why()}")]
        for case in cases:
            bad = case.find("failure") if case.find("failure") is not None else case.find("error")
            skipped = case.find("skipped")
            if bad is not None:
                name = f"{case.get('classname', '')}::{case.get('name', '')}"
                text = f"{bad.get('message', '')}\n{bad.text or ''}"
                checks.append(Check(section, name, "failed", _output(text.strip())))
            elif skipped is not None:
                reasons[skipped.get("message") or "no reason given"] += 1
            else:
                passed += 1
    if done.timed_out:  # the report counts tests as passed that were stopped after their set-up
        counted = re.findall(r"(\d+) passed", done.output)
        passed = min(passed, int(counted[-1]) if counted else 0)
    failures = len(checks)
    if failures > MAX_FAILURES:
        rest = Check(section, "more failing tests", "failed", count=failures - MAX_FAILURES)
        checks = [*checks[:MAX_FAILURES], rest]
    if passed:
        checks.insert(0, Check(section, "tests", "passed", count=passed))
    for reason, count in reasons.items():
        checks.append(Check(section, "tests", "skipped", clip(reason, 500), count=count))
    if done.timed_out:
        result: Result = "failed" if all_needed else "skipped"
        detail = f"{done.why()}; tests not reached did not run\n{clip(done.output, 1500)}"
        checks.append(Check(section, "all tests in time", result, detail))
    elif done.rc == 5 and not checks:
        checks.append(Check(section, "tests", "skipped", "pytest found no test of this kind"))
    elif done.rc not in (0, 5) and not failures:
        checks.append(unfinished(section, done))
    return checks


def from_compile(section: str, done: Finished, report: Path) -> list[Check]:
    content = _read(report)
    if content is None:
        return [unfinished(section, done)]
    failures = content["failures"]
    good = max(0, content["checked"] - len(failures))
    checks = [Check(section, "kernels compile", "passed", f"{good}", count=good)] if good else []
    for failure in failures[:MAX_FAILURES]:
        name, _, text = failure.partition(": ")
        checks.append(Check(section, name, "failed", clip(text, TEXT_LIMIT)))
    return checks


def from_ceilings(section: str, done: Finished, report: Path) -> list[Check]:
    content = _read(report)
    if content is None:
        return [unfinished(section, done)]
    c = content["ceilings"]
    checks = [
        Check(section, "device copy, read + written", "passed", rate(c["copy"], "B/s")),
        Check(section, "bf16 matrix product", "passed", rate(c["matmul_bf16"], "flop/s")),
        Check(section, "empty kernel in a graph", "passed", us=c["launch_graph_us"]),
    ]
    if c["read"]:
        checks.append(Check(section, "read-only stream", "passed", rate(c["read"], "B/s")))
    else:
        checks.append(Check(section, "read-only stream", "skipped", c["read_why_not"]))
    return checks


def from_op(section: str, done: Finished, report: Path) -> list[Check]:
    """One line for the gate, one for each timed case and variant, one for what was left out."""
    content = _read(report)
    if content is None:
        return [unfinished(section, done)]
    op, gate = content["op"], content["gate"]
    good = gate["checked"] - len(gate["failures"])
    where = f"against the float64 oracle on {gate['device']}"
    checks = [Check(section, f"{op}: gate", "passed", where, good)] if good else []
    for case, text in gate["failures"].items():
        checks.append(Check(section, f"{op}: {case}", "failed", clip(text, TEXT_LIMIT)))
    if content["not_timed"]:
        checks.append(Check(section, f"{op}: times", "skipped", content["not_timed"]))
    for case in content["results"]:
        checks += _timed(section, op, case)
    left_out = dict(content["missing"])
    left_out |= dict.fromkeys(content["out_of_time"], "no time left")
    for name, why in left_out.items():
        checks.append(Check(section, f"{op}: {name}", "skipped", why))
    # Status 1 is a check that failed, or an exception that nothing caught.
    crashed = done.rc == 1 and all(check.result != "failed" for check in checks)
    if done.timed_out or crashed or done.rc not in (0, 1):
        # Checked, and not timed once in all of its time: the first call never returned.
        hangs = not done.cut and not content["results"] and not content["not_timed"]
        result: Result = "skipped" if done.timed_out and not hangs else "failed"
        checks.append(Check(section, f"{op}: the rest", result, unfinished(section, done).detail))
    return checks


def _timed(section: str, op: str, case: dict[str, Any]) -> list[Check]:
    checks = []
    for variant, row in case["variants"].items():
        name = f"{op} {case['case']}: {variant}"
        detail = f"{rate(row['bytes_per_s'], 'B/s')}, {rate(row['flops_per_s'], 'flop/s')}"
        time, fraction = row["cold_us"]["median"], row["fraction"]
        checks.append(Check(section, name, "passed", detail, us=time, fraction=fraction))
    for name, why in case["skipped"].items():
        ours = name == "ours"  # a peer that fails is no fault of ours
        result: Result = "failed" if ours else "skipped"
        checks.append(Check(section, f"{op} {case['case']}: {name}", result, why))
    return checks


def from_tick(section: str, done: Finished, report: Path) -> list[Check]:
    content = _read(report)
    if content is None:
        return [unfinished(section, done)]
    tick = content["tick_ms"]
    times = f"p50 {tick['p50']:.2f}, p99 {tick['p99']:.2f}, max {tick['max']:.2f} ms"
    label = f"{content['ticks']} ticks, {content['sessions']} sessions, {content['device']}"
    ran: Result = "passed" if content["ticks"] > 0 and done.rc == 0 else "failed"
    detail = times if ran == "passed" else f"{times}; {done.why()}"
    checks = [Check(section, label, ran, detail, us=1000 * tick["p50"])]
    if content["realtime"]:
        missed: Result = "failed" if content["misses"] else "passed"
        checks.append(Check(section, "no tick missed", missed, f"{content['misses']} misses"))
    return checks


def from_host(section: str, done: Finished, report: Path) -> list[Check]:
    """Its times are in the detail alone: a host's vary too much to be compared run by run."""
    content = _read(report)
    if content is None or done.rc != 0:
        return [unfinished(section, done)]
    checks = []
    for row in content["rows"]:
        times = {name: value["p50"] for name, value in row.items() if name.endswith("_us")}
        detail = ", ".join(f"{name.removesuffix('_us')} {us:.0f}" for name, us in times.items())
        label = f"{row['ticks']} ticks, {row['sessions']} sessions, video {row['video']}"
        checks.append(Check(section, label, "passed", f"us p50: {detail}"))
    return checks


def _read(report: Path) -> dict[str, Any] | None:
    try:
        return read_json(report)
    except (OSError, ValueError):
        return None


def totals(checks: Sequence[Check]) -> dict[str, int]:
    """{"passed": ..., "failed": ..., "skipped": ..., "real": passed + failed}."""
    count = Counter()
    for check in checks:
        count[check.result] += check.count
    result = {name: count[name] for name in ("passed", "failed", "skipped")}
    return result | {"real": result["passed"] + result["failed"]}
