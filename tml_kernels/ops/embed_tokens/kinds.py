"""Where a token's row comes from."""

from __future__ import annotations

from enum import IntEnum


class TokenKind(IntEnum):
    """What `kind_T` holds, and which row of what `index_T` then is."""

    NOTHING = 0  # zeros; no index
    TEXT = 1  # row of the text table: a token id
    LEVELS = 2  # row of levels_A_B: one frame of sound heard
    EMBEDDED = 3  # row of x_P_D: a token that is already embedded
    STEP = 4  # row of token_N and levels_N_F_B: an output step, what was said in both its forms
