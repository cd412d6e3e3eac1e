"""`tml-runtime serve` as a program, with the fake model: python serve_child.py [--explode N] ..."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "runtime")]

from fake_model import FakeModel, make_runtime  # noqa: E402
from local_service import FAST, CountingVocoder  # noqa: E402

from tml_runtime import cli  # noqa: E402
from tml_runtime.serve import command  # noqa: E402


def explode(tick: int) -> None:
    if tick == EXPLODE:
        raise ZeroDivisionError("on purpose")


EXPLODE = int(sys.argv[1])
command.make_runtime = lambda args, preset, trained: (
    make_runtime(
        FakeModel(FAST, on_tick=explode, keep=False),
        realtime=True,
        num_slots=args.sessions,
        vocoder=CountingVocoder,
    )[0],
    FAST,
)
sys.exit(cli.main(["serve", *sys.argv[2:]]))
