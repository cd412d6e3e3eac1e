from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bench.machine import clocks, describe, machine

pynvml = pytest.importorskip("pynvml")


class FakeDriver:
    """The few NVML calls that are made, with one GPU that is at its power cap."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = 0
        self.asked: list[str] = []
        replacements = {
            "nvmlInit": lambda: self.count(1),
            "nvmlShutdown": lambda: self.count(-1),
            "nvmlSystemGetDriverVersion": lambda: "580.1",
            "nvmlDeviceGetHandleByUUID": self.by_uuid,
            "nvmlDeviceGetHandleByIndex": lambda index: f"index {index}",
            "nvmlDeviceGetClockInfo": lambda handle, kind: 1980 - kind,
            "nvmlDeviceGetPowerUsage": lambda handle: 650_500,
            "nvmlDeviceGetTemperature": self.unsupported,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x1 | 0x4 | 0x40,
        }
        for name, function in replacements.items():
            monkeypatch.setattr(pynvml, name, function, raising=False)
        properties = SimpleNamespace(
            name="NVIDIA H200", major=9, minor=0, multi_processor_count=132,
            total_memory=141 << 30, L2_cache_size=50 << 20, uuid="abc",
        )  # fmt: skip
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)

    def count(self, change: int) -> None:
        self.open += change

    def by_uuid(self, uuid: str) -> str:
        self.asked.append(uuid)
        return uuid

    def unsupported(self, *_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def test_readings_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(monkeypatch)
    assert clocks() == {
        "sm_mhz": 1980 - pynvml.NVML_CLOCK_SM,
        "memory_mhz": 1980 - pynvml.NVML_CLOCK_MEM,
        "power_w": 650.5,
        "slowed_by": ["power cap", "hardware thermal"],
    }  # the temperature, which this driver does not give, is left out
    info = machine()
    assert info["gpu"]["driver"] == "580.1"
    assert info["gpu"]["capability"] == "9.0"
    assert driver.asked == ["GPU-abc"] * 2
    assert driver.open == 0
    assert describe(info, clocks()).startswith("NVIDIA H200, driver 580.1")


def test_gpu_that_nvml_cannot_find_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(monkeypatch)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", driver.unsupported)
    assert clocks()["power_w"] == 650.5


def test_no_driver_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(monkeypatch)
    monkeypatch.setattr(pynvml, "nvmlInit", driver.unsupported)
    assert "NVML" in clocks()["error"]
    assert "NVML" in machine()["gpu"]["driver"]


def test_driver_that_hands_out_no_gpu_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(monkeypatch)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", driver.unsupported)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", driver.unsupported)
    assert "NVML" in clocks()["error"]
    assert "NVML" in machine()["gpu"]["driver"]
    assert driver.open == 0


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    info = machine()
    assert info["gpu"] is None
    assert info["cores"] >= 1
    assert clocks() == {}
    assert describe(info, {}).startswith("no GPU")
