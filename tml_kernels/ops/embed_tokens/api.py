"""embed_tokens: check, choose, launch."""

# Dimension key: T tokens, D model width, V rows of the text table, B bands, Y = B * levels rows of
# the dMel table, A frames heard, P embedded tokens, N rows of steps, F frames of a step.

from __future__ import annotations

import torch
from torch import Tensor

from ..._dims import Dims
from ..._numbers import check_count, check_eps
from ..._registry import refuse_grad, register_op
from ...precision import ACTIVATIONS
from .configs import MAX_WIDTH
from .kinds import TokenKind
from .reference import embed_tokens_ref


def _check_values(
    kind: Tensor, index: Tensor, rows_of: dict[TokenKind, int], levels: dict[TokenKind, Tensor],
    token: Tensor, num_tokens: int, num_levels: int,
) -> None:  # fmt: skip
    """ValueError for a value that a kernel would take as nothing. Synchronises."""
    if kind.numel() and not 0 <= int(kind.min()) <= int(kind.max()) <= max(TokenKind):
        raise ValueError(f"kind_T: expected 0..{max(TokenKind)}, got {kind.unique().tolist()}")
    for of_kind, num_rows in rows_of.items():
        named = index[kind == of_kind].long()
        if named.numel() == 0:
            continue
        if int(named.min()) < 0 or int(named.max()) >= num_rows:
            wrong = named[(named < 0) | (named >= num_rows)]
            raise ValueError(
                f"index_T: {int(wrong[0])} of kind {of_kind.name} is not in 0..{num_rows - 1}"
            )
        if of_kind in levels:
            highest = levels[of_kind][named]
            if highest.numel() and int(highest.max()) >= num_levels:
                raise ValueError(f"levels: {int(highest.max())} is not below {num_levels=}")
        if of_kind is TokenKind.STEP:
            said = token[named]
            if int(said.min()) < 0 or int(said.max()) >= num_tokens:
                raise ValueError(
                    f"token_N: {said.tolist()} of the steps are not all in 0..{num_tokens - 1}"
                )


def _plain(
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
    if kind.device.type == "cpu":  # elsewhere reading the values would synchronise
        rows_of = {
            TokenKind.TEXT: len(embed),
            TokenKind.LEVELS: len(heard),
            TokenKind.EMBEDDED: len(x),
            TokenKind.STEP: len(said),
        }
        levels = {TokenKind.LEVELS: heard, TokenKind.STEP: said}
        _check_values(kind, index, rows_of, levels, token, len(embed), num_levels)
    out.copy_(
        embed_tokens_ref(
            kind,
            index,
            embed,
            embed_norm,
            table,
            table_norm,
            levels_A_B=heard,
            x_P_D=x,
            token_N=token,
            levels_N_F_B=said,
            num_levels=num_levels,
            eps=eps,
            dtype=torch.float32,
            rounded=out.dtype,
        )
    )


def _kernel(*args) -> None:
    from .kernel import launch_embed_tokens

    launch_embed_tokens(*args)


_op = register_op(
    "embed_tokens(Tensor kind, Tensor index, Tensor embed, Tensor embed_norm, Tensor table, "
    "Tensor table_norm, Tensor heard, Tensor x, Tensor token, Tensor said, int num_levels, "
    "float eps, Tensor(a!) out) -> ()",
    plain=_plain,
    kernel=_kernel,
)


def embed_tokens(
    kind_T: Tensor,
    index_T: Tensor,
    embed_V_D: Tensor,
    embed_norm_D: Tensor,
    table_Y_D: Tensor,
    table_norm_D: Tensor,
    *,
    levels_A_B: Tensor | None = None,
    x_P_D: Tensor | None = None,
    token_N: Tensor | None = None,
    levels_N_F_B: Tensor | None = None,
    num_levels: int = 16,
    eps: float = 1e-6,
    out_T_D: Tensor | None = None,
) -> Tensor:
    """[T, D]: each token's row from the source that its kind names, in one launch.

    TEXT i: RMSNorm of embed[i]. LEVELS i: RMSNorm of the sum over bands b of
    table[b * num_levels + levels_A_B[i, b]]. EMBEDDED i: x_P_D[i] as it is. STEP i: the text row of
    token_N[i] plus the sound rows of levels_N_F_B[i, 0], [i, 1], ... NOTHING: zeros. For instance
    two sessions that hear one frame each, the first of which also reads token 7:
    kind 1 2 4 2 4, index 7 0 s0 1 s1, where s0 and s1 are their rows of steps.

    Norms and sums over bands (in their order) in float32. Rounded to the tables' dtype: each text
    row, each sound row, and each of a step's additions, text first, frames in order; so a step has
    the bits of its parts made by themselves and added one by one, in float32 on a GPU up to one
    contracted multiply-add. Deterministic, row t depends on token t alone. Allocates only when
    `out_T_D` is None, and nothing is read of a source row that no token names.

    kind, index: int32 [T]; token: int32 or int64; levels: uint8; tables, x and out of one dtype,
    float32, bfloat16 or float16, D <= 8192; norm weights float32 or that dtype. A source that is
    not given has no rows. Values are checked on the CPU only: a GPU takes a row outside its table
    as zeros, and a level that is too high as the highest. Raises TypeError or ValueError naming the
    argument.
    """
    dims = Dims()
    dims.check(kind_T=kind_T, dtype=torch.int32)
    check_eps(eps)
    device = kind_T.device
    dims.check(index_T=index_T, dtype=torch.int32, device=device)
    dims = _check_tables(dims, embed_V_D, embed_norm_D, table_Y_D, table_norm_D, num_levels, device)
    if (token_N is None) != (levels_N_F_B is None):
        raise ValueError("token_N, levels_N_F_B: a step has both or neither")
    if levels_A_B is None:
        levels_A_B = table_Y_D.new_empty(0, dims["B"], dtype=torch.uint8)
    if x_P_D is None:
        x_P_D = embed_V_D[:0]
    if token_N is None or levels_N_F_B is None:
        token_N, levels_N_F_B = index_T[:0], levels_A_B[:0].unsqueeze(1)
    dims.check(levels_A_B=levels_A_B, dtype=torch.uint8, device=device)
    dims.check(x_P_D=x_P_D, dtype=embed_V_D.dtype, device=device)
    dims.check(token_N=token_N, dtype=(torch.int32, torch.int64), device=device)
    dims.check(levels_N_F_B=levels_N_F_B, dtype=torch.uint8, device=device)
    if out_T_D is None:
        out_T_D = embed_V_D.new_empty(dims["T"], dims["D"])
    else:
        dims.check(out_T_D=out_T_D, dtype=embed_V_D.dtype, device=device)
    refuse_grad(embed_V_D, embed_norm_D, table_Y_D, table_norm_D, x_P_D)
    if dims["T"] > 0:
        _op(
            kind_T, index_T, embed_V_D, embed_norm_D, table_Y_D, table_norm_D, levels_A_B, x_P_D,
            token_N, levels_N_F_B, num_levels, eps, out_T_D,
        )  # fmt: skip
    return out_T_D


def _check_tables(
    dims: Dims,
    embed_V_D: Tensor,
    embed_norm_D: Tensor,
    table_Y_D: Tensor,
    table_norm_D: Tensor,
    num_levels: int,
    device: torch.device,
) -> Dims:
    """The axes with B, which follows from the table's rows."""
    dims.check(embed_V_D=embed_V_D, dtype=ACTIVATIONS, device=device)
    dims.check(table_Y_D=table_Y_D, dtype=embed_V_D.dtype, device=device)
    norms = (torch.float32, embed_V_D.dtype)
    dims.check(embed_norm_D=embed_norm_D, table_norm_D=table_norm_D, dtype=norms, device=device)
    if not 0 < dims["D"] <= MAX_WIDTH:
        raise ValueError(f"embed_V_D: D={dims['D']} is not in 1..{MAX_WIDTH}")
    check_count("num_levels", num_levels)
    if dims["Y"] == 0 or dims["Y"] % num_levels:
        raise ValueError(f"table_Y_D: {dims['Y']} rows are not bands of {num_levels=} each")
    return Dims(**dims, B=dims["Y"] // num_levels)
