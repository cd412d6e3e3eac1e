"""The run of one op, with a made-up timer in place of the GPU's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from bench import ceilings, harness, op, tune
from bench.__main__ import build_parser, main
from bench.report import read_json
from bench.timing import Call, Samples

KNOWN = ceilings.Ceilings(
    copy=4e12, read=None, matmul_bf16=8e14, launch_event_us=2.0, launch_graph_us=1.0
)


class FakeTimer:
    def events(
        self, calls: Mapping[str, Sequence[Call]], repeats: int, *, at_least: int = 0
    ) -> Samples:
        return Samples({name: [3.0] * repeats for name in calls})

    graph = events


@pytest.fixture(autouse=True)
def made_up_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(op, "backend_info", lambda: {"ops": {}})
    for command in (op, tune):
        monkeypatch.setattr(command, "CudaTimer", FakeTimer)
        monkeypatch.setattr(command, "l2_bytes", lambda: 1 << 20)
        monkeypatch.setattr(command, "clocks", dict)
        monkeypatch.setattr(command, "machine", lambda: {"gpu": None})
        monkeypatch.setattr(command, "describe", lambda info, now: "made up")
    monkeypatch.setattr(tune, "_compile", lambda cases, _: {str(case): [] for case in cases})
    monkeypatch.setattr(ceilings, "measure", lambda timer: KNOWN)
    on_cpu = functools.partial(harness.time_case, device="cpu")
    monkeypatch.setattr(harness, "time_case", on_cpu)
    for name in ("gate", "resolve"):
        real = getattr(harness, name)
        monkeypatch.setattr(
            harness, name, lambda op, device, real=real, **options: real(op, "cpu", **options)
        )


def run(tmp_path: Path, *options: str) -> tuple[int, dict]:
    argv = ["rms_norm", "--out", str(tmp_path), *options]
    status = op.main(build_parser().parse_args(argv))
    return status, read_json(tmp_path / "rms_norm.json")


def test_every_case_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, result = run(tmp_path)
    assert status == 0
    cases = [str(case) for case in harness.load("rms_norm").bench]
    assert [case["case"] for case in result["results"]] == cases
    for case in result["results"]:
        assert set(case["variants"]) == {"ours", "torch"}
        assert case["noise"] == 0.0
    assert result["ceilings"]["copy"] == 4e12
    assert "liger" in result["missing"]
    text = capsys.readouterr().out
    assert all(case in text for case in cases)
    assert "not here: flashinfer" in text


def test_smoke_is_one_case(tmp_path: Path) -> None:
    assert len(run(tmp_path, "--smoke")[1]["results"]) == 1


def test_quick_takes_the_quick_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = harness.load("rms_norm")
    slow = dataclasses.replace(known, quick=known.bench[1:2], sets=3, graph_calls=30)
    monkeypatch.setattr(harness, "load", lambda name: slow)
    _, result = run(tmp_path, "--quick")
    assert [case["case"] for case in result["results"]] == [str(known.bench[1])]
    assert result["gate"]["checked"] == len(known.model)
    (case,) = result["results"]
    assert case["graph_sets"] >= 3 and case["graph_calls"] >= 30


def test_nothing_checked_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "gate", lambda *_, **__: harness.Gate(0, {}))
    status, result = run(tmp_path)
    assert status == 1
    assert result["not_timed"] == "no case was checked"


def test_names_of_nothing_are_refused(tmp_path: Path) -> None:
    first = str(harness.load("rms_norm").bench[0])
    with pytest.raises(SystemExit, match=f"--case moon: no case of rms_norm has it.* {first}"):
        run(tmp_path, "--case", first, "--case", "moon")
    known = "ours, torch, flashinfer, liger, torch.compile"
    with pytest.raises(SystemExit, match=f"--variant moon: rms_norm has {known}"):
        run(tmp_path, "--variant", "torch", "--variant", "moon")
    _, result = run(tmp_path, "--case", first, "--variant", "liger")
    assert [case["case"] for case in result["results"]] == [first]


def test_tune_names_what_it_had_no_time_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "rms_norm", "--seconds", "-1"]) == 0
    text = capsys.readouterr().out
    assert all(f"no time left for {case}" in text for case in harness.load("rms_norm").bench)


def test_tune_times_what_it_is_told(tmp_path: Path) -> None:
    case = str(harness.load("rms_norm").bench[0])
    assert main(["tune", "rms_norm", "--case", case, "--out", str(tmp_path / "x.json")]) == 0
    result = read_json(tmp_path / "x.json")
    assert [row["case"] for row in result["results"]] == [case] and result["out_of_time"] == []
    with pytest.raises(SystemExit, match="--case moon: no case of rms_norm has it"):
        main(["tune", "rms_norm", "--case", "moon"])
    with pytest.raises(SystemExit, match=r"--set SPLIT: .*\.configs has SPLIT_KEYS, "):
        main(["tune", "paged_attention", "--set", "SPLIT=1"])
    with pytest.raises(SystemExit, match="--set SPLIT: shift_keys has no configurations"):
        main(["tune", "shift_keys", "--set", "SPLIT=1"])


def test_out_of_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, result = run(tmp_path, "--seconds", "0")
    assert status == 0
    assert result["results"] == []
    assert len(result["out_of_time"]) == len(harness.load("rms_norm").bench)
    assert "no time left for" in capsys.readouterr().out


def test_red_gate_means_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    red = harness.Gate(5, {"T1-D8": "relative L2 error 1"})
    monkeypatch.setattr(harness, "gate", lambda *_, **__: red)
    status, result = run(tmp_path)
    assert status == 1
    assert result["results"] == []
    assert result["not_timed"] == "the gate is red: 1 of 5 cases fail"


def test_ours_that_cannot_run_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> harness.CaseResult:
        return harness.CaseResult("T1", 1, 1, 1.0, skipped={"ours": "illegal address"})

    monkeypatch.setattr(harness, "time_case", broken)
    assert run(tmp_path)[0] == 1


def test_run_that_is_killed_leaves_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = harness.time_case, [2]

    def killed_in_the_third(*args, **kwargs) -> harness.CaseResult:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*args, **kwargs)

    monkeypatch.setattr(harness, "time_case", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    result = read_json(tmp_path / "rms_norm.json")
    assert len(result["results"]) == 2
    assert result["gate"]["checked"] > 0


def test_ceilings_measured_before_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = run(tmp_path, "--smoke")
    (tmp_path / "ceilings.json").write_text((tmp_path / "rms_norm.json").read_text())
    monkeypatch.setattr(ceilings, "measure", lambda timer: pytest.fail("measured again"))
    _, second = run(tmp_path, "--smoke", "--ceilings", str(tmp_path / "ceilings.json"))
    assert second["ceilings"] == first["ceilings"]
