"""The demo: recordings go in as live media; speech, text and four files come out."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from .._optional import require
from ..errors import LoopFailed
from ..loop import Runtime
from ..model import InteractionModel
from .client import Client
from .decode import SAMPLE_RATE
from .live import make_view
from .prepare import Loaded, Options, load_media, make_model, make_runtime
from .report import build_report, kv_report, note_on, summary_lines, write_report
from .source import Feeder, LiveSource
from .timeline import Timeline, draw_timeline
from .trace import write_trace

# Session s starts this much later into the recordings than session s - 1, so that they differ.
SESSION_STEP_S = 5.0
REPORTED_OPTIONS = ("preset", "seed", "sessions", "seconds")
FILES = ("report.json", "trace.json", "timeline.png", "speech.wav")

Progress = Callable[[float], None]  # called with the media time so far, in seconds


def run_demo(options: Options, stream: TextIO | None = None) -> dict[str, Any]:
    """Run, show progress on `stream` (default: stdout), write FILES; returns the report.

    Ctrl-C, or a tick that raises, ends the run early: what was made until then is written, and the
    report says so. Raises DemoError, MediaError, MissingExtraError, OSError, and after such a tick,
    with everything written, LoopFailed.
    """
    out = sys.stdout if stream is None else stream
    for module in ("av", "soundfile", "matplotlib", "rich"):
        require(module, "run the demo")

    def say(text: str) -> None:
        print(text, file=out, flush=True)

    model = make_model(options)
    loaded = load_media(options, model.config.layout, say)
    options.out.mkdir(parents=True, exist_ok=True)
    runtime = make_runtime(options, model)
    clients = [_open_client(runtime, loaded, number) for number in range(options.sessions)]
    num_ticks = math.ceil(options.seconds * 1000 / runtime.layout.period_ms)
    total_s = num_ticks * runtime.layout.period_ms / 1000
    title = _title(options, model)
    view = make_view(title, note_on(model), runtime, clients, total_s, out)
    failed: LoopFailed | None = None
    with view:
        play = play_realtime if options.realtime else play_fast
        try:
            interrupted = not play(runtime, clients, num_ticks, view.update)
        except LoopFailed as error:
            interrupted, failed = True, error
    report = _write_files(options, model, runtime, loaded, clients, title, interrupted)
    told = runtime.report()
    for line in summary_lines(report, told):
        say(line)
    if loaded.scene is not None:
        share = loaded.scene.in_time(clients[0].answers.texts, told["ticks"] + told["skipped"])
        say(f"said {share.hits} of {share.total} words in the very tick in which they were due")
    say(f"wrote {', '.join(FILES)} in {options.out}")
    if failed is not None:
        raise failed
    return report


def play_realtime(
    runtime: Runtime, clients: Sequence[Client], num_ticks: int, progress: Progress
) -> bool:
    """Feed and poll until `num_ticks` are over; stops the runtime. False when interrupted.

    Raises LoopFailed when a tick raised; what was said before has been polled.
    """
    period_ms = runtime.layout.period_ms
    end_ns = round((num_ticks + 0.5) * period_ms * 1e6)  # tick n runs at (n + 1) * period
    feeder = Feeder([(client.source, client.session) for client in clients])
    try:
        runtime.start()
        feeder.start()
        while (media_ns := runtime.media_ns()) < end_ns:
            progress(min(media_ns / 1e9, num_ticks * period_ms / 1000))
            time.sleep(min(0.05, period_ms / 4000))
            runtime.check_alive()
            if feeder.error is not None:
                raise feeder.error
            for client in clients:
                client.poll()
        return True
    except KeyboardInterrupt:
        return False
    finally:
        feeder.stop()
        try:
            runtime.stop()  # waits for the tick that is running
        finally:
            for client in clients:
                client.poll()


def play_fast(
    runtime: Runtime, clients: Sequence[Client], num_ticks: int, progress: Progress
) -> bool:
    """Feed, tick and poll in lockstep on the virtual clock. False when interrupted. Raises
    LoopFailed when a tick raised."""
    period_ms = runtime.layout.period_ms
    try:
        for tick in range(num_ticks):
            for client in clients:
                client.source.deliver((tick + 1) * period_ms * 1_000_000)
            runtime.run_ticks(1)
            for client in clients:
                client.poll()
            progress((tick + 1) * period_ms / 1000)
        return True
    except KeyboardInterrupt:
        return False
    finally:
        runtime.stop()


def _open_client(runtime: Runtime, loaded: Loaded, number: int) -> Client:
    session = runtime.open_session(temperature=loaded.temperature)
    start_s = loaded.start_s + SESSION_STEP_S * number
    return Client(session, LiveSource(loaded.media, session, start_s=start_s))


def _title(options: Options, model: InteractionModel) -> str:
    period_ms = model.config.layout.period_ms
    sessions = "1 session" if options.sessions == 1 else f"{options.sessions} sessions"
    clock = "real time" if options.realtime else "virtual clock"
    return f"{options.preset} on {model.device.type}, {sessions}, {period_ms} ms ticks, {clock}"


def _write_files(
    options: Options,
    model: InteractionModel,
    runtime: Runtime,
    loaded: Loaded,
    clients: Sequence[Client],
    title: str,
    interrupted: bool,
) -> dict[str, Any]:
    """Returns the report, which is the first of FILES."""
    period_ms, told = runtime.layout.period_ms, runtime.report()
    heard_s = (told["ticks"] + told["skipped"]) * period_ms / 1000
    speech_s = heard_s + period_ms / 1000  # the last tick speaks for the period after it
    report = build_report(
        options={name: getattr(options, name) for name in REPORTED_OPTIONS},
        model=model,
        runtime_report=told,
        clients=clients,
        media=loaded.about,
        kv=kv_report(options, model.config, told),
        speech_s=speech_s,
        interrupted=interrupted,
    )
    write_report(options.out / FILES[0], report)
    records, stages = runtime.metrics.records(), runtime.metrics.stages
    write_trace(
        options.out / FILES[1],
        records=records,
        stages=stages,
        samples=runtime.gpu_samples,
        clients=clients,
        period_ns=period_ms * 1_000_000,
        virtual=not options.realtime,
        about={"run": title, "weights": report["weights"]},
    )
    first = clients[0]
    timeline = Timeline(
        title=title,
        note=report["note"],
        seconds=speech_s,
        period_ms=period_ms,
        heard=loaded.media.heard(first.source.start_s, heard_s),
        clip=loaded.media.clip,
        clip_start_s=first.source.start_s,
        spoken=first.answers.pcm(speech_s),
        answers=first.answers,
        records=records,
        stages=stages,
        has_times=options.realtime,
    )
    draw_timeline(options.out / FILES[2], timeline)
    soundfile = require("soundfile", "write speech.wav")
    soundfile.write(options.out / FILES[3], timeline.spoken, SAMPLE_RATE, subtype="PCM_16")
    return report
