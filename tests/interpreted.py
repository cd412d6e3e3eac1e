"""A kernel of the operations our kernels are made of, to be interpreted in two ways.

python tests/interpreted.py FILE writes what Triton's own interpreter computes.
"""

# Dimension key: N elements of a row, M rows.

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

M, N = 8, 16


@triton.jit
def mix(a, b, FACTOR: tl.constexpr):
    return tl.maximum(a * FACTOR, b) - tl.minimum(b, 0.25) / 3.0


@triton.jit
def operations_kernel(
    x_ptr, y_ptr,             # in   [M, N]  float32, -0.0, inf and NaN among them
    i_ptr,                    # in   [M, N]  int32, some so large that a product wraps
    f_ptr, stride_f,          # out  [F, M, N]  float32
    n_ptr, stride_n,          # out  [F, M, N]  int64
    total_ptr,                # out  [N]  float32
    scale,
    rows,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    offs_m, offs_n = tl.arange(0, M), tl.arange(0, N)
    offs_mn = offs_m[:, None] * N + offs_n
    mask_mn = (offs_m[:, None] < rows) & (offs_n[None, :] != 3)
    x_mn = tl.load(x_ptr + offs_mn, mask=mask_mn, other=-1.5)
    y_mn = tl.load(y_ptr + offs_mn)
    i_mn = tl.load(i_ptr + offs_mn)
    u_mn = i_mn.to(tl.uint32, bitcast=True)
    y_n = tl.load(y_ptr + offs_n)

    tl.store(f_ptr + offs_mn, mix(x_mn, y_mn, 0.5))
    tl.store(f_ptr + stride_f + offs_mn, 2 - x_mn * scale + y_n[None, :] * -0.0)
    tl.store(f_ptr + 2 * stride_f + offs_mn, tl.where(x_mn > y_mn, x_mn, -y_mn))
    tl.store(f_ptr + 3 * stride_f + offs_mn, tl.exp2(tl.abs(x_mn)) + tl.max(y_mn, 1)[:, None])
    tl.store(f_ptr + 4 * stride_f + offs_mn, tl.cumsum(x_mn, 1) + tl.sum(y_mn, 0)[None, :])
    tl.store(f_ptr + 5 * stride_f + offs_mn, i_mn * 5.0 / (u_mn % 7 + 1))
    tl.store(f_ptr + 6 * stride_f + offs_mn, tl.sum(tl.dot(x_mn, tl.trans(x_mn)), 1)[:, None])
    tl.store(f_ptr + 7 * stride_f + offs_mn, x_mn.to(tl.bfloat16).to(tl.float32) - 1e-38)

    tl.store(n_ptr + offs_mn, i_mn * i_mn + 5)
    tl.store(n_ptr + stride_n + offs_mn, i_mn.to(tl.int64) * i_mn - 1)
    tl.store(n_ptr + 2 * stride_n + offs_mn, (u_mn >> 3) ^ (u_mn * 2654435769))
    tl.store(n_ptr + 3 * stride_n + offs_mn, (i_mn >> 3) | (7 << (offs_n % 5))[None, :])
    tl.store(n_ptr + 4 * stride_n + offs_mn, i_mn * 5 // 3 + i_mn % 5 - (-offs_n)[None, :])
    tl.store(n_ptr + 5 * stride_n + offs_mn, tl.argmax(y_mn, 1)[:, None] + (x_mn == y_mn))
    tl.store(n_ptr + 6 * stride_n + offs_mn, ~(i_mn <= 5) & mask_mn)
    tl.store(n_ptr + 7 * stride_n + offs_mn, tl.umulhi(u_mn, 0x9E3779B9))
    for k in tl.static_range(2):
        tl.atomic_add(total_ptr + offs_n, y_n + k, mask=offs_n < rows)


def run_operations() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_M_N, y_M_N = (torch.randn(M, N, generator=generator) for _ in range(2))
    x_M_N[0, :4] = torch.tensor([-0.0, 0.0, float("inf"), float("nan")])
    y_M_N[0, :2] = torch.tensor([0.0, -0.0])
    i_M_N = torch.randint(-(2**31), 2**31, (M, N), generator=generator).to(torch.int32)
    i_M_N[1] = torch.arange(N) - 5
    results = []
    for scale in (0.3, 1, 1.0, -0.0):  # some are equal as keys, of types that are not
        f_F_M_N = torch.zeros(8, M, N)
        n_F_M_N = torch.zeros(8, M, N, dtype=torch.int64)
        total_N = torch.zeros(N)
        out = (f_F_M_N, M * N, n_F_M_N, M * N, total_N)
        sizes: dict[str, Any] = {"rows": M - 1, "M": M, "N": N}
        operations_kernel[(1,)](x_M_N, y_M_N, i_M_N, *out, scale, **sizes)
        results += [f_F_M_N, n_F_M_N, total_N]
    return results


if __name__ == "__main__":
    np.savez(sys.argv[1], *(result.numpy() for result in run_operations()))
