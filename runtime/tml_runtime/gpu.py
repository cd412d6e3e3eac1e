"""What the GPU says of itself once a second, read by a thread that the tick never waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from ._tick import now_ns

SAMPLE = np.dtype(
    [
        ("t_ns", np.int64),  # as `_tick.now_ns`
        ("power_w", np.float32),
        ("sm_mhz", np.int32),
        ("temperature_c", np.int32),
        ("memory_used_bytes", np.int64),
        ("throttle", np.uint64),  # a mask of THROTTLE's bits
    ]
)

# NVML's clocks event reasons (nvmlClocksEventReason* in nvml.h): why clocks are not at their most.
THROTTLE = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
SLOWDOWNS = 0x004 | 0x008 | 0x020 | 0x040 | 0x080  # nobody asked for these


def throttle_names(mask: int) -> list[str]:
    """
    >>> throttle_names(0x05)
    ['gpu_idle', 'sw_power_cap']
    """
    return [name for bit, name in THROTTLE.items() if mask & bit]


class Reader(Protocol):
    def read(self, sample: Any) -> None:
        """Fill in one `SAMPLE`, but for its time."""
        ...

    def close(self) -> None: ...


class NvmlReader:
    """NVML's readings of a CUDA device. What a device does not tell stays 0.

    Raises ImportError without nvidia-ml-py, and pynvml.NVMLError without a driver.
    """

    def __init__(self, device: torch.device) -> None:
        import pynvml as nvml

        nvml.nvmlInit()
        # By UUID: NVML does not know CUDA_VISIBLE_DEVICES, which renumbers torch's devices.
        uuid = torch.cuda.get_device_properties(device).uuid
        gpu = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        self._nvml = nvml
        self._readings = {
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
            "memory_used_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
            "throttle": lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu),
        }

    def read(self, sample: Any) -> None:
        for name, reading in self._readings.items():
            try:
                sample[name] = reading()
            except self._nvml.NVMLError:
                sample[name] = 0

    def close(self) -> None:
        self._nvml.nvmlShutdown()


def make_reader(device: torch.device) -> Reader | str:
    """A reader of `device`, or why there is none."""
    if device.type != "cuda":
        return f"the model runs on {device.type}"
    try:
        return NvmlReader(device)
    except Exception as error:  # no package, no driver, a device it cannot tell from others
        return f"NVML does not read the GPU: {error!r}"


class GpuSampler:
    """Reads the GPU every `every_s` and keeps the last `capacity` samples, ten minutes of them.

    `make` gives a reader or says why there is none. `throttle` is the newest sample's mask, which
    any thread may read at no cost; 0 where nothing is read, and `note` then says why.
    """

    def __init__(
        self, make: Callable[[], Reader | str], *, every_s: float = 1.0, capacity: int = 600
    ) -> None:
        self.throttle = 0
        self.note = "not started"
        self._make = make
        self._every_s = every_s
        self._samples = np.zeros(capacity + 1, SAMPLE)  # one more: the one being written
        self._count = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, if there is a reader."""
        reader = self._make()
        if isinstance(reader, str):
            self.note = reader
            return
        self.note = ""
        self._over.clear()
        self._thread = threading.Thread(
            target=self._loop, args=(reader,), name="tml-gpu", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """The samples stay. More than once is no error."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)  # a driver that hangs must not hold the client up

    def samples(self) -> np.ndarray:
        """Copy of the samples kept, oldest first: dtype `SAMPLE`."""
        before, capacity = self._count, len(self._samples) - 1
        first = max(0, before - capacity)
        copy = self._samples[np.arange(first, before) % len(self._samples)]
        return copy[max(0, self._count - capacity - first) :]

    def newest(self) -> dict[str, Any] | None:
        """The newest sample as plain data, its throttle reasons by name."""
        samples = self.samples()
        if len(samples) == 0:
            return None
        names = ("power_w", "sm_mhz", "temperature_c", "memory_used_bytes")
        readings = {name: samples[-1][name].item() for name in names}
        return {**readings, "throttle": throttle_names(int(samples[-1]["throttle"]))}

    def _sample(self, reader: Reader) -> None:
        sample = self._samples[self._count % len(self._samples)]
        sample["t_ns"] = now_ns()
        reader.read(sample)
        self._count += 1
        self.throttle = int(sample["throttle"])

    def _loop(self, reader: Reader) -> None:
        try:
            self._sample(reader)
            while not self._over.wait(self._every_s):
                self._sample(reader)
        except Exception as error:
            self.note = f"reading the GPU failed: {error!r}"
        finally:
            self.throttle = 0
            reader.close()
