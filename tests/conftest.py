"""Seeds, poisoned allocations, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import signal
import time

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # must be set before any kernel module is imported
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import quick_interpreter  # noqa: E402

if not HAS_GPU:
    quick_interpreter.install()
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for every core: threads would only wait
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it puts behind
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else no program would be interrupted

# torch.empty then holds NaN (or the largest integer), so an element nobody wrote is loud.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; see `bench accept`"))


def pytest_runtest_logfinish() -> None:
    """A fault on the GPU spoils every later call of its process, so that process ends; beside
    others a new one takes over, and no test fails for another's fault. Memory is given back."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(f"the GPU faulted: {error}", returncode=3)
        time.sleep(0.5)  # for the report of the test to be sent
        os._exit(3)
    if torch.cuda.memory_reserved() > 1 << 30:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Every test has its own inputs, the same ones every time: TML_TEST_SEED=n for others."""
    import zlib

    base = int(os.environ.get("TML_TEST_SEED", "0"))
    torch.manual_seed(base + zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def device() -> str:
    """Where kernels run: the GPU, or the CPU through Triton's interpreter."""
    return "cuda" if HAS_GPU else "cpu"
