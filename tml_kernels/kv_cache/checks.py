"""Whether the device's tables say what the host's books say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from .._core import Session

if TYPE_CHECKING:
    from .cache import RollingKVCache


def check_device_tables(cache: RollingKVCache, sessions: Iterable[Session]) -> None:
    """Raises RuntimeError naming the first entry that differs. Waits for the device."""
    for session in sessions:
        for g in range(len(cache.groups)):
            _check_list(cache, session, g)


def _check_list(cache: RollingKVCache, session: Session, g: int) -> None:
    group, slot = cache.groups[g], session.slot
    expected = [] if cache.is_suspended(session) else cache.pages(session, g)
    has_positions = group.row_position_P_R is not None
    found = zip(
        group.page_N_M[slot].tolist(),
        group.base_N_M[slot].tolist(),
        group.rows_N_M[slot].tolist(),
        strict=True,
    )
    for m, (page, base, rows) in enumerate(found):
        ref = expected[m] if m < len(expected) else None
        if ref is None:
            wanted = (-1, 0, 0)
        else:
            wanted = (ref.page, ref.base, ref.used if has_positions else group.spec.page_rows)
        if (page, base, rows) != wanted:
            raise RuntimeError(
                f"group {g}, {slot=}, entry {m}: the device has (page, base, rows) = "
                f"{(page, base, rows)}, the host {wanted}"
            )
    if group.row_position_P_R is None or not expected:
        return
    pages = torch.tensor([ref.page for ref in expected], device=cache.device)
    on_device = group.row_position_P_R[pages].tolist()
    on_host = cache.positions(session, g)
    for m, (device_row, host_row) in enumerate(zip(on_device, on_host, strict=True)):
        if device_row[: len(host_row)] != host_row:
            raise RuntimeError(
                f"group {g}, {slot=}, entry {m}: the device has rows at positions "
                f"{device_row[: len(host_row)]}, the host at {host_row}"
            )
