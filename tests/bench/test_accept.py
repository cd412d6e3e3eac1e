from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import checks, sections
from bench.accept import Report
from bench.checks import Check, totals
from bench.host import PARTS
from bench.paths import ROOT, child_env
from bench.process import Finished, run
from bench.report import SCHEMA, clip, read_json, read_result, write_json
from bench.sections import Section

DONE = Finished(("python", "-m", "x"), 0, 1.5, False, "output")
CRASHED = Finished(("python", "-m", "x"), -11, 1.5, False, "Fatal Python error: Segmentation fault")
LATE = Finished(
    ("python", "-m", "x"), -2, 60.0, True, "..\n! KeyboardInterrupt !\n1 passed in 60.0s"
)

JUNIT = f"""<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.a" name="good" time="0.1" />
<testcase classname="tests.a" name="also_good" />
<testcase classname="tests.a" name="bad"><failure message="assert 1 == 2">E  assert 1 == 2
{ROOT}/a.py:3</failure></testcase>
<testcase classname="tests.b" name="broken"><error message="setup">no fixture</error></testcase>
<testcase classname="tests.b" name="left"><skipped message="needs a CUDA device" /></testcase>
<testcase classname="tests.b" name="out"><skipped message="needs a CUDA device" /></testcase>
</testsuite></testsuites>"""


def names(found: list[Check]) -> list[tuple[str, str, int]]:
    return [(c.name, c.result, c.count) for c in found]


def test_pytest_report_is_read(tmp_path: Path) -> None:
    report = tmp_path / "junit.xml"
    report.write_text(JUNIT)
    found = checks.from_pytest("tests", DONE, report, all_needed=True)
    assert names(found) == [
        ("tests", "passed", 2),
        ("tests.a::bad", "failed", 1),
        ("tests.b::broken", "failed", 1),
        ("tests", "skipped", 2),
    ]
    assert found[1].detail.endswith("\na.py:3")  # not where this checkout is
    assert totals(found) == {"passed": 2, "failed": 2, "skipped": 2, "real": 4}


@pytest.mark.parametrize(("all_needed", "result"), [(True, "failed"), (False, "skipped")])
def test_tests_that_ran_out_of_time(tmp_path: Path, all_needed: bool, result: str) -> None:
    report = tmp_path / "junit.xml"
    report.write_text(JUNIT)
    found = checks.from_pytest("tests", LATE, report, all_needed=all_needed)
    assert found[-1].result == result
    assert found[0].count == 1  # as pytest counts: the report has the one it was stopped in too


def test_pytest_that_left_nothing_is_a_failure(tmp_path: Path) -> None:
    (found,) = checks.from_pytest("tests", CRASHED, tmp_path / "absent.xml", all_needed=False)
    assert found.result == "failed"
    assert "SIGSEGV" in found.detail
    assert "Segmentation fault" in found.detail
    assert found.name == "ran to its end"  # whatever folder the command was given
    nothing = Finished(("pytest",), 5, 1.0, False, "no tests ran")
    (found,) = checks.from_pytest("tests", nothing, tmp_path / "absent.xml", all_needed=True)
    assert found.result == "skipped"


def test_compile_report_is_read(tmp_path: Path) -> None:
    report = tmp_path / "compile.json"
    content = {"checked": 12, "failures": ["a/k/x/sm_90: 16 bytes of local memory"], "changes": []}
    write_json(report, content)
    found = checks.from_compile("kernels", DONE, report)
    assert names(found) == [("kernels compile", "passed", 11), ("a/k/x/sm_90", "failed", 1)]
    assert checks.from_compile("kernels", CRASHED, tmp_path / "absent")[0].result == "failed"


def op_result(**changes) -> dict:
    time_us = {"count": 60, "median": 12.5, "p10": 12.0, "p90": 13.0}
    row = {
        "cold_us": time_us, "graph_us": None, "bytes_per_s": 2e12, "flops_per_s": 1e9,
        "fraction": 0.5,
    }  # fmt: skip
    case = {
        "case": "T1", "floor_us": 6.25, "noise": 0.01, "graph_l2": "warm",
        "variants": {"ours": row, "torch": row}, "skipped": {"torch (graph)": "not captured"},
    }  # fmt: skip
    gate = {"device": "cuda", "checked": 3, "failures": {}}
    return {
        "kind": "op", "op": "linear", "gate": gate, "not_timed": "", "results": [case],
        "missing": {"flashinfer": "not installed"}, "out_of_time": ["T64"],
    } | changes  # fmt: skip


def test_op_report_is_read(tmp_path: Path) -> None:
    report = tmp_path / "op.json"
    write_json(report, op_result())
    found = checks.from_op("op linear", DONE, report)
    assert names(found) == [
        ("linear: gate", "passed", 3),
        ("linear T1: ours", "passed", 1),
        ("linear T1: torch", "passed", 1),
        ("linear T1: torch (graph)", "skipped", 1),
        ("linear: flashinfer", "skipped", 1),
        ("linear: T64", "skipped", 1),
    ]
    assert (found[1].us, found[1].fraction) == (12.5, 0.5)
    raised = dataclasses.replace(DONE, rc=1, output="RuntimeError: CUDA error")
    crashed = checks.from_op("op linear", raised, report)[-1]
    assert (crashed.name, crashed.result) == ("linear: the rest", "failed")
    assert "CUDA error" in crashed.detail
    assert checks.from_op("op linear", LATE, report)[-1].result == "skipped"
    assert checks.from_op("op linear", CRASHED, report)[-1].result == "failed"


def test_an_op_that_is_never_timed_in_all_of_its_time_hangs(tmp_path: Path) -> None:
    report = tmp_path / "op.json"
    write_json(report, op_result(results=[]))
    assert checks.from_op("op linear", LATE, report)[-1].result == "failed"
    cut = dataclasses.replace(LATE, cut=True)  # there was not as much time as it may take
    assert checks.from_op("op linear", cut, report)[-1].result == "skipped"


def test_red_gate_and_failing_ours_are_failures(tmp_path: Path) -> None:
    report = tmp_path / "op.json"
    gate = {"device": "cuda", "checked": 3, "failures": {"T1-D8": "relative L2 error 1"}}
    write_json(report, op_result(gate=gate, results=[], not_timed="the gate is red: 1 of 3"))
    found = checks.from_op("op linear", DONE, report)
    assert names(found)[:3] == [
        ("linear: gate", "passed", 2),
        ("linear: T1-D8", "failed", 1),
        ("linear: times", "skipped", 1),
    ]
    status = dataclasses.replace(DONE, rc=1)  # of a red gate, which is told already
    assert checks.from_op("op linear", status, report) == found
    case = op_result()["results"][0] | {"variants": {}, "skipped": {"ours": "illegal address"}}
    write_json(report, op_result(results=[case]))
    assert ("linear T1: ours", "failed", 1) in names(checks.from_op("op linear", DONE, report))


def test_tick_report_is_read(tmp_path: Path) -> None:
    report = tmp_path / "tick.json"
    content = {
        "ticks": 50, "misses": 1, "sessions": 2, "device": "cuda", "realtime": True,
        "tick_ms": {"p50": 3.0, "p99": 4.0, "max": 5.0},
    }  # fmt: skip
    write_json(report, content)
    found = checks.from_tick("tick", DONE, report)
    assert [c.result for c in found] == ["passed", "failed"]
    write_json(report, content | {"misses": 0})
    assert [c.result for c in checks.from_tick("tick", DONE, report)] == ["passed", "passed"]
    write_json(report, content | {"realtime": False})
    assert len(checks.from_tick("tick", DONE, report)) == 1


def test_host_report_is_read(tmp_path: Path) -> None:
    report = tmp_path / "host.json"
    parts = {f"{part}_us": {"p50": n, "p99": 9} for n, part in enumerate(PARTS, 1)}
    row = {"sessions": 8, "video": "none", "ticks": 50, **parts}
    write_json(report, {"kind": "host", "rows": [row, {**row, "video": "80x80"}]})
    found = checks.from_host("host", DONE, report)
    assert [c.name for c in found] == [
        "50 ticks, 8 sessions, video none",
        "50 ticks, 8 sessions, video 80x80",
    ]
    assert {c.detail for c in found} == {"us p50: take 1, stage 2, after 3, publish 4"}
    failed = checks.from_host("host", dataclasses.replace(DONE, rc=1), report)
    assert [c.result for c in failed] == ["failed"]
    assert [c.result for c in checks.from_host("host", DONE, tmp_path / "none")] == ["failed"]


def test_backends_are_read() -> None:
    info = {
        "version": "0.1.0",
        "extensions": {"tml_kernels._core": "built", "tml_kernels._cuda": "not built: no nvcc"},
        "ops": {"a": {"why": ""}, "b": {"why": "no kernel for this op yet"}},
    }
    done = Finished(("x",), 0, 1.0, False, "a warning\n" + json.dumps(info) + "\n")
    assert [c.result for c in checks.from_backends("backends", done)] == [
        "passed", "passed", "skipped", "skipped",
    ]  # fmt: skip
    assert checks.from_backends("backends", CRASHED)[0].result == "failed"


def test_other_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    assert read_json(path) == {"schema": SCHEMA, "a": 1}
    path.write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="schema 99"):
        read_json(path)


def test_what_is_no_result_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"No such file.*absent\.json"):
        read_result(tmp_path / "absent.json", "op")
    path = tmp_path / "x.json"
    path.write_text("nothing")
    with pytest.raises(SystemExit, match=r"x\.json is not JSON: Expecting value"):
        read_result(path, "op")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SystemExit, match=r"x\.json is not JSON"):
        read_result(path, "op")
    path.write_text("[1]")
    with pytest.raises(SystemExit, match=r"x\.json: schema None, expected 1"):
        read_result(path, "op")
    write_json(path, {"kind": "tick"})
    with pytest.raises(SystemExit, match="a result of kind 'tick', expected accept or op"):
        read_result(path, "accept", "op")
    assert read_result(path, "tick") == {"schema": SCHEMA, "kind": "tick"}


def test_clip_keeps_both_ends() -> None:
    text = clip("a" * 5000 + "the end", 100)
    assert text.startswith("aaa")
    assert text.endswith("the end")
    assert len(text) < 200
    assert clip("short", 100) == "short"


def python(code: str, limit_s: float = 30.0) -> Finished:
    return run([sys.executable, "-c", code], limit_s=limit_s, env=child_env())


def test_process_keeps_output_and_status() -> None:
    done = python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert (done.rc, done.timed_out, done.why()) == (3, False, "exit status 3")
    assert "out" in done.output and "err" in done.output
    assert python("import os; os.abort()").why() == "killed by SIGABRT"
    assert run(["/no/such/program"], limit_s=1.0, env={}).rc == 127


def test_process_is_interrupted_first_and_its_children_die_too(tmp_path: Path) -> None:
    """An interrupted program may still write its report; a child it leaves behind is killed."""
    beat = tmp_path / "beat"
    child = f"import time\nwhile True: open({str(beat)!r}, 'a').write('x'); time.sleep(0.05)"
    code = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: print('report written')\n"
    )
    done = python(code, limit_s=3.0)
    assert done.timed_out
    assert "report written" in done.output
    assert beat.exists()
    size = beat.stat().st_size
    time.sleep(0.3)
    assert beat.stat().st_size == size


SLEEPER = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(100)
"""
ACCEPT = f"""
import sys
from bench import sections
from bench.__main__ import main
sleep = (sys.executable, "-c", {SLEEPER!r}, sys.argv[1] + "/pid")
section = sections.Section("sleeps", sleep, lambda done: [], 100.0)
sections.plan = lambda *_, **__: [[section]]
main(["accept", "--out", sys.argv[1]])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_running(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", ACCEPT, str(tmp_path)]
    stored = tmp_path / "pid"
    with subprocess.Popen(command, env=child_env(), start_new_session=True) as accept:
        try:
            until = time.monotonic() + 60
            while not (stored.exists() and stored.read_text()):
                assert accept.poll() is None and time.monotonic() < until
                time.sleep(0.05)
            accept.send_signal(number)
            assert accept.wait(10) != 0
        finally:
            accept.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(int(stored.read_text()), 0)


def test_child_environment_finds_both_packages() -> None:
    """Also where nothing is installed: -S leaves site-packages out."""
    code = "import sys; print(sys.path[1:3])"
    done = run([sys.executable, "-S", "-c", code], limit_s=30, env=child_env())
    assert done.output.strip() == str([str(ROOT), str(ROOT / "runtime")])
    assert "TRITON_INTERPRET" not in child_env(interpret=False)


def section(name: str, code: str, **options) -> Section:
    def read(done: Finished) -> list[Check]:
        return [Check(name, name, "passed" if done.rc == 0 else "failed", done.output)]

    settings: dict[str, Any] = {"limit_s": 30.0} | options
    return Section(name, (sys.executable, "-c", code), settings.pop("read", read), **settings)


def test_one_crashing_section_does_not_stop_the_others(tmp_path: Path) -> None:
    def unreadable(done: Finished) -> list[Check]:
        raise KeyError("totals")

    report = Report(tmp_path, time.monotonic())
    later = time.monotonic() + 100
    report.run_phase([section("crash", "import os; os.abort()"), section("fine", "")], later)
    report.run_phase([section("odd", "print('strange')", read=unreadable)], later)
    report.run_phase([section("needless", "", why_not="no GPU")], later)
    report.run_phase([section("late", "")], time.monotonic())
    write_json(tmp_path / "host.json", {"kind": "host", "rows": [{"take_us": {"p99": 9.0}}]})
    report.write(tmp_path)
    content = read_json(tmp_path / "accept.json")
    assert content["host"]["rows"] == [{"take_us": {"p99": 9.0}}] and content["tick"] is None
    assert {c["section"]: c["result"] for c in content["checks"]} == {
        "crash": "failed", "fine": "passed", "odd": "failed", "needless": "skipped",
        "late": "skipped",
    }  # fmt: skip
    assert content["totals"] == {"passed": 1, "failed": 2, "skipped": 2, "real": 3}
    text = (tmp_path / "accept.md").read_text()
    assert "| needless | needless | 1 | no GPU |" in text
    assert "| late | late | 1 | no time left |" in text
    assert "KeyError" in text and "strange" in text


def test_plan_times_nothing_beside_anything_else() -> None:
    for gpu in (True, False):
        for smoke in (True, False):
            phases = sections.plan(Path("x"), smoke=smoke, gpu=gpu)
            for phase in phases:
                alone = [s for s in phase if s.name in ("ceilings", "tick", "host")]
                assert not alone or len(phase) == 1
                ops = [s for s in phase if s.name.startswith("op ")]
                assert not ops or len(phase) == len(ops)
                for op in ops if gpu else []:  # take turns, all of them
                    assert op.command[op.command.index("--of") + 1] == str(len(ops))
            names = [s.name for phase in phases for s in phase]
            assert len(names) == len(set(names))
    gpu_only = [s.name for p in sections.plan(Path("x"), smoke=True, gpu=False) for s in p
                if s.why_not == "no GPU"]  # fmt: skip
    assert gpu_only == ["gpu tests", "ceilings"]


def test_limits_leave_room_for_the_ops() -> None:
    """The deadline holds in any case; here, that no section may use up the time of all others."""
    phases = sections.plan(Path("x"), smoke=False, gpu=True)
    before = phases[: next(i for i, p in enumerate(phases) if p[0].name.startswith("op "))]
    worst = sum(max(s.limit_s for s in phase) for phase in before)
    assert worst < 10 * 60 - 60


def test_time_of_the_ops_is_shared_out() -> None:
    plan = sections.plan(Path("x"), smoke=False, gpu=True, ops_seconds=90)
    ops = {s.name: s.command for phase in plan for s in phase if s.name.startswith("op ")}
    seconds = {name: float(c[c.index("--seconds") + 1]) for name, c in ops.items()}
    assert {"op expert_mlp", "op moe", "op rms_norm"} <= set(ops)
    assert sum(seconds.values()) == pytest.approx(90, abs=len(ops))
    assert seconds["op expert_mlp"] > seconds["op moe"] > seconds["op rms_norm"]
    assert all("--quick" in command for command in ops.values())


def test_a_part_of_the_plan() -> None:
    plan = sections.plan(Path("x"), smoke=False, gpu=True, only=["op moe", "op route", "build"])
    assert [[s.name for s in phase] for phase in plan if phase] == [
        ["build"], ["op moe", "op route"]
    ]  # fmt: skip
    moe = next(s for phase in plan for s in phase if s.name == "op moe").command
    assert moe[moe.index("--of") + 1] == "2"
    with pytest.raises(SystemExit, match=r"no section.*op none"):
        sections.plan(Path("x"), smoke=False, gpu=True, only=["op none"])


@pytest.mark.slow
def test_smoke_run_on_this_machine(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "accept", "--smoke", "--out", str(tmp_path)]
    done = run(command, limit_s=280, env=child_env())
    content = read_json(tmp_path / "accept.json")
    assert content["totals"]["real"] > 0, done.output
    assert {path.name for path in tmp_path.iterdir()} == {"accept.json", "accept.md", "log.txt"}
    assert done.rc == (1 if content["totals"]["failed"] else 0)
    failed = [c for c in content["checks"] if c["result"] == "failed"]
    assert failed == [], failed
    ran = {c["section"] for c in content["checks"] if c["result"] == "passed"}
    assert {"backends", "kernels", "tests", "op rms_norm", "tick", "host"} <= ran
    for check in content["checks"]:
        assert check["result"] != "skipped" or check["detail"], check
    assert f"{content['totals']['real']} real checks" in done.output
