from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import kv
from bench.__main__ import COMMANDS, main
from bench.harness import load
from bench.paths import ROOT, bench_names, benched_ops, op_names
from bench.peers import PEERS
from bench.tick import device_figures, histogram, show

MOVERS = {"apply_deltas", "move_pages"}  # ops that compute nothing


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for name in (*COMMANDS, *bench_names()):
        assert name in text


@pytest.mark.parametrize("command", [*COMMANDS, *bench_names()])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    assert command in capsys.readouterr().out


def test_help_of_an_op_says_what_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["layer", "--help"])
    text = capsys.readouterr().out
    assert "--seconds" in text
    assert "one decoder layer as the model runs it" in text


def test_what_a_virtual_tick_says_is_summed_up(tmp_path: Path) -> None:
    """As often as it is run, and another seed says something else."""

    def said(seed: int) -> str:
        path = tmp_path / "tick.json"
        assert main(["tick", "--ticks", "2", "--seed", str(seed), "--json", str(path)]) == 0
        return json.loads(path.read_text())["said_sha256"]

    assert said(0) == said(0) != said(1)


def test_a_gpu_has_to_be_there_for_products_beside_ticks() -> None:
    with pytest.raises(SystemExit, match="--beside needs a GPU"):
        main(["tick", "--device", "cpu", "--ticks", "1", "--beside", "low"])


def test_every_op_is_benched() -> None:
    assert benched_ops() == op_names()
    assert set(bench_names()) - set(op_names()) == {"moe", "layer"}  # blocks of several ops


@pytest.mark.parametrize("name", bench_names())
def test_bench_of_an_op_is_complete(name: str) -> None:
    op = load(name)
    assert op.name == name
    assert op.edge
    assert op.model
    assert op.bench
    assert "ours" in op.variants
    assert len(op.variants) + len(op.peers) > 1, "nothing to compare with"
    assert len({str(case) for case in op.bench}) == len(op.bench), "two cases have one name"
    assert set(op.quick) <= set(op.bench)
    for case in op.bench:
        assert case.cost().bytes > 0
        assert (case.cost().flops > 0) == (name not in MOVERS)


def test_unknown_op_of_compile_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"no kernel\.py"):
        main(["compile", "--op", "nothing"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would be timed")
def test_op_without_a_gpu_is_checked_and_not_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rms_norm", "--out", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    stored = json.loads((tmp_path / "rms_norm.json").read_text())
    assert printed["gate"] == stored["gate"]
    assert printed["gate"]["checked"] > 0
    assert printed["results"] == []
    assert "no GPU" in printed["not_timed"]
    assert main(["rms_norm", "--smoke"]) == 0
    assert "not timed: no GPU" in capsys.readouterr().out


def test_tick_of_a_packed_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = ["--experts", "int4", "--rest", "fp8"]
    stored = tmp_path / "tick.json"
    assert main(["tick", "--ticks", "2", "--device", "cpu", *packed, "--json", str(stored)]) == 0
    assert "tiny, float32, experts int4, rest fp8 on cpu, 1 sessions" in capsys.readouterr().out
    result = json.loads(stored.read_text())
    assert (result["experts"], result["rest"], result["ticks"]) == ("int4", "fp8", 2)
    assert "0 missed: p50" in show(result)
    assert "missed: of the newest 2 p50" in show({**result, "ticks": 20_000})  # of totals the rest


@pytest.mark.parametrize("command", ["tick", "sessions"])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--preset", "foo"], "model 'foo' is not one of inkling-small, "),
        (["--layout", "foo"], "layout 'foo' is not one of ms200, "),
        (["--experts", "foo"], "experts: 'foo' is not None or one of fp8, "),
        (["--rest", "mxfp4"], "rest: 'mxfp4' is not None or one of fp8, "),
        (["--distinct-experts", "0"], "distinct_experts=0 is not in 1..8"),
        (["--keep", "0"], "--keep 0 is not in"),
    ],
)
def test_model_that_cannot_be_is_refused(command: str, options: list[str], text: str) -> None:
    with pytest.raises(SystemExit, match=text):
        main([command, "--device", "cpu", *options])


@pytest.mark.parametrize("command", ["tick", "sessions", "interaction"])
def test_device_that_is_not_there_is_refused(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="device 'cuda': torch sees no GPU here"):
        main([command, "--device", "cuda"])
    with pytest.raises(SystemExit):
        main([command, "--device", "foo"])
    assert "argument --device: invalid choice: 'foo'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("tick --sessions 0", "--sessions: '0' is not a number in 1..4096"),
        ("tick --seed -1", "--seed: '-1' is not a number in 0.."),
        ("sessions --seed -1", "--seed: '-1' is not a number in 0.."),
        ("interaction --seed -1", "--seed: '-1' is not a number in 0.."),
        ("kv --sessions 0", "--sessions: '0' is not a number in 1..4096"),
        ("kv --hours 0.76", "--hours: '0.76' hours are not 46 minutes at least"),
        ("kv --hours nan", "--hours: 'nan' hours are not 46 minutes at least"),
        ("kv --hours inf", "--hours: 'inf' hours are not 46 minutes at least"),
        ("kv --hours day", "--hours: 'day' hours are not 46 minutes at least"),
        ("tune layer", "argument OP: invalid choice: 'layer'"),
    ],
)
def test_wrong_value_is_named(words: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words.split())
    assert text in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--ticks", "2", "--kernels", "3"], "--kernels goes without --ticks"),
        (["--device", "cpu", "--kernels", "3"], "--kernels needs a GPU"),
    ],
)
def test_profile_that_cannot_be_taken_is_refused(options: list[str], text: str) -> None:
    with pytest.raises(SystemExit, match=text):
        main(["tick", *options])


def test_the_ends_of_a_simulated_hour_have_no_minute_in_common(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv, "TICKS_PER_MINUTE", 1)
    result = kv.simulate(kv.LEAST / 60, 2)
    assert result["first"]["minutes"] == [6, 25] and result["last"]["minutes"] == [26, 45]
    assert "peak memory" in kv.show(result)


def test_peers_are_those_that_are_timed() -> None:
    """`find` is given the module that a distribution, whose name begins so, brings."""
    sources = [path.read_text() for path in (ROOT / "bench").glob("*.py")]
    modules = {name for text in sources for name in re.findall(r'[^.]\bfind\("(\w+)', text)}
    timed = {name: [p for p in PEERS if p.replace("-", "_").startswith(name)] for name in modules}
    assert all(len(found) == 1 for found in timed.values()), timed
    assert len(timed) == len(PEERS)


def test_histogram_counts_everything_once() -> None:
    values = [0.5, 1.0, 1.1, 3.0, 100.0]
    bins = histogram(values)
    assert sum(count for *_, count in bins) == len(values)
    for low, high, count in bins:
        assert count == sum(low <= value < high for value in values)
    assert bins[0][2] and bins[-1][2]
    assert histogram([]) == []
    assert sum(count for *_, count in histogram([0.0])) == 1


def test_device_figures_are_of_ticks_that_a_gpu_replayed() -> None:
    assert set(device_figures({"model.steps": np.array([5])}).values()) == {None}
    figures = device_figures(
        {
            "model.stage": np.array([1, 3, 2]) * 1_000_000,
            "model.launch_gap": np.array([0, 1, 1]) * 1_000_000,
            "model.gpu": np.array([0, 40, 58]) * 1_000_000,  # the first tick had no rows
        }
    )
    assert figures["gpu_idle_share"] == pytest.approx(0.02)
    assert figures["gpu_ms"] == {"p50": 40.0, "p99": 58.0, "p999": 58.0, "max": 58.0}
    assert figures["host_ms"]["max"] == 3.0 and figures["launch_gap_ms"]["p50"] == 1.0


def test_tick_beside_busy_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = tmp_path / "tick.json"
    assert (
        main(["tick", "--ticks", "1", "--device", "cpu", "--disturb", "--json", str(stored)]) == 0
    )
    result = json.loads(stored.read_text())
    assert result["disturbance"]["collections"] >= 1
    assert result["ticks"] == 1
    assert "woke late by p50" in capsys.readouterr().out
