"""The oracle of move_pages: page by page."""

# Dimension key: L layers, P pages of the source, N pages of the target, B elements of a page,
# I moves.

from __future__ import annotations

from torch import Tensor


def move_pages_ref(
    source_L_P_B: Tensor, target_L_N_B: Tensor, from_I: Tensor, to_I: Tensor
) -> Tensor:
    """The target afterwards, as a new tensor: target[l, to[i]] = source[l, from[i]], where both are
    not negative."""
    result_L_N_B = target_L_N_B.clone()
    for source_page, target_page in zip(from_I.tolist(), to_I.tolist(), strict=True):
        if source_page >= 0 and target_page >= 0:
            result_L_N_B[:, target_page] = source_L_P_B[:, source_page].to(result_L_N_B.device)
    return result_L_N_B
