"""tml-runtime serve: arguments, and a process that ends as its supervisor expects."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _env
from .._optional import require
from ..errors import CaptureError, InputValueError
from ..model_options import EXPERTS, REST, add_memory, budget_of, frame_of, packing_of

if TYPE_CHECKING:
    from ..handoff import OpenAIModel
    from ..loop import Runtime
    from ..model import InteractionModel, ModelConfig
    from ..session import Session
    from ..text import HfTokenizer, Tokenizer

INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended


@dataclass(frozen=True)
class Trained:
    """A preset whose weights ship."""

    load: Callable[[str], tuple[InteractionModel, Tokenizer]]  # for a device: auto, cpu or cuda
    hint: str  # what to write to it
    options: Mapping[str, Any]  # of `Runtime.open_session`, where a client names none


_TEXT = """\
Serve an interaction model over WebSockets, one session a connection: sound, pictures and text up,
speech, text and actions down. docs/protocol.md is the protocol, tml_runtime.serve.client a client.

Listens on loopback unless told otherwise; any other address needs a token, and a reverse proxy for
TLS. GET /healthz says whether it is alive and ready, /status what it does, /metrics the same for
Prometheus.

Run it under a supervisor that starts it again (systemd, Kubernetes): when a tick raises, every
client is told why and the process exits with status 1. SIGTERM lets no new session in, says bye to
all clients, and exits with status 0.
"""
_EXAMPLES = """\
examples:
  tml-runtime serve                                  the smallest model, on ws://127.0.0.1:8760
  tml-runtime serve --demo                           a page to talk to a small trained model, on
                                                     http://localhost:8760
  tml-runtime serve --preset slice --sessions 32     more sessions, on a GPU
  tml-runtime serve --checkpoint converted/ --preset inkling-small --sessions 32 \\
      --page-dtype fp8 --keep 20 --keep-video 1      what `tml-runtime plan` found to fit a GPU
  TML_SERVE_TOKEN=$(cat token) tml-runtime serve --host 0.0.0.0
                                                     for others, behind a proxy that has TLS
  tml-runtime serve --background http://localhost:8000/v1 --background-model NAME
                                                     deep work goes to another model
  tml-runtime serve --allow-origin https://app.example.org
                                                     also for a web page from there
"""


def add_serve(commands: Any, trained: Mapping[str, Trained]) -> None:
    """`serve`, to argparse's subcommands. trained: by preset; the first is that of --demo."""
    serve = commands.add_parser(
        "serve",
        help="serve a model's sessions over WebSockets",
        description=_TEXT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument(
        "--demo",
        action="store_true",
        help="also serve a page at / that talks to it: microphone, camera, speech, every tick",
    )
    _add_network(serve)
    _add_background(serve)
    serve.add_argument(
        "--sessions",
        type=int,
        default=4,
        metavar="N",
        help="how many at once; one more is refused (default: %(default)s)",
    )
    serve.add_argument(
        "--probe-ticks",
        type=int,
        default=20,
        metavar="N",
        help="run so many ticks of 1, 2, 4, .. sessions before the start, and admit as many "
        "sessions as were in time; 0: admit --sessions (default: %(default)s)",
    )
    serve.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long a session waits for a client whose connection broke (default: %(default)g)",
    )
    serve.add_argument(
        "--preset",
        help=f"model: tiny or the trained {', '.join(trained)} (any CPU), slice or inkling-small "
        f"(default: {next(iter(trained))} with --demo, else tiny)",
    )
    serve.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="weights of the preset's shape; without it they are random, and say nothing sensible",
    )
    serve.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="a tokenizer.json, or a folder with one (default: the checkpoint's, if there is one "
        "beside its weights; else an id is a byte)",
    )
    serve.add_argument(
        "--experts",
        choices=EXPERTS,
        help="pack the routed experts; a converted checkpoint is packed already",
    )
    serve.add_argument(
        "--rest",
        choices=REST,
        help="pack shared experts, attention, dense layers and unembedding",
    )
    serve.add_argument(
        "--page-dtype", choices=("bf16", "fp8"), help="of keys and values (default: the model's)"
    )
    add_memory(serve)
    serve.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu or cuda (default: auto)"
    )
    serve.add_argument(
        "--seed", type=int, default=0, help="of weights and draws (default: %(default)s)"
    )
    serve.add_argument(
        "--black-box",
        type=Path,
        metavar="DIR",
        help="keep the newest ticks there when one misses, a session faults or the loop fails; "
        "`tml-runtime trace` reads them",
    )
    serve.set_defaults(run=partial(_serve, trained=trained))


def _add_network(serve: argparse.ArgumentParser) -> None:
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    serve.add_argument(
        "--port", type=int, default=8760, help="0: any that is free (default: %(default)s)"
    )
    serve.add_argument(
        "--token",
        help="what a client must know, 16 characters or more; better given as TML_SERVE_TOKEN, "
        "since arguments can be seen by other users",
    )
    serve.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="of web pages that may connect; may be given again (default: none)",
    )
    serve.add_argument(
        "--max-connections",
        type=int,
        metavar="N",
        help="at once, with those that have no session yet (default: --sessions + 32)",
    )


def _add_background(serve: argparse.ArgumentParser) -> None:
    serve.add_argument(
        "--background",
        metavar="URL",
        help="a server with OpenAI's chat completions, such as http://localhost:8000/v1, that "
        "answers what the model delegates; its key, if it wants one, as TML_BACKGROUND_KEY",
    )
    serve.add_argument(
        "--background-model", metavar="NAME", help="which of that server's models answers"
    )
    serve.add_argument(
        "--handoff-policy",
        choices=("interrupt", "when_idle", "silent", "skip_if_busy"),
        default="when_idle",
        help="when an answer reaches the live model (default: %(default)s)",
    )


def _serve(
    args: argparse.Namespace, parser: argparse.ArgumentParser, trained: Mapping[str, Trained]
) -> int:
    require("aiohttp", "serve sessions", extra="serve")
    require("PIL", "serve sessions", extra="serve")
    from .. import prometheus
    from ..model.checkpoint import CheckpointError
    from .server import run_service

    token = _env.serve_token(args.token)
    try:
        limits = _check(args, token)
        preset = args.preset or (next(iter(trained)) if args.demo else "tiny")
        known = trained.get(preset) if args.checkpoint is None else None
        runtime, config = make_runtime(args, preset, known)
    except InputValueError as error:
        print(f"error: {error}; see `tml-runtime serve --help`", file=sys.stderr)
        return 2
    except (CaptureError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    def make_service() -> Any:
        from .service import Service

        return Service(
            runtime,
            config,
            make_intake=make_intake,
            limits=limits,
            token=token,
            origins=tuple(args.allow_origin),
            options=known.options if known else {},
            hint=known.hint if known else "",
        )

    try:
        ended = run_service(
            make_service,
            runtime,
            host=args.host,
            port=args.port,
            metrics=(prometheus.render, prometheus.CONTENT_TYPE),
            page=args.demo,
            on_ready=lambda url: _say_ready(url, page=args.demo),
        )
    except OSError as error:
        print(f"error: cannot listen on {args.host}:{args.port}: {error}", file=sys.stderr)
        return 1
    if ended is None:
        print("error: the tick loop failed, and every client was told", file=sys.stderr)
        return 1
    return INTERRUPTED if ended is signal.SIGINT else 0


def _say_ready(url: str, *, page: bool) -> None:
    """The first line is for programs."""
    print(f"listening on {url}", flush=True)
    if page:
        http = url.replace("ws://", "http://").partition("/v1/")[0]
        print(f"the demo is at {http}/", flush=True)


def _check(args: argparse.Namespace, token: str | None) -> Any:
    """Limits of the service. Raises InputValueError."""
    from ..budget import kept_seconds
    from .limits import Limits
    from .server import check_reachable

    check_reachable(args.host, token)
    kept_seconds(args.keep, args.keep_video)  # before a model is loaded, which may take minutes
    frame_of(args.video)
    if not 0 <= args.port < 65_536:
        raise InputValueError(f"port={args.port} is not in 0..65535")
    if not 1 <= args.sessions <= 4096:
        raise InputValueError(f"sessions={args.sessions} is not in 1..4096")
    if not (math.isfinite(args.grace) and 0 <= args.grace <= 3600):
        raise InputValueError(f"grace={args.grace} is not in 0..3600")
    most = args.sessions + 32 if args.max_connections is None else args.max_connections
    return replace(Limits(), max_connections=most, grace_s=args.grace)


def make_runtime(
    args: argparse.Namespace, preset: str, trained: Trained | None
) -> tuple[Runtime, ModelConfig]:
    """Raises InputValueError, CheckpointError."""
    from ..handoff import HandoffOptions, Policy
    from ..loop import Runtime
    from ..plan import PAGE_DTYPES
    from ..random_model import load_model, random_model, vocoder_for

    background = _background(args)
    for name in ("seed", "probe_ticks"):
        if getattr(args, name) < 0:
            raise InputValueError(f"{name}={getattr(args, name)} is negative")
    packing = packing_of(args)
    tokenizer: Tokenizer | None = None
    from_file = _tokenizer(args)
    options: dict[str, Any] = {"device": args.device, "seed": args.seed, "packing": packing}
    if trained is not None:
        if packing.experts or packing.rest:
            raise InputValueError(f"preset={preset!r} is never packed: leave out --experts, --rest")
        if from_file is not None:
            raise InputValueError(f"preset={preset!r} has words of its own: leave out --tokenizer")
        model, tokenizer = trained.load(args.device)
    elif args.checkpoint is None:
        model = random_model(preset, **options)
    else:
        model = load_model(args.checkpoint, preset, **options)
    if from_file is not None:
        from_file.check(model.config.vocab.num_valid)
        tokenizer = from_file
    try:
        budget = budget_of(args, model.config)
    except ValueError as error:
        raise InputValueError(str(error)) from None
    runtime = Runtime(
        model,
        tokenizer=tokenizer,
        num_slots=args.sessions,
        seed=args.seed,
        vocoder=vocoder_for(model),
        black_box=args.black_box,
        probe_ticks=args.probe_ticks,
        budget=budget,
        page_dtype=PAGE_DTYPES.get(args.page_dtype),
        background=background,
        handoff=HandoffOptions(policy=Policy(args.handoff_policy)),
    )
    return runtime, model.config


def _tokenizer(args: argparse.Namespace) -> HfTokenizer | None:
    """Before a model is loaded. Raises InputValueError, and MissingExtraError without the package
    for it."""
    from ..text import TOKENIZER_FILE, HfTokenizer

    path, checkpoint = args.tokenizer, args.checkpoint
    if path is None and checkpoint is not None:
        folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            return None
    return None if path is None else HfTokenizer(path)


def _background(args: argparse.Namespace) -> OpenAIModel | None:
    """Raises InputValueError, and MissingExtraError without the package for it."""
    if args.background is None and args.background_model is None:
        return None
    if args.background is None or args.background_model is None:
        raise InputValueError("--background and --background-model need one another")
    from ..handoff import OpenAIModel

    require("openai", "ask a background model", extra="handoff")
    return OpenAIModel(args.background, args.background_model, api_key=_env.background_key())


def make_intake(session: Session) -> Any:
    from ..net.intake import Intake

    return Intake(session, sample_rate=16_000)
