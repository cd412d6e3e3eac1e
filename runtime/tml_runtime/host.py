"""What this process runs on, for `tml-runtime info` and for reports. Sets nothing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Callable
from typing import Any

import torch

import tml_kernels

PACKAGES = ("torch", "triton", "numpy", "nvidia-ml-py", "av", "soundfile", "matplotlib", "rich")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def host_facts() -> dict[str, Any]:
    """Facts that are the same for every run on a machine; "gpu" is None where torch sees none."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "system": " ".join((platform.system(), platform.machine(), *platform.libc_ver())).strip(),
        "cpu": _cpu_name(),
        "cores": _num_cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def gpus() -> list[dict[str, Any]] | str:
    """Name, driver, clocks, power and temperature of every GPU now, or why there are none."""
    try:
        import pynvml as nvml
    except ImportError as error:
        return f"nvidia-ml-py is not installed ({error}): pip install nvidia-ml-py"
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return f"no NVIDIA driver: {error}"
    try:
        return [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> dict[str, Any]:
    gpu = nvml.nvmlDeviceGetHandleByIndex(index)
    readings: dict[str, Callable[[], Any]] = {
        "name": lambda: nvml.nvmlDeviceGetName(gpu),
        "driver": nvml.nvmlSystemGetDriverVersion,
        "memory_total_mib": lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).total >> 20,
        "memory_used_mib": lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).used >> 20,
        "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "sm_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
        "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    }
    values: dict[str, Any] = {}
    for name, read in readings.items():
        try:
            value = read()
        except nvml.NVMLError as error:
            value = f"not readable: {error}"
        values[name] = value.decode() if isinstance(value, bytes) else value
    return values


def _num_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def info() -> dict[str, Any]:
    """Everything `tml-runtime info` shows; plain data for JSON."""
    from . import Runtime  # noqa: F401  (its imports register every op a tick uses)

    backends = tml_kernels.backend_info()
    if torch.cuda.is_available():
        torch_cuda = f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} device(s)"
    elif torch.version.cuda is None:
        torch_cuda = "built without CUDA: models run on the CPU"
    else:
        torch_cuda = f"built for CUDA {torch.version.cuda}, but sees no GPU"
    return {
        "tml_kernels": tml_kernels.__version__,
        "host": host_facts(),
        "packages": {package: version(package) for package in PACKAGES},
        "gpus": gpus(),
        "torch_cuda": torch_cuda,
        "extensions": backends["extensions"],
        "ops": backends["ops"],
    }
