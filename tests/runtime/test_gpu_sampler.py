"""What is read of the GPU, with a driver made up, and with the real one where there is one."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_model import CONFIG, MS40, FakeModel, make_runtime

from tml_runtime import watch
from tml_runtime.gpu import SAMPLE, SLOWDOWNS, THROTTLE, GpuSampler, NvmlReader, make_reader


class FakeReader:
    """Sample n draws n watts; throttles from the third on. Raises in sample `breaks_at`."""

    def __init__(self, breaks_at: int = -1) -> None:
        self.reads, self.closed, self.breaks_at = 0, 0, breaks_at

    def read(self, sample: Any) -> None:
        if self.reads == self.breaks_at:
            raise ValueError("no such GPU")
        sample["power_w"], sample["sm_mhz"], sample["temperature_c"] = self.reads, 1980, 61
        sample["memory_used_bytes"], sample["throttle"] = 2**36, 0x41 * (self.reads >= 2)
        self.reads += 1

    def close(self) -> None:
        self.closed += 1


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def test_the_newest_samples_are_kept() -> None:
    reader = FakeReader()
    sampler = GpuSampler(lambda: reader, every_s=1e-4, capacity=5)
    assert len(sampler.samples()) == 0 and sampler.newest() is None
    sampler.start()
    wait_for(lambda: reader.reads > 12)
    assert sampler.throttle == 0x41 and sampler.note == ""
    sampler.stop()
    sampler.stop()
    samples = sampler.samples()
    assert samples.dtype == SAMPLE and len(samples) == 5
    assert samples["power_w"].tolist() == list(range(reader.reads - 5, reader.reads))
    assert (np.diff(samples["t_ns"]) > 0).all()
    assert sampler.newest() == {
        "power_w": reader.reads - 1.0,
        "sm_mhz": 1980,
        "temperature_c": 61,
        "memory_used_bytes": 2**36,
        "throttle": ["gpu_idle", "hw_thermal_slowdown"],
    }
    assert reader.closed == 1 and sampler.throttle == 0  # nobody reads it any more


def test_a_reader_that_breaks_ends_the_sampler_and_is_noted() -> None:
    reader = FakeReader(breaks_at=3)
    sampler = GpuSampler(lambda: reader, every_s=1e-4)
    sampler.start()
    wait_for(lambda: reader.closed == 1)
    assert sampler.throttle == 0 and "no such GPU" in sampler.note
    assert len(sampler.samples()) == 3
    sampler.stop()


def test_where_nothing_is_read_a_note_says_why() -> None:
    before = threading.active_count()
    sampler = GpuSampler(lambda: make_reader(torch.device("cpu")))
    sampler.start()
    assert sampler.note == "the model runs on cpu" and sampler.throttle == 0
    assert threading.active_count() == before
    sampler.stop()
    virtual, _ = make_runtime()
    with virtual:
        report = virtual.report()
    assert report["gpu"] is None and "virtual clock" in report["gpu_note"]


class NVMLError(Exception):
    pass


def fake_nvml(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> SimpleNamespace:
    """A driver that knows one GPU, by its UUID, and does not tell its temperature."""

    def untold(*_: object) -> None:
        raise NVMLError("not supported")

    def handle(uuid: str) -> str:
        assert uuid == "GPU-aa-bb"
        return "gpu"

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_TEMPERATURE_GPU=0,
        opened=0,
        nvmlInit=lambda: setattr(nvml, "opened", nvml.opened + 1),
        nvmlShutdown=lambda: setattr(nvml, "opened", nvml.opened - 1),
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetPowerUsage=lambda gpu: 654_321,
        nvmlDeviceGetClockInfo=lambda gpu, kind: 1755,
        nvmlDeviceGetTemperature=untold,
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=3 << 40),
        nvmlDeviceGetCurrentClocksEventReasons=lambda gpu: 0x4,
    )
    for name, value in changes.items():
        setattr(nvml, name, value)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    properties = SimpleNamespace(uuid="aa-bb")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return nvml


def test_readings_of_nvml_and_what_a_device_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = fake_nvml(monkeypatch)
    reader = make_reader(torch.device("cuda", 1))
    assert isinstance(reader, NvmlReader) and nvml.opened == 1
    sample = np.ones(1, SAMPLE)[0]
    reader.read(sample)
    assert sample["power_w"] == pytest.approx(654.321)
    assert (sample["sm_mhz"], sample["temperature_c"]) == (1755, 0)
    assert (sample["memory_used_bytes"], sample["throttle"]) == (3 << 40, 4)
    reader.close()
    assert nvml.opened == 0


def test_no_driver_no_package_and_no_such_gpu_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise NVMLError("Driver Not Loaded")

    cuda = torch.device("cuda")
    fake_nvml(monkeypatch, nvmlInit=missing)
    assert "Driver Not Loaded" in str(make_reader(cuda))
    fake_nvml(monkeypatch, nvmlDeviceGetHandleByUUID=missing)
    assert "Driver Not Loaded" in str(make_reader(cuda))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pynvml" in str(make_reader(cuda))


def test_the_names_are_those_of_nvidia_ml_py() -> None:
    import pynvml

    for bit, name in THROTTLE.items():
        camel = "".join(word.capitalize() for word in name.split("_"))
        assert getattr(pynvml, f"nvmlClocksEventReason{camel}") == bit
    assert callable(pynvml.nvmlDeviceGetCurrentClocksEventReasons)
    assert SLOWDOWNS & 0x1 == 0


def test_a_live_loop_copies_the_newest_mask_into_its_records(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader = FakeReader()
    reader.reads = 2
    monkeypatch.setattr(watch, "make_reader", lambda device: reader)
    runtime, _ = make_runtime(FakeModel(replace(CONFIG, layout=MS40)), realtime=True)
    assert runtime.report()["gpu"] is None and reader.reads == 2
    with runtime:
        wait_for(lambda: runtime.metrics.count > 3)
        report = runtime.report()
    assert report["gpu"]["throttle"] == ["gpu_idle", "hw_thermal_slowdown"]
    assert report["gpu_note"] == ""
    assert set(runtime.metrics.records()["throttle"].tolist()) <= {0, 0x41}
    assert runtime.metrics.records()["throttle"][-1] == 0x41
    assert reader.closed == 1


@pytest.mark.gpu
def test_the_real_gpu_is_read() -> None:
    reader = make_reader(torch.device("cuda", torch.cuda.current_device()))
    assert isinstance(reader, NvmlReader), reader
    sample = np.zeros(1, SAMPLE)[0]
    reader.read(sample)
    reader.close()
    held = torch.cuda.mem_get_info()
    assert sample["power_w"] > 0 and sample["sm_mhz"] > 0 and sample["temperature_c"] > 0
    assert 0 < sample["memory_used_bytes"] <= held[1]
