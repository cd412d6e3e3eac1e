"""`python -m bench tick`: the runtime's own tick with a random model: a histogram and the misses.

In real time by default; --ticks runs that many on the virtual clock, as fast as they go, and says
nothing about deadlines. Every session hears noise in every tick, and with --video sees it. On a GPU
ticks are CUDA graphs, captured before the first one; TML_EAGER=1 runs the same shapes op by op.
--disturb runs one thread of busy Python and a full garbage collection every second beside it,
--beside a background model's products on the same GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import arguments, kernels, models
from .beside import KINDS, GpuLoad
from .disturb import Disturbance
from .machine import clocks, describe, machine
from .report import write_json

if TYPE_CHECKING:
    from tml_runtime import Runtime

    from .feed import Feed

BAR = 50  # characters of the longest bar
FRAME = (320, 240)  # 48 patches of 40 pixels
EXAMPLES = """\
examples:
  python -m bench tick --sessions 4 --seconds 60
  python -m bench tick --ticks 300 --experts int4 --rest fp8        no deadlines: a virtual clock
  python -m bench tick --sessions 4 --seconds 600 --disturb         beside busy Python
  python -m bench tick --sessions 8 --beside low                    beside products on the same GPU
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_arguments(parser)
    parser.add_argument("--sessions", type=arguments.count, default=1)
    parser.add_argument("--seconds", type=float, default=30.0, help="of real time")
    parser.add_argument("--ticks", type=int, help="on the virtual clock instead")
    parser.add_argument("--video", action="store_true", help="two frames per tick and session")
    parser.add_argument(
        "--disturb", action="store_true", help="busy Python and garbage collections beside the loop"
    )
    parser.add_argument(
        "--beside",
        choices=KINDS,
        metavar="STREAM",
        help="products without end on the same GPU: on a stream of the ticks' priority (equal), of "
        "a lower one (low), or of a green context with a few multiprocessors (green)",
    )
    parser.add_argument(
        "--drafts",
        action="store_true",
        help="draft output steps, with random layers: what wrong drafts cost",
    )
    parser.add_argument(
        "--kernels",
        type=int,
        default=0,
        metavar="N",
        help="profile N more ticks: which kernels a tick's time on the GPU goes to",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")


def main(args: argparse.Namespace) -> int:
    result = run(args)
    if args.json:
        write_json(args.json, result)
    print(show(result))
    return 0 if result["ticks"] > 0 else 1


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    from tml_runtime import Runtime

    from .feed import Feed, Media

    _check(args)
    model, about = models.make_model(args)
    realtime = args.ticks is None
    frame = FRAME if args.video else None
    memory = models.memory_options(args, model.config, [] if frame is None else [frame])
    memory["drafts"] = args.drafts
    runtime = Runtime(model, num_slots=args.sessions, seed=args.seed, realtime=realtime, **memory)
    layout = runtime.layout
    media = Media(layout, seed=args.seed, frame=frame)
    said = None if realtime else hashlib.sha256()
    with runtime:
        feeds = [Feed(runtime.open_session(), media, layout) for _ in range(args.sessions)]
        with (
            Disturbance() if args.disturb else nullcontext() as disturbance,
            GpuLoad(args.beside) if args.beside else nullcontext() as beside,
        ):
            if said is None:
                _run_realtime(feeds, args.seconds)
            else:
                _run_virtual(runtime, feeds, args.ticks, said)
        report, records = runtime.report(), runtime.metrics.records()
        found = _profile(runtime, feeds, args.kernels) if args.kernels else None
    tick_ns = records["woke_ns"] - records["scheduled_ns"] + records["busy_ns"]
    return {
        "kind": "tick",
        **about,
        "sessions": args.sessions,
        "realtime": realtime,
        "disturbance": None if disturbance is None else disturbance.report(),
        "beside": None if beside is None else beside.report(),
        "said_sha256": None if said is None else said.hexdigest(),
        "video": args.video,
        "machine": machine(),
        "clocks": clocks(),
        **report,
        **device_figures(dict(zip(runtime.metrics.stages, records["stage_ns"].T, strict=False))),
        "histogram": histogram((tick_ns / 1e6).tolist()),
        "kernels": found,
    }


def _check(args: argparse.Namespace) -> None:
    """SystemExit for what does not go together, before a model is made."""
    if args.kernels and args.ticks is not None:
        raise SystemExit("--kernels goes without --ticks: it profiles ticks of real time")
    if models.device_of(args) != "cuda":
        if args.beside:
            raise SystemExit("--beside needs a GPU: it runs products beside the ticks there")
        if args.kernels:
            raise SystemExit("--kernels needs a GPU: it profiles what runs there")


def device_figures(stage_ns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Of ticks that a GPU replayed as graphs, each null where none was. host_ms: to stage a tick.
    launch_gap_ms: from the launch to the first kernel. gpu_ms: from there to the last one's end.
    gpu_idle_share: of the time from the launch on, what lies before the first kernel."""
    from tml_runtime.metrics import percentiles_ms

    names = {"host_ms": "stage", "launch_gap_ms": "launch_gap", "gpu_ms": "gpu"}
    gpu_ns = stage_ns.get("model.gpu", np.zeros(0, np.int64))
    ran = gpu_ns > 0
    if not ran.any():
        return dict.fromkeys([*names, "gpu_idle_share"])
    gap_ns = stage_ns["model.launch_gap"][ran].sum()
    figures = {name: percentiles_ms(stage_ns[f"model.{of}"][ran]) for name, of in names.items()}
    return {**figures, "gpu_idle_share": float(gap_ns / (gap_ns + gpu_ns[ran].sum()))}


def _profile(runtime: Runtime, feeds: Sequence[Feed], num_ticks: int) -> dict[str, Any]:
    with kernels.profiled() as spans:
        _run_realtime(feeds, (num_ticks + 2) * runtime.layout.period_ms / 1000)
    return kernels.summary(spans)


def _run_virtual(
    runtime: Runtime, feeds: Sequence[Feed], num_ticks: int, said: hashlib._Hash
) -> None:
    """said: takes all that the sessions say, in order."""
    from tml_runtime.session import SpeechOut

    for _ in range(num_ticks):
        for feed in feeds:
            feed.push_until(feed.session.media_time, 1)
        runtime.run_ticks(1)
        for feed in feeds:
            for out in feed.session.poll():
                said.update(out.pcm.data if isinstance(out, SpeechOut) else repr(out).encode())


def _run_realtime(feeds: Sequence[Feed], seconds: float) -> None:
    from .feed import LEAD

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for feed in feeds:
            feed.push_until(feed.session.media_time, LEAD)
            feed.session.poll()
        time.sleep(0.02)


def histogram(values_ms: Sequence[float]) -> list[tuple[float, float, int]]:
    """(from, to, count) of bins side by side, three to a factor of two; the first and the last
    hold something."""
    if not values_ms:
        return []
    edge = 2 ** (1 / 3)
    low = math.floor(math.log(max(min(values_ms), 1e-3), edge))
    high = math.floor(math.log(max(max(values_ms), 1e-3), edge))
    counts = [0] * (high - low + 1)
    for value in values_ms:
        at = math.floor(math.log(max(value, 1e-3), edge)) - low
        counts[min(max(at, 0), len(counts) - 1)] += 1
    return [(edge ** (low + i), edge ** (low + i + 1), n) for i, n in enumerate(counts)]


def show(result: dict[str, Any]) -> str:
    lines = [
        describe(result["machine"], result["clocks"]),
        f"{models.describe_model(result)}, {result['sessions']} sessions, "
        f"{result['mode']}, period {result['period_ms']} ms",
    ]
    bins = [one for one in result["histogram"] if one[2] > 0]
    most = max((count for *_, count in bins), default=0)
    for low, high, count in bins:
        bar = "#" * math.ceil(BAR * count / most)
        lines.append(f"{low:9.3f} .. {high:9.3f} ms {count:6d} {bar}")
    if result["ticks"] == 0:
        return "\n".join([*lines, "no tick ran"])
    tick = result["tick_ms"]
    kept = result["records"]
    newest = f"of the newest {kept} " if kept < result["ticks"] else ""
    lines.append(
        f"{result['ticks']} ticks, {result['misses']} missed: {newest}p50 {tick['p50']:.3f}, "
        f"p99 {tick['p99']:.3f}, p99.9 {tick['p999']:.3f}, max {tick['max']:.3f} ms"
    )
    if result["disturbance"] is not None:
        lines.append(_show_disturbance(result))
    if result["beside"] is not None:
        lines.append("  beside {products} products on a stream: {kind}".format(**result["beside"]))
    if result["said_sha256"] is not None:
        lines.append(f"  all that was said: sha256 {result['said_sha256']}")
    for name, stage in result["stages_ms"].items():
        if stage["p50"] is not None:
            lines.append(f"  {name:16s} p50 {stage['p50']:.3f}  max {stage['max']:.3f} ms")
    if result["graphs"] is not None:
        graphs = result["graphs"]
        lines.append(
            f"  {graphs['captured']} graphs of {graphs['buckets']} buckets ({graphs['mode']}), "
            f"{graphs['bytes'] / 1e6:.0f} MB"
        )
    if result["gpu_ms"] is not None:
        lines.append(
            f"  a tick's GPU p50 {result['gpu_ms']['p50']:.3f} ms, launch gap p50 "
            f"{result['launch_gap_ms']['p50']:.3f}, host p50 {result['host_ms']['p50']:.3f}; the "
            f"GPU idles for {result['gpu_idle_share']:.2%} of it"
        )
    if result["drafts"]:
        lines.append(
            f"  {result['drafts_kept']} of {result['drafts']} drafted steps kept, "
            f"{result['passes'] / result['ticks']:.2f} passes a tick"
        )
    if result["kernels"] is not None:
        lines.append(kernels.show(result["kernels"]))
    held, dropped = result["kv_pages"], result["kv_pages_dropped"]
    counts = ", ".join(f"{name} {held[name]} (-{dropped[name]})" for name in held)
    lines.append(f"  pages held in global layers, and dropped: {counts}")
    return "\n".join(lines)


def _show_disturbance(result: dict[str, Any]) -> str:
    wake, beside = result["wake_ms"], result["disturbance"]
    reasons = ", ".join(f"{name} {n}" for name, n in result["misses_by_reason"].items() if n)
    return (
        f"  beside {beside['collections']} full collections of {beside['heap']} containers and "
        f"{beside['spins']} spins:\n  woke late by p50 {wake['p50']:.3f}, p99.9 "
        f"{wake['p999']:.3f}, max {wake['max']:.3f} ms; misses: {reasons or 'none'}"
    )
