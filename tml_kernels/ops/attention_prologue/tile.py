"""What happens to some heads of one token before they are rotated: convolve, normalise.

Tiles are those of `_triton/heads.py`.
"""

# pyright: reportGeneralTypeIssues=false

# Dimension key: H heads (of q, or of k or v: then the kernel's G), C head width.

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton.heads import heads


@triton.jit
def _input_ptr(x_ptr, state_ptr, i, J, WIDTH: tl.constexpr):
    """Where input i of a session lies: i >= 0 in this call's tokens, -3..-1 in its state."""
    return tl.where(i >= 0, x_ptr + i * J, state_ptr + (i + 3) * WIDTH)


@triton.jit
def convolve(
    x_ptr, weight_ptr, state_ptr, i, block, J,
    H: tl.constexpr, C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """x + conv(x) of input i of a session, float32, oldest tap first."""
    head_h, column_b_2, mask_h_b_2 = heads(block, H, C, BLOCK_H, BLOCK_B)
    offs_h_b_2 = head_h[:, None, None] * C + column_b_2[None, :, :]
    offs_w = offs_h_b_2[:, :, :, None] * 4 + tl.arange(0, 4)[None, None, None, :]
    weight = tl.load(weight_ptr + offs_w, mask=mask_h_b_2[:, :, :, None], other=0.0)
    even, odd = tl.split(tl.reshape(weight, (BLOCK_H, BLOCK_B, 2, 2, 2)))
    weight_0, weight_2 = tl.split(even)
    weight_1, weight_3 = tl.split(odd)

    ptr_0 = _input_ptr(x_ptr, state_ptr, i - 3, J, H * C)
    ptr_1 = _input_ptr(x_ptr, state_ptr, i - 2, J, H * C)
    ptr_2 = _input_ptr(x_ptr, state_ptr, i - 1, J, H * C)
    x_0 = tl.load(ptr_0 + offs_h_b_2, mask=mask_h_b_2, other=0.0).to(tl.float32)
    x_1 = tl.load(ptr_1 + offs_h_b_2, mask=mask_h_b_2, other=0.0).to(tl.float32)
    x_2 = tl.load(ptr_2 + offs_h_b_2, mask=mask_h_b_2, other=0.0).to(tl.float32)
    x_3 = tl.load(x_ptr + i * J + offs_h_b_2, mask=mask_h_b_2, other=0.0).to(tl.float32)
    return x_3 + (((x_0 * weight_0 + x_1 * weight_1) + x_2 * weight_2) + x_3 * weight_3)


@triton.jit
def write_state(
    x_ptr, state_ptr, i, num_inputs, block, J,
    H: tl.constexpr, C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Where i is 0, the session's last three inputs become its state; with one or two new ones,
    rows move up."""
    if i == 0:
        head_h, column_b_2, mask_h_b_2 = heads(block, H, C, BLOCK_H, BLOCK_B)
        offs_h_b_2 = head_h[:, None, None] * C + column_b_2[None, :, :]
        ptr_0 = _input_ptr(x_ptr, state_ptr, num_inputs - 3, J, H * C)
        ptr_1 = _input_ptr(x_ptr, state_ptr, num_inputs - 2, J, H * C)
        ptr_2 = _input_ptr(x_ptr, state_ptr, num_inputs - 1, J, H * C)
        x_0 = tl.load(ptr_0 + offs_h_b_2, mask=mask_h_b_2, other=0.0)
        x_1 = tl.load(ptr_1 + offs_h_b_2, mask=mask_h_b_2, other=0.0)
        x_2 = tl.load(ptr_2 + offs_h_b_2, mask=mask_h_b_2, other=0.0)
        tl.debug_barrier()  # every thread has read the old state
        tl.store(state_ptr + offs_h_b_2, x_0, mask=mask_h_b_2)
        tl.store(state_ptr + H * C + offs_h_b_2, x_1, mask=mask_h_b_2)
        tl.store(state_ptr + 2 * H * C + offs_h_b_2, x_2, mask=mask_h_b_2)


@triton.jit
def normalize(x_h_b_2, weight_ptr, eps, C: tl.constexpr, BLOCK_B: tl.constexpr):
    """RMSNorm of every head."""
    _, column_b_2, mask_1_b_2 = heads(0, 1, C, 1, BLOCK_B)
    offs_1_b_2 = column_b_2[None, :, :]
    weight_1_b_2 = tl.load(weight_ptr + offs_1_b_2, mask=mask_1_b_2, other=0.0).to(tl.float32)
    square_h = tl.sum(tl.sum(x_h_b_2 * x_h_b_2, axis=2), axis=1)
    scale_h = 1.0 / tl.sqrt(square_h / C + eps)
    return x_h_b_2 * scale_h[:, None, None] * weight_1_b_2
