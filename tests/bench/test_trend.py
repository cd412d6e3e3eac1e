from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.report import write_json
from bench.trend import changes, show

MODEL = {"preset": "tiny", "layout": "ms200", "dtype": "bfloat16", "experts": None, "rest": None}


def night(p50: float | None, gpu: str = "H200", sm_mhz: float = 1980.0, **model: Any) -> dict:
    times = {"p50": p50, "p99": 100.0}
    row = {"sessions": 8, "video": "none", "profile": "clean", "error": None, "tick_ms": times}
    if p50 is None:
        row = {**row, "error": "no memory", "tick_ms": None}
    row |= {"turn_ms": None, "gpu": {"sm_mhz": sm_mhz}}
    where = {"gpu": {"name": gpu}, "cpu": "x"}
    return {"kind": "sessions", "machine": where, **MODEL, **model, "rows": [row]}


def worse(*runs: dict, limit: float = 0.10) -> list[str]:
    return [change.name for change in changes(runs) if change.worse(limit)]


NAME = "8 none clean tick p50"


@pytest.mark.parametrize(
    ("p50s", "expected"),
    [
        ([10, 10, 12, 12, 12], [NAME]),
        ([10, 12, 12, 12], [NAME]),
        ([10, 10, 12, 12, 10], []),  # two of three
        ([10, 10, 10, 12, 12], []),  # not yet three
        ([10, 10, 11, 11, 11], []),  # 10 %, not more
        ([10, 10, 8, 8, 8], []),
        ([12, 12, 12], []),  # nothing before
        ([10, 10, 10, 30, 11.5, 11.5, 11.5], [NAME]),  # one outlier before
        ([10, None, 12, None, 12, 12], [NAME]),  # nights that measured nothing
        ([10, 12, 12, 12, None], []),  # nor did the newest
    ],
)
def test_three_in_a_row(p50s: list[float | None], expected: list[str]) -> None:
    assert worse(*(night(p50) for p50 in p50s)) == expected


def test_only_the_same_gpu_and_clocks_count() -> None:
    slow = [night(12) for _ in range(3)]
    assert worse(night(10, gpu="H100"), *slow) == []
    assert worse(night(10, sm_mhz=1755), *slow) == []
    assert worse(night(10, sm_mhz=1965), *slow) == [NAME]  # one step
    assert worse(night(10), *slow[:2], night(12, sm_mhz=1500)) == []
    assert worse(night(10), night(50, gpu="H100"), *slow) == [NAME]


@pytest.mark.parametrize(
    "setting",
    [
        {"experts": "int4"}, {"page_dtype": "fp8"}, {"keep": 20.0}, {"keep_video": 1.0},
        {"distinct_experts": 8}, {"slots": 4}, {"global_pages": "auto"}, {"probe_ticks": 20},
        {"device": "cpu"},
    ],
    ids=lambda setting: next(iter(setting)),
)  # fmt: skip
def test_only_the_same_model_and_memory_count(setting: dict[str, Any]) -> None:
    """What an older file does not name is as it is by default."""
    default: dict[str, Any] = dict.fromkeys(setting)
    slow = [night(12, **default) for _ in range(3)]
    assert worse(night(10), *slow) == [NAME]
    assert worse(night(10, **setting), *slow) == []


def test_without_a_gpu_the_processor_is_the_machine() -> None:
    runs = [night(p50) for p50 in (10, 12, 12, 12)]
    for run in runs:
        run["machine"]["gpu"] = run["rows"][0]["gpu"] = None
    assert worse(*runs) == [NAME]
    runs[0]["machine"]["cpu"] = "y"
    assert worse(*runs) == []


def test_nothing_to_compare() -> None:
    assert changes([]) == []
    assert "nothing to compare: 4 runs" in show(changes([night(1)]), [])


def test_the_limit_is_a_choice() -> None:
    assert worse(night(10), *[night(12)] * 3, limit=0.25) == []


@pytest.mark.parametrize(("p50", "status"), [(10.5, 0), (15.0, 1)])
def test_trend_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], p50: float, status: int
) -> None:
    paths = []
    for number, run in enumerate([night(10), *[night(p50)] * 3]):
        paths.append(tmp_path / f"{number}.json")
        write_json(paths[-1], run)
    assert main(["trend", *map(str, paths)]) == status
    assert f"{status} of 2 became worse" in capsys.readouterr().out
