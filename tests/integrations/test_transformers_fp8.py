"""transformers' FP8Experts on `experts_forward`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import experts_f64, implementation
from torch import Tensor
from transformers import MixtralConfig
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import use_experts_implementation

from tml_kernels.integrations.transformers import register
from tml_kernels.testing import assert_matches, randn, relative_l2


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register()
    with torch.no_grad():
        yield


def run(module: Any, call: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    with implementation(module, "tml"):
        return module(*call)


def fp8_experts(block: list[int] | None, scale_fmt: str = "float", width: int = 128) -> Any:
    """As transformers' quantiser makes them; its own forward needs a GPU."""
    cls = use_experts_implementation(
        experts_class=type("Experts", (FP8Experts,), {}),
        experts_interface=ALL_FP8_EXPERTS_FUNCTIONS,
    )
    config = MixtralConfig(hidden_size=256, intermediate_size=width, num_local_experts=4)
    module = cls(config=config, block_size=block, scale_fmt=scale_fmt)
    for name in ("gate_up_proj", "down_proj"):
        codes, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
        codes.copy_(randn(*codes.shape, scale=64.0))
        # Powers of two where e8m0 can hold no others.
        exponent = torch.randint(-12, -9, scale.shape).float()
        scale.copy_(torch.exp2(exponent if scale_fmt == "ue8m0" else exponent + torch.rand(())))
    return module


def dequantised(codes_R_K: Tensor, scale: Tensor, block: list[int] | None) -> Tensor:
    num_rows, num_columns = codes_R_K.shape
    rows, columns = block or (num_rows // scale.shape[0], num_columns)
    scale = scale.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return codes_R_K.double() * scale[:num_rows, :num_columns]


def expected(module: Any, block: list[int] | None, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """With the weights as stored and activations that are not rounded."""

    def matrix(name: str, expert: int) -> Tensor:
        scale = getattr(module, f"{name}_scale_inv")[expert]
        return dequantised(getattr(module, name)[expert], scale, block)

    return experts_f64(
        x, lambda e: matrix("gate_up_proj", e).chunk(2), lambda e: matrix("down_proj", e),
        ids.masked_fill(ids == 4, -1), w, lambda g, u: F.silu(g) * u,
    )  # fmt: skip


def call_of(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Of four experts; id 4 is the sentinel."""
    return randn(7, 256, dtype=dtype), torch.randint(0, 5, (7, 2)), torch.rand(7, 2)


KINDS = [([128, 128], 128), ([128, 128], 192), (None, 40)]


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize(("block", "width"), KINDS)
def test_fp8(block: list[int] | None, width: int, scale_fmt: str) -> None:
    module, call = fp8_experts(block, scale_fmt, width), call_of()
    first = run(module, call)
    assert_matches(first, expected(module, block, *call))
    module.gate_up_proj_scale_inv.copy_(module.gate_up_proj_scale_inv.float() * 2.0)
    assert relative_l2(run(module, call), first) > 0.1
    assert_matches(run(module, call), expected(module, block, *call))


@pytest.mark.gpu
@pytest.mark.parametrize(("block", "width"), KINDS)
def test_gpu_fp8(block: list[int] | None, width: int) -> None:
    module, call = fp8_experts(block, "float", width), call_of(torch.bfloat16)
    wanted = expected(module, block, *call)
    x, ids, weight = (tensor.cuda() for tensor in call)
    assert_matches(run(module.cuda(), (x, ids, weight)), wanted)


def test_fp8_of_another_block_or_packed_in_bytes_is_refused() -> None:
    module, call = fp8_experts([64, 64]), call_of()
    with pytest.raises(NotImplementedError, match=r"block_size: expected \[128, 128\] or None"):
        run(module, call)
    module.gate_up_proj = torch.nn.Parameter(module.gate_up_proj.view(torch.int8), False)
    with pytest.raises(NotImplementedError, match=r"gate_up_proj: has dtype torch.int8"):
        run(module, call)


def test_fp8_gate_with_constants_of_the_configuration() -> None:
    """FP8Experts reads gpt-oss's constants itself; other ones are refused."""
    module, call = fp8_experts(None), call_of()
    silu = run(module, call)
    module.swiglu_alpha, module.swiglu_limit = 1.702, 7.0
    module.down_proj_scale_inv.mul_(1.0)  # a rewritten parameter; the gate is looked at again
    assert relative_l2(run(module, call), silu) > 0.1
    assert module._tml_prepared.activation == "swiglu_oai"
    module.swiglu_alpha, module.limit = None, 7.0
    module.down_proj_scale_inv.mul_(1.0)
    with pytest.raises(NotImplementedError, match=r"FP8Experts\._apply_gate"):
        run(module, call)
