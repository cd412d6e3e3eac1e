"""Triton kernel of embed_tokens: one program per token, whatever the token is made of."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's types know no launch options.

# Dimension key: T tokens, D model width, V rows of the text table, B bands, Y = B * levels rows of
# the dMel table, A frames heard, P embedded tokens, N rows of steps, F frames of a step.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._aot import AotSpec
from .configs import SHIPPED, Config, choose_config
from .kinds import TokenKind

TEXT: tl.constexpr = tl.constexpr(int(TokenKind.TEXT))
LEVELS: tl.constexpr = tl.constexpr(int(TokenKind.LEVELS))
EMBEDDED: tl.constexpr = tl.constexpr(int(TokenKind.EMBEDDED))
STEP: tl.constexpr = tl.constexpr(int(TokenKind.STEP))

SIZES = ["V", "A", "P", "N", "F"]  # change from tick to tick: one compiled kernel serves all
# Slices of one descriptor, or of the state's tensors.
UNALIGNED = ["kind_ptr", "index_ptr", "heard_ptr", "token_ptr", "said_ptr"]


@triton.jit
def _rms_norm(h_d, norm_ptr, offs_d, mask_d, D, eps):
    weight_d = tl.load(norm_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(h_d * h_d, axis=0) / D + eps)
    return h_d * scale * weight_d


@triton.jit
def _sound(
    levels_ptr, table_ptr, offs_d, mask_d, D,
    BANDS: tl.constexpr, NUM_LEVELS: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The sum of one frame's table rows, added in the order of the bands."""
    sum_d = tl.zeros([BLOCK_D], tl.float32)
    for b in tl.range(0, BANDS, loop_unroll_factor=UNROLL):
        level = tl.minimum(tl.load(levels_ptr + b).to(tl.int64), NUM_LEVELS - 1)
        row_ptr = table_ptr + (b * NUM_LEVELS + level) * D
        sum_d += tl.load(row_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    return sum_d


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def embed_tokens_kernel(
    kind_ptr, index_ptr,              # in   [T]
    embed_ptr, embed_norm_ptr,        # in   [V, D], [D]
    table_ptr, table_norm_ptr,        # in   [Y, D], [D]
    heard_ptr,                        # in   [A, B]
    x_ptr,                            # in   [P, D]
    token_ptr, said_ptr,              # in   [N], [N, F, B]
    out_ptr,                          # out  [T, D]
    V, A, P, N, F, D, eps,
    BANDS: tl.constexpr, NUM_LEVELS: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    kind = tl.load(kind_ptr + t)
    index = tl.load(index_ptr + t).to(tl.int64)

    is_step = (kind == STEP) & (index >= 0) & (index < N)
    is_heard = (kind == LEVELS) & (index >= 0) & (index < A)
    token = tl.load(token_ptr + index, mask=is_step, other=-1).to(tl.int64)
    token = tl.where(kind == TEXT, index, token)
    x_d = tl.zeros([BLOCK_D], tl.float32)
    if (token >= 0) & (token < V):
        h_d = tl.load(embed_ptr + token * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        x_d = _rms_norm(h_d, embed_norm_ptr, offs_d, mask_d, D, eps)
        x_d = x_d.to(out_ptr.dtype.element_ty).to(tl.float32)
    if (kind == EMBEDDED) & (index >= 0) & (index < P):
        x_d = tl.load(x_ptr + index * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)

    # One loop for a frame heard and for those of a step, so that both have the same code.
    num_frames = tl.where(is_step, F, tl.where(is_heard, 1, 0))
    frame_ptr = tl.where(is_step, said_ptr + index * F * BANDS, heard_ptr + index * BANDS)
    for f in range(num_frames):
        sum_d = _sound(
            frame_ptr + f * BANDS, table_ptr, offs_d, mask_d, D,
            BANDS, NUM_LEVELS, BLOCK_D, UNROLL,
        )  # fmt: skip
        sound_d = _rms_norm(sum_d, table_norm_ptr, offs_d, mask_d, D, eps)
        sound_d = sound_d.to(out_ptr.dtype.element_ty).to(tl.float32)
        # 0 + -0 is 0: a frame heard stays as it is.
        x_d = tl.where(is_heard, sound_d, x_d + sound_d)
        x_d = x_d.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + t * D + offs_d, x_d, mask=mask_d)


def launch_embed_tokens(
    kind: Tensor,
    index: Tensor,
    embed: Tensor,
    embed_norm: Tensor,
    table: Tensor,
    table_norm: Tensor,
    heard: Tensor,
    x: Tensor,
    token: Tensor,
    said: Tensor,
    num_levels: int,
    eps: float,
    out: Tensor,
) -> None:
    num_tokens, width = out.shape
    config = choose_config(width)
    embed_tokens_kernel[(num_tokens,)](
        kind, index, embed, embed_norm, table, table_norm, heard, x, token, said, out,
        len(embed), len(heard), len(x), len(said), said.shape[1], width, eps,
        BANDS=heard.shape[1], NUM_LEVELS=num_levels,
        BLOCK_D=config.block_d, UNROLL=config.unroll, num_warps=config.num_warps,
    )  # fmt: skip


def aot_specs() -> list[AotSpec]:
    """Every shipped configuration as the tick uses it: bf16 tables, fp32 norm weights."""
    integers = dict.fromkeys((*SIZES, "D"), "i32")

    def spec(config: Config) -> AotSpec:
        return AotSpec(
            kernel=embed_tokens_kernel,
            config=config,
            signature={
                "kind_ptr": "*i32",
                "index_ptr": "*i32",
                "embed_ptr": "*bf16",
                "embed_norm_ptr": "*fp32",
                "table_ptr": "*bf16",
                "table_norm_ptr": "*fp32",
                "heard_ptr": "*u8",
                "x_ptr": "*bf16",
                "token_ptr": "*i64",
                "said_ptr": "*u8",
                "out_ptr": "*bf16",
                **integers,
                "eps": "fp32",
            },
            constexprs={
                "BANDS": 80,
                "NUM_LEVELS": 16,
                "BLOCK_D": config.block_d,
                "UNROLL": config.unroll,
            },
            num_warps=config.num_warps,
            aligned=("embed_ptr", "embed_norm_ptr", "table_ptr", "table_norm_ptr", "x_ptr",
                     "out_ptr", "D"),
            label=f"D{config.block_d}",
        )  # fmt: skip

    return [spec(config) for config in SHIPPED]
