"""The table of compiled kernels, bench/kernel_table.json, and what in it fails the check.

    {"triton": "3.6.0",
     "kernels": {"rms_norm/rms_norm_kernel/block_d=128,num_warps=1/sm_90": {"registers": 24, ...}},
     "allowed": {"linear/*/sm_80": {"bytes": 64, "reason": "accumulators of the widest tile"}}}

`kernels` is written by `python -m bench compile --update`; `allowed` is written by hand and kept.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from tml_kernels._device import max_shared


@dataclass(frozen=True)
class Row:
    """What one cubin needs, from its resource report and its machine code.

    stack, local, shared_static, shared_dynamic: bytes (stack and local per thread). spill_loads,
    spill_stores: local memory instructions in the code. mma: the matrix instructions it has, of
    HMMA (sm_80), HGMMA (sm_90), UTCMMA (sm_100), IMMA, QGMMA, joined by "+". loop: instructions per
    weight of the heaviest loop with matrix instructions; None where they are not counted.
    """

    registers: int
    stack: int
    local: int
    shared_static: int
    shared_dynamic: int
    spill_loads: int
    spill_stores: int
    mma: str
    loop: float | None = None

    @property
    def spilled(self) -> int:
        """Bytes of local memory a thread has, for spilled registers or indexed arrays."""
        return self.stack + self.local


@dataclass(frozen=True)
class Limit:
    """What a kernel asks of its row on sm_90: its matrix instructions, and the largest `loop`."""

    mma: str | None = None
    max_loop: float | None = None


@dataclass(frozen=True)
class Allowance:
    bytes: int
    reason: str


@dataclass
class Table:
    triton: str = ""
    kernels: dict[str, Row] = field(default_factory=dict)
    allowed: dict[str, Allowance] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Table:
        """An empty table where there is no file. ValueError for a row without its fields."""
        if not path.exists():
            return cls()
        raw = json.loads(path.read_text())
        try:
            return cls(
                triton=raw["triton"],
                kernels={key: Row(**row) for key, row in raw["kernels"].items()},
                allowed={key: Allowance(**row) for key, row in raw.get("allowed", {}).items()},
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a kernel table: {error}") from error

    def save(self, path: Path) -> None:
        """One line per kernel, sorted, so that a change is one line of a diff."""
        rows = [f"    {json.dumps(k)}: {json.dumps(asdict(v))}" for k, v in _sorted(self.kernels)]
        allowed = [
            f"    {json.dumps(k)}: {json.dumps(asdict(v))}" for k, v in _sorted(self.allowed)
        ]
        path.write_text(
            f'{{\n  "triton": {json.dumps(self.triton)},\n'
            f'  "kernels": {_block(rows)},\n  "allowed": {_block(allowed)}\n}}\n'
        )

    def allowance(self, key: str) -> int:
        """Most bytes of stack and local memory `key` may have; the widest pattern that fits it."""
        fitting = [a.bytes for p, a in self.allowed.items() if fnmatch.fnmatchcase(key, p)]
        return max(fitting, default=0)


def _sorted(mapping: Mapping) -> list[tuple]:
    return sorted(mapping.items())


def _block(lines: list[str]) -> str:
    return "{\n" + ",\n".join(lines) + "\n  }" if lines else "{}"


@dataclass
class Findings:
    """failures: what the check fails on; changes: what a reader should see and may accept."""

    failures: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)


def compare(
    rows: Mapping[str, Row],
    table: Table,
    *,
    existing: Iterable[str],
    limits: Mapping[str, Limit] | None = None,
) -> Findings:
    """Compare freshly compiled rows with the table and with their limits, by key.

    existing: the key of every kernel x configuration x architecture of the tree, compiled in this
    run or not: a row of the table outside it is stale.
    """
    limits = limits or {}
    found = Findings()
    for pattern, allowance in _sorted(table.allowed):
        if not allowance.reason.strip():
            found.failures.append(f"allowed[{pattern!r}] gives no reason")
    for key, row in _sorted(rows):
        found.failures += _row_failures(key, row, table)
        found.failures += _limit_failures(key, row, limits.get(key, Limit()))
        before = table.kernels.get(key)
        if before is None:
            found.failures.append(
                f"{key}: not in the table; run `python -m bench compile --update`"
            )
            continue
        found.changes += [
            f"{key}: {name} {getattr(before, name)!r} -> {getattr(row, name)!r}"
            for name in (f.name for f in fields(Row))
            if getattr(before, name) != getattr(row, name)
        ]
    for key in sorted(set(table.kernels) - set(existing)):
        found.failures.append(
            f"{key}: in the table, but there is no such kernel; run with --update"
        )
    return found


def _row_failures(key: str, row: Row, table: Table) -> list[str]:
    failures = []
    allowed = table.allowance(key)
    if row.spilled > allowed:
        failures.append(
            f"{key}: {row.spilled} bytes of local memory a thread (stack {row.stack}, local "
            f"{row.local}; {row.spill_loads} loads, {row.spill_stores} stores), allowed {allowed}"
        )
    limit = max_shared(arch_of(key))
    if row.shared_dynamic > limit:
        failures.append(f"{key}: {row.shared_dynamic} bytes of shared memory, the chip has {limit}")
    before = table.kernels.get(key)
    if before is not None and before.mma and not row.mma:
        failures.append(f"{key}: had {before.mma} instructions and has no matrix instruction now")
    return failures


def _limit_failures(key: str, row: Row, limit: Limit) -> list[str]:
    if arch_of(key) != 90:
        return []
    failures = []
    if limit.mma is not None and row.mma != limit.mma:
        failures.append(f"{key}: matrix instructions are {row.mma or 'none'}, not {limit.mma}")
    if limit.max_loop is not None and (row.loop is None or row.loop > limit.max_loop):
        failures.append(f"{key}: {row.loop} instructions per weight, at most {limit.max_loop}")
    return failures


def arch_of(key: str) -> int:
    """80 of ".../sm_80"."""
    return int(key.rsplit("/sm_", 1)[1])
