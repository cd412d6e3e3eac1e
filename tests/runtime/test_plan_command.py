"""tml-runtime plan."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tml_runtime.cli import main
from tml_runtime.model import packing
from tml_runtime.model_options import EXPERTS, REST

H200 = "--gpu-memory 143771MiB"


def run(capsys: pytest.CaptureFixture[str], arguments: str) -> tuple[int, str, str]:
    status = main(["plan", *shlex.split(arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_what_fits_is_a_table_and_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, f"{H200} --sessions 8 --page-dtype fp8")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "inkling-small: experts int4, rest fp8, 8 sessions, pages fp8"
    starts = ("weights ", "  routed experts ", "state of 8 ", "  snapshots ", "allowances, not ")
    for start in (*starts, "  graphs ", "all of it ", "the GPU ", "free ", "  video, 320x240 "):
        assert sum(line.startswith(start) for line in lines) == 1, start
    assert "fit" not in out


def test_what_does_not_fit_is_status_1_and_says_what_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And what it says does, does."""
    status, out, _ = run(capsys, f"{H200} --sessions 32")
    assert status == 1 and "\nmissing " in out
    suggested = out.partition("These do:\n")[2].splitlines()
    flags = [line.rsplit(maxsplit=3)[0] for line in suggested]
    assert any("--sessions" in line for line in flags)
    assert any("--keep" in line for line in flags)
    for line in flags:
        assert run(capsys, f"{H200} --sessions 32 {line}")[0] == 0, line


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, f"{H200} --sessions 32 --keep 30 --keep-video 2 --json")
    report = json.loads(out)
    assert status == 1 and not report["fits"]
    parts = (report[part].values() for part in ("weights", "state", "allowance"))
    assert report["total_bytes"] == sum(map(sum, parts))
    assert report["context"]["audio"] == {"tokens": 600, "seconds": 30.0}
    assert report["context"]["video"] == {"tokens": 480, "seconds": 2.0}
    for other in report["nearest"]:
        arguments = f"{H200} --sessions 32 --keep 30 --keep-video 2 --json"
        status, out, _ = run(capsys, f"{arguments} {' '.join(other['options'])}")
        found = json.loads(out)
        assert status == 0 and found["total_bytes"] == other["total_bytes"], other["options"]


def test_a_size_by_which_gpus_are_sold_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--gpu-memory 141GB --sessions 32")
    assert status == 1 and "141GB is 134,468 MiB" in out and "143771MiB" in out


def test_the_small_preset_fits_a_small_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--preset tiny --gpu-memory 4GiB --video none --experts bf16")
    assert status == 0 and "  video  " in out


def test_drafts_take_weights_and_state_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    plain, drafting = (
        json.loads(run(capsys, f"{H200} --sessions 8 --json {drafts}")[1])
        for drafts in ("", "--drafts")
    )
    assert plain["weights"]["mtp_layers"] == 0 < drafting["weights"]["mtp_layers"]
    for part in ("local_rings", "global_pages", "taps", "snapshots"):
        assert plain["state"][part] < drafting["state"][part], part
    assert drafting["allowance"]["graphs"] == 2 * plain["allowance"]["graphs"]


def test_nothing_near_fits(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--gpu-memory 80GiB")
    assert status == 1 and "Nothing near it does." in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpu-memory 141", "'141' is not a size such as 141GB"),
        (f"{H200} --preset huge", "model 'huge' is not one of inkling-small, slice, tiny"),
        (f"{H200} --sessions 0", "--sessions 0 is not in 1..1024"),
        (f"{H200} --sessions 1025", "--sessions 1025 is not in 1..1024"),
        (f"{H200} --keep nan", "--keep nan is not in 0..86400"),
        (f"{H200} --keep-video 0", "--keep-video 0 is not in 0..86400"),
        (f"{H200} --keep inf", "--keep inf is not in 0..86400"),
        (f"{H200} --video 320", "--video '320' is not a size such as 320x240"),
        (f"{H200} --video 321x240", "frame width 321 is not a multiple of 40"),
        (f"{H200} --video 4000x4000", "a tick takes 256"),
    ],
)
def test_wrong_arguments_are_status_2_and_named(
    capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    status, out, err = run(capsys, arguments)
    assert (status, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_the_largest_plan_that_may_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--gpu-memory 141GB --sessions 1024 --keep 86400 --video 640x480"
    assert run(capsys, arguments)[0] == 1


def test_the_figures_in_the_readme_are_what_the_command_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    command = re.search(r"^tml-runtime plan (.*?)  +#", readme, re.M)
    shown = re.search(r"^```text\n(weights .*?)^```$", readme, re.M | re.S)
    assert command is not None and shown is not None
    _, out, _ = run(capsys, command[1])
    assert set(shown[1].splitlines()) <= set(out.splitlines())


def test_names_are_those_that_a_model_takes() -> None:
    """Written down in the command, so that `--help` does not wait for torch."""
    assert set(EXPERTS) == {"bf16", *packing.EXPERTS}
    assert set(REST) == {"bf16", *packing.REST}
