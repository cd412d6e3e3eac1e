"""What the measurements ran on. Reads the driver, never changes a setting."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from typing import Any

import torch

SETTINGS = ("TML_EAGER", "TML_DEBUG_GRAPH")  # of the environment: they change what runs
# Bits of NVML's clock event reasons that lower a clock (nvml.h, "ClocksEventReasons").
SLOWDOWNS = {
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal",
    0x040: "hardware thermal",
    0x080: "power brake",
}


def machine() -> dict[str, Any]:
    """Versions, processor, and the GPU with its driver; "gpu" is None without one."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "system": " ".join((platform.system(), platform.machine(), *platform.libc_ver())).strip(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": _gpu(),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    gpu: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
    }
    with _nvml() as (nvml, _, error):
        gpu["driver"] = error
        if nvml is not None:
            with contextlib.suppress(nvml.NVMLError):
                gpu["driver"] = nvml.nvmlSystemGetDriverVersion()
    return gpu


def clocks() -> dict[str, Any]:
    """Clocks in MHz, power in W, temperature in C and what slows the GPU down now; {} without one.

    A value that the driver does not give is left out; {"error": why} where NVML does not load.
    """
    if not torch.cuda.is_available():
        return {}
    with _nvml() as (nvml, handle, error):
        if nvml is None:
            return {"error": error}
        prefix = "nvmlDeviceGetCurrentClocks"  # the call was renamed; packages have one or both
        reasons = getattr(nvml, f"{prefix}EventReasons", None)
        reasons = reasons or getattr(nvml, f"{prefix}ThrottleReasons")
        readings = {
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(
                handle, nvml.NVML_TEMPERATURE_GPU
            ),
            "slowed_by": lambda: [name for bit, name in SLOWDOWNS.items() if reasons(handle) & bit],
        }
        result: dict[str, Any] = {}
        for name, read in readings.items():
            with contextlib.suppress(nvml.NVMLError):
                result[name] = read()
        return result


@contextlib.contextmanager
def _nvml() -> Iterator[tuple[Any, Any, str]]:
    """(module, handle of torch's device 0, ""), or (None, None, why not)."""
    with contextlib.ExitStack() as opened:
        try:
            import pynvml

            pynvml.nvmlInit()
            opened.callback(pynvml.nvmlShutdown)
            found = pynvml, _handle(pynvml), ""
        except Exception as error:  # the package or the driver's library is missing, or it refuses
            found = None, None, f"NVML: {error}"
        yield found


def _handle(pynvml: Any) -> Any:
    """By UUID, since CUDA_VISIBLE_DEVICES renumbers torch's devices and not NVML's."""
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return pynvml.nvmlDeviceGetHandleByIndex(0)


def describe(info: dict[str, Any], now: dict[str, Any]) -> str:
    """Two lines for the head of a printed result."""
    gpu = info["gpu"]
    software = f"Python {info['python']}, torch {info['torch']}, triton {info['triton']}"
    if gpu is None:
        return f"no GPU; {info['cpu']}, {info['cores']} cores\n{software}"
    reading = ", ".join(f"{name} {value}" for name, value in now.items())
    return f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}; {reading}\n{software}"
