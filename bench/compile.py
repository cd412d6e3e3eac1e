"""`python -m bench compile`: every Triton kernel x shipped configuration, without a GPU.

Compiles for sm_90, and one configuration of each kernel for sm_80 and sm_100 (--quick: of sm_90
too; --full: all); reads registers, local and shared memory, the matrix instructions and the main
loops' instructions per weight from the cubins, and compares them with bench/kernel_table.json. A
row is cached under .cache/ by a digest of all that decides it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .aot import Job, compile_job, jobs_of
from .paths import CACHE, TABLE, op_names
from .report import write_json
from .table import Row, Table, compare

ARCHS = (80, 90, 100)
MAIN_ARCH = 90


@dataclass
class Outcome:
    """Rows by key, errors by key or op, and how many rows came from the cache."""

    rows: dict[str, Row] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    cached: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    how_many = parser.add_mutually_exclusive_group()
    how_many.add_argument("--full", action="store_true", help="all configurations for all chips")
    how_many.add_argument(
        "--quick", action="store_true", help="one configuration of each kernel for all chips"
    )
    parser.add_argument("--arch", help="only these, for instance 80,90", type=_archs)
    parser.add_argument("--op", action="append", help="only this op (may be repeated)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help="processes (default: all cores)")
    how_many.add_argument("--update", action="store_true", help="--full, and write the table")
    table = "default: bench/kernel_table.json"
    parser.add_argument("--table", type=Path, default=TABLE, help=table)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and findings")


def _archs(text: str) -> tuple[int, ...]:
    archs = tuple(int(part) for part in text.split(","))
    unknown = sorted(set(archs) - set(ARCHS))
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown} is not among {ARCHS}")
    return archs


def main(args: argparse.Namespace) -> int:
    unknown = sorted(set(args.op or []) - set(op_names(with_kernel=True)))
    if unknown:
        raise SystemExit(f"no kernel.py: {unknown}; ops with one: {op_names(with_kernel=True)}")
    os.environ.pop("TRITON_INTERPRET", None)  # of this process and its workers
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))
    started = time.monotonic()
    jobs, outcome = discover(args.op or op_names(with_kernel=True))
    chosen = select(jobs, full=args.full or args.update, quick=args.quick, archs=args.arch)
    run(chosen, outcome, max(1, args.jobs))

    table = Table.load(args.table)
    if args.update:
        update(table, jobs, outcome, args.op)
        table.save(args.table)
    existing = existing_keys(table, jobs, outcome, args.op)
    limits = {job.key: job.limit for job in jobs if job.limit is not None}
    found = compare(outcome.rows, table, existing=existing, limits=limits)
    failures = [f"{key}: {text}" for key, text in outcome.errors.items()] + found.failures
    if not chosen:
        failures.append("nothing was compiled")
    _print(failures, found.changes, table)
    seconds = time.monotonic() - started
    print(
        f"{len(outcome.rows)} kernels compiled ({outcome.cached} from the cache), "
        f"{len(failures)} failures, {len(found.changes)} changes, {seconds:.1f} s"
    )
    if args.json:
        rows = {key: asdict(row) for key, row in sorted(outcome.rows.items())}
        summary = {"checked": len(chosen), "failures": failures, "changes": found.changes}
        write_json(args.json, summary | {"seconds": seconds, "rows": rows})
    return 1 if failures else 0


def discover(ops: Sequence[str]) -> tuple[list[Job], Outcome]:
    """Every kernel x configuration x architecture; an op that cannot list its specs is an error."""
    jobs: list[Job] = []
    outcome = Outcome()
    for op in ops:
        try:
            jobs += [job for arch in ARCHS for job in jobs_of(op, arch)]
        except Exception:
            outcome.errors[op] = "cannot list its specs\n" + traceback.format_exc()
    return jobs, outcome


def select(
    jobs: list[Job],
    *,
    full: bool = False,
    quick: bool = False,
    archs: tuple[int, ...] | None = None,
) -> list[Job]:
    """All of sm_90, or with `quick` and of the others the last configuration of each kernel, the
    widest by custom. Of `archs` alone, where they are given: all, but for `quick`."""
    last = {_kernel_of(job): job for job in jobs}
    whole = set() if quick else set(archs or (ARCHS if full else (MAIN_ARCH,)))
    return [
        job
        for job in jobs
        if (archs is None or job.arch in archs)
        and (job.arch in whole or last[_kernel_of(job)] is job)
    ]


def _kernel_of(job: Job) -> tuple[str, int]:
    op, kernel, *_ = job.key.split("/")
    return f"{op}/{kernel}", job.arch


def existing_keys(
    table: Table, jobs: list[Job], outcome: Outcome, ops: Sequence[str] | None
) -> set[str]:
    """Keys of the tree's kernels; those of the table for an op that was not, or could not be,
    asked. ops: those that were asked; None: all."""
    broken = {key for key in outcome.errors if "/" not in key}
    unknown = {
        key
        for key in table.kernels
        if (op := key.split("/")[0]) in broken or (ops is not None and op not in ops)
    }
    return unknown | {job.key for job in jobs}


def update(table: Table, jobs: list[Job], outcome: Outcome, ops: Sequence[str] | None) -> None:
    """Take the new rows, drop those of kernels that are gone; allowances are left alone."""
    import triton

    existing = existing_keys(table, jobs, outcome, ops)
    table.kernels = {k: r for k, r in table.kernels.items() if k in existing} | outcome.rows
    table.triton = triton.__version__


def run(jobs: list[Job], outcome: Outcome, num_workers: int) -> None:
    """Fill `outcome` with a row or an error for each job, from the cache where it is known."""
    fresh = []
    for job in jobs:
        row = _read_cache(job)
        if row is None:
            fresh.append(job)
        else:
            outcome.rows[job.key] = row
            outcome.cached += 1
    started = time.monotonic()
    for done, (job, result) in enumerate(_results(fresh, num_workers), start=1):
        progress = f"[{done}/{len(fresh)} {time.monotonic() - started:5.1f} s] {job.key}"
        if "error" in result:
            outcome.errors[job.key] = result["error"]
            print(f"{progress}: FAILED", flush=True)
            continue
        row = outcome.rows[job.key] = Row(**result["row"])
        _write_cache(job, result["row"])
        print(
            f"{progress}: {row.registers} registers, {row.spilled} B local, "
            f"{row.shared_static + row.shared_dynamic} B shared {row.mma}"
            + ("" if row.loop is None else f", {row.loop} instructions per weight"),
            flush=True,
        )


def _results(jobs: list[Job], num_workers: int) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Results in the order they come. A compiler that dies takes the pool along, and every job
    still open with it: those run again, one to a pool, so that only the guilty one fails."""
    unfinished = list(jobs)
    if len(jobs) > 0:
        for job, result in _pooled(jobs, min(num_workers, len(jobs))):
            if result is not None:
                unfinished.remove(job)
                yield job, result
    for job in unfinished:
        for _, result in _pooled([job], 1):
            yield job, result or {"error": "the compiling process died (no Python error)"}


def _pooled(jobs: list[Job], num_workers: int) -> Iterator[tuple[Job, dict[str, Any] | None]]:
    """None for a job whose pool broke."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        futures: dict[Future, Job] = {pool.submit(compile_job, job): job for job in jobs}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                yield futures[future], None


def _cache_file(job: Job) -> Path:
    return CACHE / "aot" / f"{job.digest}.json"


def _read_cache(job: Job) -> Row | None:
    try:
        return Row(**json.loads(_cache_file(job).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write_cache(job: Job, row: dict[str, Any]) -> None:
    """Best effort: a read-only checkout compiles every time."""
    path = _cache_file(job)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row))
    except OSError:
        return


def _print(failures: list[str], changes: list[str], table: Table) -> None:
    import triton

    if table.triton and table.triton != triton.__version__:
        print(f"triton is {triton.__version__}, the table was made with {table.triton}")
    for change in changes:
        print(f"changed: {change}")
    for failure in failures:
        print(f"FAILED: {failure.rstrip()}")
