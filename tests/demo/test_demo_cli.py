"""The command line: help, errors in one line, and `info`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tml_kernels
from tml_runtime import Runtime, cli
from tml_runtime.demo.run import FILES


def failed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = cli.main(argv)
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--audio", "no-such.wav", "--video", "none"], 1, "error: no such file: no-such.wav"),
        (["--video", "no-such.mp4", "--audio", "none"], 1, "error: no such file: no-such.mp4"),
        (["--preset", "huge"], 2, "error: preset 'huge' is not one of"),
        (["--seconds", "0"], 2, "error: seconds=0 is not in"),
        (["--seconds", "nan"], 2, "error: seconds=nan is not in"),
        (["--sessions", "0"], 2, "error: sessions=0 is not in"),
        (["--device", "tpu"], 2, "error: device 'tpu' is not one of"),
        (["--seed", "-5"], 2, "error: seed=-5 is not in"),
        (["--keep", "0"], 2, "error: keep=0 is not in 0..600 (above 0)"),
        (["--keep", "nan"], 2, "error: keep=nan is not in"),
        (["--keep-video", "-1"], 2, "error: keep_video=-1 is not in"),
        (["--keep", "601", "--draw-memory", "p.png"], 2, "error: keep=601 is not in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_error_is_one_line(
    arguments: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    found, error = failed(["demo", "--fast", "--out", str(out), *arguments], capsys)
    assert found == status
    assert error.startswith(message)
    assert len(error.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments", [["--seconds", "soon"], ["--keep", "long"], ["--fast", "--realtime"], ["--wat"]]
)
def test_argparse_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "usage: tml-runtime" in error
    assert "error: " in error


@pytest.mark.parametrize("module", ["rich", "av", "soundfile", "matplotlib"])
def test_missing_extra_is_one_line(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    status, error = failed(["demo", "--fast", "--seconds", "1"], capsys)
    assert status == 1
    name = "PyAV" if module == "av" else module
    assert error.startswith(f"error: {name} is needed to")
    assert 'pip install "tml-kernels[demo]"' in error
    assert len(error.splitlines()) == 1


def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    arguments = ["demo", "--device", "cuda", "--out", str(tmp_path / "out")]
    status, error = failed(arguments, capsys)
    assert (status, len(error.splitlines())) == (1, 1)
    assert "torch sees no GPU here" in error


def test_help_names_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in ("audio", "video", "preset", "seconds", "sessions", "realtime", "fast", "device"):
        assert f"--{option}" in text
    for option in ("keep SECONDS", "keep-video SECONDS", "draw-memory PNG"):
        assert f"--{option}" in text
    assert "dropped in pages of 64 tokens" in text
    for default in (
        "default: cue",
        "default: 60",
        "default: 10",
        "default: 1",
        "default: auto",
        "out/demo",
    ):
        assert default in text
    assert "examples:" in text
    assert "yields when it is interrupted" in text


def test_a_name_that_cannot_be_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (tmp_path / ("x" * 300), tmp_path / ("x" * 300) / "out"):
        status, error = failed(["demo", "--fast", "--out", str(out)], capsys)
        assert (status, len(error.splitlines())) == (2, 1)
        assert error.startswith("error: out: ") and "too long" in error


@pytest.mark.parametrize("clock", ["--fast", "--realtime"])
def test_a_tick_that_raises_is_one_line_and_what_was_recorded_is_written(
    clock: str,
    talk: Path,
    film: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    think, ticks = Runtime._think, []

    def raises_in_the_third(runtime: Runtime, *inputs: object) -> object:
        ticks.append(inputs)
        if len(ticks) == 3:
            raise ZeroDivisionError("of a\ntick")
        return think(runtime, *inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(Runtime, "_think", raises_in_the_third)
    asked = ["demo", clock, "--preset", "tiny", "--audio", str(talk), "--video", str(film)]
    status, error = failed([*asked, "--seconds", "3", "--out", str(tmp_path)], capsys)
    assert status == 1
    assert error == (
        "error: the tick raised, which ended the loop: ZeroDivisionError('of a\\ntick')\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["interrupted"]
    assert report["clients"][0]["speech_s"] == pytest.approx(0.4)


def test_nobody_who_reads_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert cli.main(["info", "--json"]) == 141
        unread.flush()  # as Python does when it exits


def test_demo_as_a_program(talk: Path, film: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tml_runtime.cli", "demo", "--fast", "--seconds", "0.4"]
    command += ["--audio", str(talk), "--video", str(film), "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "2 ticks (0.4 s on a virtual clock), 0 misses" in result.stdout
    assert (tmp_path / "report.json").is_file()


def test_info_text_names_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"tml-kernels {tml_kernels.__version__}, Python ")
    for op in tml_kernels.backend_info()["ops"]:
        assert sum(line.split()[0] == op for line in lines if line) == 1
    assert any(line.startswith("tml_runtime._tick: built") for line in lines)
    assert any(line.startswith("GPU: ") for line in lines)


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ops"] == tml_kernels.backend_info()["ops"]
    assert facts["packages"]["torch"] is not None
    assert facts["host"]["cores"] >= 1
    assert set(facts["extensions"]) >= {"tml_runtime._tick"}


def test_info_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    from tml_runtime import host

    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    assert str(host.gpus()).startswith("no NVIDIA driver: ")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in str(host.gpus())
