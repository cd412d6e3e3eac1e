"""What a background model is asked, and what one is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from tml_kernels.kv_cache import Session, UnknownSession

from ..model import ModelState
from .transcript import Turn

DELEGATE = "delegate"  # the trigger of a request that is the model's own action


@dataclass(frozen=True)
class Snapshot:
    """The session's state as it was after the tick that delegated: a fork in a spare slot.

    It holds what no transcript does, what was heard and seen. It is there until the request's
    stream has ended. The live state is for the tick thread alone, so the fork is not run in place:
    `save` it, and load it into a state of your own.
    """

    state: ModelState
    session: Session
    copied: torch.cuda.Event | None = None  # on a GPU: when the fork's copies are there

    def save(self, path: str | Path) -> None:
        """Write it to a file for `ModelState.load`, from any thread; waits for the device.

        Raises UnknownSession when the snapshot is not there any more. Each look at the books is
        whole, because Python makes threads take turns; that the pages stayed where they were
        between two of them is seen afterwards.
        """
        cache, path = self.state.cache, Path(path)
        with self._stream():
            while True:
                was_suspended = cache.is_suspended(self.session)
                cache.save(self.session, path)
                try:
                    cache.length(self.session)
                except UnknownSession:  # its slot may hold another session's state by now
                    path.unlink()
                    raise
                if cache.is_suspended(self.session) == was_suspended:
                    return

    def _stream(self) -> contextlib.AbstractContextManager[object]:
        """One that ticks do not wait for."""
        if self.copied is None:
            return contextlib.nullcontext()
        stream = torch.cuda.Stream(self.state.device)
        stream.wait_event(self.copied)
        return torch.cuda.stream(stream)


@dataclass(frozen=True, eq=False)
class Request:
    """One request. trigger: "delegate", or the text of `Session.delegate`. t: media time in seconds
    of the tick's speech, as that of an ActionOut. epoch: the session's.

    cancelled: set once nobody waits for the answer any more; a callable in a thread cannot be
    stopped otherwise.
    """

    id: int
    epoch: int
    t: float
    turns: tuple[Turn, ...]
    trigger: str = DELEGATE
    snapshot: Snapshot | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)


class BackgroundModel(Protocol):
    """Answers requests on the hand-off's own event loop; one model serves one runtime at a time."""

    def stream(self, request: Request) -> AsyncIterator[str]:
        """An async generator of the answer's pieces. Several run at once.

        Cancelled when it takes too long or nobody waits any more. Raise HandoffError with a reason
        for the model to read; of any other exception it is told the type only.
        """
        ...

    async def close(self) -> None:
        """The hand-off stops. Another one may follow."""
        ...
