"""A model on 2 and 4 ranks says bitwise what it says on one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
import torch
from crew import Crew, Raised, values

from tml_runtime import InteractionModel, ModelConfig
from tml_runtime.errors import InputValueError
from tml_runtime.parallel import LeadModel, follow
from tml_runtime.parallel.share import check_sizes


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        for x, y in zip(mine, other, strict=True):
            np.testing.assert_array_equal(x, y)


def alone(num_ticks: int, **options: Any) -> tuple[list[Any], int, int]:
    with torch.inference_mode():
        return jobs.same_as_alone(0, 1, "", num_ticks, dict(options))


@pytest.mark.parametrize(
    ("num_ranks", "num_ticks", "options"),
    [
        (2, 7, {}),
        pytest.param(4, 7, {}, marks=pytest.mark.slow),
        (2, 3, {"dtype": torch.bfloat16}),
        (2, 3, {"dtype": torch.bfloat16, "page_dtype": torch.float8_e4m3fn}),
        (2, 2, {"experts": "int4", "rest": "fp8_channel"}),
        (4, 2, {"experts": "nvfp4", "rest": "int4_f16"}),
        (2, 2, {"experts": "mxfp4", "rest": "int4", "dtype": torch.bfloat16}),
    ],
    ids=str,
)
def test_ranks_say_what_one_says(
    crew: Crew, tmp_path: Path, num_ranks: int, num_ticks: int, options: dict[str, Any]
) -> None:
    expected, pages, matrices = alone(num_ticks, **options)
    results = values(crew.run(num_ranks, jobs.same_as_alone, tmp_path, num_ticks, options))
    for said, shared_pages, shared_matrices in results:
        assert_same(said, expected)
        assert shared_pages * num_ranks == pages
        assert shared_matrices * num_ranks == matrices
    assert sum(tick[4].sum() for tick in expected) > 0, "nothing rolled"


@pytest.mark.parametrize(
    ("num_ranks", "mode"),
    [(2, None), (2, "eager"), pytest.param(4, None, marks=pytest.mark.slow)],
)
def test_followers_do_what_rank_0_does(
    crew: Crew, tmp_path: Path, num_ranks: int, mode: str | None
) -> None:
    """Resets, settings, rewinds and suspensions too, and in buckets; compared after every tick."""
    with torch.inference_mode():
        model = InteractionModel.random(jobs.CONFIG)
        expected, prompted = jobs.talk(model, 6), jobs.prompted(model)
    (said, logits), *followed = values(crew.run(num_ranks, jobs.led, tmp_path, 6, mode))
    assert_same(said, expected)
    np.testing.assert_array_equal(logits, prompted)
    assert followed == [6] * (num_ranks - 1)


def test_a_runtime_on_two_ranks_is_the_runtime_on_one(crew: Crew, tmp_path: Path) -> None:
    with jobs.runtime_of(InteractionModel.random(ModelConfig.preset("tiny"))) as runtime:
        runtime.run_ticks(2)
        expected = jobs.converse(runtime, 4)
    said, followed = values(crew.run(2, jobs.led_runtime, tmp_path))
    assert said == expected
    assert said[-2]["interruptions"] == 1
    assert followed > 0


@pytest.mark.slow
def test_ranks_keep_together_in_real_time(crew: Crew, tmp_path: Path) -> None:
    (came, ticks), followed = values(crew.run(2, jobs.in_real_time, tmp_path))
    assert came
    assert followed >= ticks


@pytest.mark.slow
def test_models_side_by_side(crew: Crew, tmp_path: Path) -> None:
    results = values(crew.run(4, jobs.two_models, tmp_path))
    assert [(replica, rank) for replica, rank, _ in results] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for replica, _, said in results:
        assert_same(said, alone(2 + replica, seed=replica)[0])


@pytest.mark.parametrize("what", ["norm_eps", "seed"])
def test_ranks_that_would_run_another_model_are_refused(
    crew: Crew, tmp_path: Path, what: str
) -> None:
    for result in crew.run(2, jobs.other_arguments, tmp_path, what):
        assert isinstance(result, Raised) and result.kind == "RanksDiffer", result
        assert what in result.message and "on rank 1" in result.message


def test_ranks_that_hold_other_bits_are_found(crew: Crew, tmp_path: Path) -> None:
    results = crew.run(2, jobs.other_draws, tmp_path)
    assert all(isinstance(r, Raised) and r.kind == "RanksDiffer" for r in results), results


@pytest.mark.parametrize(
    ("num_ranks", "changes", "message"),
    [
        (3, {}, "local_heads.num_kv_heads=4 of model 'shared' is not a multiple of 3 ranks"),
        (4, {"dense_width": 98}, "dense_width=98"),
        (2, {"width": 63}, "width=63"),
    ],
)
def test_uneven_sizes_are_refused(num_ranks: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputValueError, match=message):
        check_sizes(replace(jobs.CONFIG, **changes), num_ranks)


def test_every_rank_refuses_uneven_sizes(crew: Crew, tmp_path: Path) -> None:
    for result in crew.run(2, jobs.uneven, tmp_path, {"dense_width": 97}):
        assert isinstance(result, Raised) and result.kind == "InputValueError"
        assert "dense_width=97" in result.message


@pytest.mark.parametrize("make", [LeadModel, follow])
def test_a_model_without_ranks_neither_leads_nor_follows(make: Callable[..., Any]) -> None:
    model = InteractionModel.random(jobs.CONFIG)
    with pytest.raises(InputValueError, match="no ranks"):
        make(model)


def test_what_one_rank_cannot_do_alone_is_refused(crew: Crew, tmp_path: Path) -> None:
    refused, followed = values(crew.run(2, jobs.refused_alone, tmp_path))
    assert refused == {
        "forward": "ValueError",
        "packed": "ValueError",
        "state.load": "InputValueError",
        "cache.save": "InputValueError",
        "cache.commit": "InputValueError",
        "tick of a state of another model": "InputValueError",
        "tick with a bad slot": "ValueError",
        "rewind to nowhere": "NoSnapshot",
        "a seed that is no JSON": "InputTypeError",
        "logits of another width": "ValueError",
        "logits of another dtype": "TypeError",
    }
    assert followed == 2  # what was refused did not part the ranks


SCRIPT = """
import torch
from tml_runtime import InteractionModel, ModelConfig, Runtime
from tml_runtime.parallel import LeadModel, Ranks, follow

torch.set_num_threads(1)
ranks = Ranks.join(tensor=2)
model = InteractionModel.random(ModelConfig.preset("tiny"), ranks=ranks)
if ranks.rank > 0:
    print(f"followed {follow(model)} ticks", flush=True)
else:
    with LeadModel(model) as leader, Runtime(leader, realtime=False) as runtime:
        session = runtime.open_session(seed=1)
        runtime.run_ticks(2)
        print(f"heard {len(session.poll())} outputs", flush=True)
"""


@pytest.mark.slow
def test_started_by_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "talk.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "followed 2 ticks" in done.stdout and "heard " in done.stdout, done.stdout
