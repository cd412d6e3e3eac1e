"""Rotary angles to sixty digits and more, the oracle of phases in 64-bit fixed point."""

from __future__ import annotations

from decimal import Context, Decimal, localcontext

PI = "3.141592653589793238462643383279502884197169399375105820974944592307816406286209"


def exact_turns(theta: str, width: int, position: int) -> list[Decimal]:
    """The fraction of a turn of every frequency at a position."""
    with localcontext(Context(prec=80)):
        per_radian = position / (2 * Decimal(PI))
        log = Decimal(theta).ln()
        return [(per_radian * (-2 * b * log / width).exp()) % 1 for b in range(width // 2)]
