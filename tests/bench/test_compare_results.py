from __future__ import annotations

import copy
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.compare import compare, show
from bench.report import write_json


def summary(median: float) -> dict:
    return {"count": 60, "median": median, "p10": median, "p90": median}


def result(cold: float = 10.0, graph: float | None = 5.0, noise: float = 0.01) -> dict:
    ours = {"cold_us": summary(cold), "graph_us": None if graph is None else summary(graph)}
    theirs = {"cold_us": summary(1000.0), "graph_us": None}
    case = {
        "case": "T1", "noise": noise, "variants": {"ours": ours, "torch": theirs}, "skipped": {},
    }  # fmt: skip
    gate = {"checked": 3, "failures": {}}
    return {
        "kind": "accept",
        "machine": {"gpu": {"name": "H200", "driver": "580"}, "torch": "2.11", "triton": "3.6"},
        "ceilings": {"copy": 4.0e12, "read": None, "matmul_bf16": 8e14},
        "checks": [{"section": "tests", "name": "a", "result": "passed"}],
        "ops": [{"op": "linear", "gate": gate, "results": [case], "out_of_time": []}],
    }


def test_same_result_is_not_worse() -> None:
    found = compare(result(), result(), limit=0.1)
    assert not found.worse
    assert len(found.times) == 2
    assert "0 slower, 0 faster" in show(found)


def test_slower_beyond_the_limit() -> None:
    assert compare(result(), result(cold=10.9), limit=0.1).slower == []
    found = compare(result(), result(cold=11.2), limit=0.1)
    assert found.slower == ["linear T1 cold"]
    assert found.worse
    assert compare(result(cold=11.2), result(), limit=0.1).faster == ["linear T1 cold"]


def test_within_both_runs_own_noise_is_no_change() -> None:
    assert compare(result(noise=0.1), result(cold=11.5, noise=0.1), limit=0.1).slower == []


def test_noise_of_a_case_with_launch_gaps_is_not_believed() -> None:
    before, after = result(noise=43.0), result(cold=20.0)
    assert compare(before, after, limit=0.1).slower == []
    before["ops"][0]["results"][0]["skipped"] = {"ours (cold)": "launch gaps may be included"}
    assert compare(before, after, limit=0.1).slower == ["linear T1 cold"]


def test_peers_are_not_compared() -> None:
    after = result()
    after["ops"][0]["results"][0]["variants"]["torch"]["cold_us"] = summary(9000.0)
    assert not compare(result(), after, limit=0.1).worse


def test_lost_time_is_worse_unless_time_was_up() -> None:
    found = compare(result(), result(graph=None), limit=0.1)
    assert found.gone == ["linear T1 graph"]
    assert found.worse
    after = result()
    after["ops"][0] |= {"results": [], "out_of_time": ["T1"]}
    found = compare(result(), after, limit=0.1)
    assert not found.worse
    assert "no time was left for linear T1 cold" in found.notes


def test_newly_failing_check_is_worse() -> None:
    after = result()
    after["checks"][0]["result"] = "failed"
    found = compare(result(), after, limit=0.1)
    assert found.broken == ["tests: a"]
    assert not compare(copy.deepcopy(after), after, limit=0.1).worse


def test_gate_that_is_red_now_is_worse() -> None:
    """In the file of an op, and in that of `accept`, whose check has the same name."""
    before, after = result(), result()
    after["ops"][0]["gate"] = {"checked": 3, "failures": {"T1-D8": "relative L2 error 1"}}
    named = "op linear: linear: T1-D8"
    assert compare(before, after, limit=0.1).broken == [named]
    check = {"section": "op linear", "name": "linear: T1-D8", "result": "failed"}
    both = {**after, "checks": [check]}
    assert compare(before, both, limit=0.1).broken == [named]
    machine = after["machine"]
    old, new = ({"machine": machine, **content["ops"][0]} for content in (before, after))
    assert compare(old, new, limit=0.1).broken == [named]
    assert not compare(new, new, limit=0.1).worse


@pytest.mark.parametrize("command", ["compare", "trend"])
def test_file_of_another_kind_is_refused(tmp_path: Path, command: str) -> None:
    write_json(tmp_path / "a.json", {"kind": "tick"})
    with pytest.raises(SystemExit, match="a result of kind 'tick', expected"):
        main([command, str(tmp_path / "a.json"), str(tmp_path / "a.json")])
    with pytest.raises(SystemExit, match=r"No such file.*b\.json"):
        main([command, str(tmp_path / "b.json"), str(tmp_path / "b.json")])


def test_other_machine_and_ceiling_are_named() -> None:
    after = result()
    after["machine"]["gpu"]["driver"] = "590"
    after["ceilings"]["copy"] = 4.4e12
    notes = compare(result(), after, limit=0.1).notes
    assert notes == [
        "gpu: H200, driver 580 -> H200, driver 590",
        "ceiling copy: +10.0 %",
        "ceiling matmul_bf16: +0.0 %",
    ]


@pytest.mark.parametrize(("cold", "status"), [(10.0, 0), (20.0, 1)])
def test_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cold: float, status: int
) -> None:
    write_json(tmp_path / "a.json", result())
    write_json(tmp_path / "b.json", result(cold=cold))
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == status
    assert "linear T1 cold" in capsys.readouterr().out
