from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from tml_kernels import _registry
from tml_kernels._registry import CUDA, TRITON, OpBackends, Toolchain, on_its_device


def test_a_kernel_is_launched_with_its_first_tensors_device_current(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[object] = []

    @contextlib.contextmanager
    def current(device: torch.device) -> Iterator[None]:
        events.append(device)
        yield
        events.append("left")

    monkeypatch.setattr(torch.cuda, "device", current)
    on_its_device(lambda *args: events.append(args[1:]))(torch.empty(2, device="meta"), None, 1e-6)
    assert events == [torch.device("meta"), (None, 1e-6), "left"]


def nothing(x: torch.Tensor) -> None:
    """Neither writes nor returns anything."""


@pytest.mark.parametrize(
    ("kernel", "needs", "expected"),
    [
        (None, Toolchain("made", lambda: None), ("plain", "no kernel for this op yet")),
        (nothing, Toolchain("made", lambda: None), ("made", "")),
        (nothing, Toolchain("made", lambda: "not here"), ("plain", "not here")),
    ],
    ids=["no-kernel", "made", "missing"],
)
def test_what_a_kernel_needs_decides(
    kernel, needs: Toolchain, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_registry, "_BACKENDS", {})
    name = f"registry_test_{expected[0]}_{len(expected[1])}"
    _registry.register_op(f"{name}(Tensor x) -> ()", plain=nothing, kernel=kernel, needs=needs)
    assert _registry.registered_ops() == {name: OpBackends("plain", *expected)}


@pytest.mark.parametrize(("toolchain", "module"), [(TRITON, "triton"), (CUDA, "_cuda")])
def test_a_missing_module_is_named(
    toolchain: Toolchain, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        assert name.endswith(module)

    monkeypatch.setattr(_registry.importlib.util, "find_spec", missing)
    assert module in (toolchain.why_not() or "")


@pytest.mark.parametrize("op", ["apply_deltas", "move_pages"])
def test_ops_of_the_extension_have_its_kernel_where_it_is_built(op: str) -> None:
    from tml_kernels import backend_info

    info = backend_info()
    built = info["extensions"]["tml_kernels._cuda"] == "built"
    assert info["ops"][op]["cuda"] == ("_cuda" if built else "plain")
    assert ("tml_kernels._cuda" in info["ops"][op]["why"]) == (not built)
