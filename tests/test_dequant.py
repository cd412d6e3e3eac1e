"""The decoders' instructions against the storage formats, for every word there is.

Triton's interpreter takes no inline assembly, so the text itself is run here: the handful of PTX
instructions that it uses, on all 65,536 words at once.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from tml_kernels._triton.dequant import FP4, FP8, INT4_EIGHT, INT4_GIVEN

WORDS = np.arange(65536, dtype=np.uint32)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def bf16(bits: np.ndarray) -> np.ndarray:
    """float64 values of bfloat16 patterns in the low 16 bits."""
    return ((bits & 0xFFFF).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    tensor = torch.from_numpy(values).to(torch.bfloat16)
    return tensor.view(torch.int16).numpy().astype(np.uint32) & 0xFFFF


def run(asm: str, *inputs: np.ndarray) -> np.ndarray:
    """$0 after the instructions, given $1, $2, ...; 32-bit registers of two bf16 each."""
    registers = {f"${i}": value for i, value in enumerate(inputs, start=1)}

    def read(name: str) -> np.ndarray:
        if name in registers:
            return registers[name]
        return np.full(inputs[0].shape, int(name, 0), np.uint32)

    for line in re.sub(r"[{}]", "", asm).split(";"):
        words = line.replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        op, target, *names = words
        a = [read(name) for name in names]
        if op == "mov.b32":
            value = a[0]
        elif op == "and.b32":
            value = a[0] & a[1]
        elif op == "xor.b32":
            value = a[0] ^ a[1]
        elif op == "shl.b32":
            value = a[0] << a[1]
        elif op == "shr.u32":
            value = a[0] >> a[1]
        elif op == "lop3.b32":
            assert names[3] == "0xEA"
            value = (a[0] & a[1]) | a[2]
        else:
            assert op == "fma.rn.bf16x2", op
            halves = [bf16(a[0] >> s) * bf16(a[1] >> s) + bf16(a[2] >> s) for s in (0, 16)]
            value = round_to_bf16(halves[0]) | round_to_bf16(halves[1]) << 16
        registers[target] = value
    return registers["$0"]


def decode(asm: str, *more: int) -> np.ndarray:
    """float64 [65536] of every word, which stands in the low half in one run and in the high half
    in another: the neighbour must not matter."""
    given = [np.full(65536, value | value << 16, np.uint32) for value in more]
    other = WORDS[::-1] ^ 0x5A5A
    low = bf16(run(asm, WORDS | other << 16, *given))
    high = bf16(run(asm, other | WORDS << 16, *given) >> 16)
    assert np.array_equal(low, high)
    return low


@pytest.mark.parametrize("i", range(4))
def test_int4(i: int) -> None:
    code = (WORDS >> (4 * i)) & 15
    assert np.array_equal(decode(INT4_EIGHT.value[i]), code - 8.0)
    for zero in (0, 3, 8, 15):
        bits = int(torch.tensor(128.0 + zero).to(torch.bfloat16).view(torch.int16))
        assert np.array_equal(decode(INT4_GIVEN.value[i], bits), code - float(zero))


@pytest.mark.parametrize("i", range(4))
def test_fp4(i: int) -> None:
    """Bit positions as `PackedExperts` lists them; the scale is given times 2^126."""
    if i < 3:
        sign, code = WORDS >> (15 - 3 * i) & 1, WORDS >> (6 - 3 * i) & 7
    else:
        sign = WORDS >> 14 & 1
        code = (WORDS >> 11 & 1) << 2 | (WORDS >> 10 & 1) << 1 | WORDS >> 13 & 1
    value = np.array(E2M1)[code] * np.where(sign, -1.0, 1.0)
    for scale in (1.0, 1.75, 0.375, 2.0**-20):
        bits = int(torch.tensor(scale * 2.0**126).to(torch.bfloat16).view(torch.int16))
        assert np.array_equal(decode(FP4.value[i], bits), value * scale)


@pytest.mark.parametrize("i", range(2))
def test_fp8(i: int) -> None:
    byte = (WORDS >> (8 * i) & 0xFF).astype(np.uint8)
    value: Tensor = torch.from_numpy(byte).view(torch.float8_e4m3fn).double()
    finite = ~value.isnan().numpy()  # 0x7F and 0xFF, which no packed weight holds
    assert np.array_equal(decode(FP8.value[i])[finite], value.numpy()[finite])
    assert finite.sum() == 65536 * 254 // 256
