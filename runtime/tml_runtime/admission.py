"""How many sessions there may be: as many as there are slots, as were seen to be in time, and as
have room for their keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import ResourceExhausted

HEADROOM = 0.9  # of the period: what a tick may take, so that more than the probe's luck fits


@dataclass(frozen=True)
class Probe:
    """Ticks of so many sessions that all heard silence, before the start."""

    rows: int
    ticks: int
    p999_ms: float  # by nearest rank: of fewer than a thousand ticks it is the longest
    fits: bool


@dataclass(frozen=True)
class Admission:
    """What bounds the number of sessions, and why. None: that does not bound it."""

    slots: int
    by_time: int | None = None
    by_pages: int | None = None
    table: tuple[Probe, ...] = ()

    @property
    def limit(self) -> int:
        return min(n for n in (self.slots, self.by_time, self.by_pages) if n is not None)

    def check(self, in_use: int, closing: int) -> None:
        """Raises ResourceExhausted, with figures, where one more than `in_use` is too many.

        Sessions that close with the next tick still have their slots, but take no time any more.
        """
        if in_use - closing < self.limit and in_use < self.slots:
            return
        wanted = in_use - closing + 1
        if in_use >= self.slots:
            reason, why = "slots", (
                f"all {self.slots} slots are taken, {closing} of them by sessions that close with "
                "the next tick: close a session, or build the Runtime with a larger num_slots"
            )  # fmt: skip
        elif self.by_pages is not None and self.by_pages < wanted:
            reason, why = "pages", (
                f"{wanted} sessions need more pages than there are: their budgets fit "
                f"{self.by_pages} times; give the Runtime more global_pages or a smaller budget"
            )  # fmt: skip
        else:
            reason, why = "time", (
                f"{wanted} sessions were not seen to be in time: {self._figures()}"
            )  # fmt: skip
        raise ResourceExhausted(
            why, in_use=in_use, closing=closing, capacity=self.limit, reason=reason
        )

    def report(self) -> dict[str, Any]:
        """Plain data for JSON."""
        table = [vars(probe) for probe in self.table]
        return {"limit": self.limit, **vars(self), "table": table}

    def _figures(self) -> str:
        return ", ".join(f"p99.9 of {p.rows}: {p.p999_ms:.1f} ms" for p in self.table)


def measure(
    tick_ms: Callable[[int], float], *, num_slots: int, num_ticks: int, period_ms: float
) -> tuple[int, tuple[Probe, ...]]:
    """(sessions that are in time, what was measured). `tick_ms(rows)` runs one tick of so many.

    Doubles the rows while they fit, then halves the gap. One session is always admitted: the table
    says how it fares.
    """
    table: list[Probe] = []

    def fits(rows: int) -> bool:
        taken = sorted(tick_ms(rows) for _ in range(num_ticks))
        p999_ms = taken[-(-999 * num_ticks // 1000) - 1]
        table.append(Probe(rows, num_ticks, p999_ms, p999_ms <= HEADROOM * period_ms))
        return table[-1].fits

    good, rows = 0, 1
    while fits(rows):
        good = rows
        if rows == num_slots:
            break
        rows = min(2 * rows, num_slots)
    bad = rows
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return max(good, 1), tuple(sorted(table, key=lambda probe: probe.rows))
