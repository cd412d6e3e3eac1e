"""A day in the life of a runtime, on its virtual clock: what may happen, and what must be true.

Every session pushes its own number as samples and as text, so that whatever reaches the model says
whose it is. `check` is called after every event.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field

import numpy as np
from fake_model import CONFIG, SILENCE, FakeModel, FakeState, make_runtime

from tml_runtime import Runtime, Session, errors
from tml_runtime.model import TickInput, TickOutput
from tml_runtime.session import SpeechOut

N = CONFIG.layout.samples_per_tick
PERIOD_S = CONFIG.layout.period_ms / 1000
SLOTS = 4


def pushed_numbers(pcm_N: np.ndarray, missing: bool) -> set[float]:
    """Whose samples these are. What conceals a gap fades, so that no two neighbours are alike or
    their value is no number; what a client pushed stays the same for a tenth of a window at least.
    """
    if missing:
        pcm_N = pcm_N[1:][pcm_N[1:] == pcm_N[:-1]]
        pcm_N = pcm_N[pcm_N == np.rint(pcm_N)]
    return set(np.unique(pcm_N).tolist())


class WatchedModel(FakeModel):
    """Notes who is heard in which slot; speaks a word in every tick; faults where it is told to."""

    def __init__(self) -> None:
        super().__init__(keep=False, say=lambda tick, slot: [65, SILENCE, 66, 67])
        self.poisoned: set[int] = set()
        self.owner: dict[int, int] = {}  # number of the session in a slot
        self.num_rows = 0
        self.mixed_up: list[tuple[int, set[int]]] = []

    def tick(self, state: FakeState, tick: TickInput) -> TickOutput:
        for row, slot in enumerate(tick.slot_S.tolist()):
            numbers = pushed_numbers(tick.pcm_S_W[row].numpy(), bool(tick.missing_S[row]))
            numbers |= {token + 1 for token in tick.text[row]}
            if not numbers <= {0, self.owner[slot]}:
                self.mixed_up.append((slot, numbers))
            if slot in self.poisoned:
                self.faulty.add((self.ticks, slot))
        self.num_rows += len(tick.slot_S)
        out = super().tick(state, tick)
        self.faulty.clear()
        self.replayed.clear()
        return out


@dataclass
class Client:
    session: Session
    number: int  # 1..200; zero is silence
    opened_at: int  # tick
    last_t: float = -1.0  # of the newest speech
    polled: int = 0
    failed: bool = False
    counted: dict[str, int] = field(default_factory=dict)


class World:
    def __init__(self) -> None:
        self.model = WatchedModel()
        self.runtime: Runtime
        self.runtime, _ = make_runtime(self.model, num_slots=SLOTS, output_queue_ticks=8)
        self.clients: list[Client] = []
        self.num_opened = self.num_refused = self.num_faults = 0

    # What may happen

    def open(self, prompt_tokens: int) -> None:
        number = 1 + self.num_opened % 200
        prompt = [number - 1] * prompt_tokens
        in_use = SLOTS - self.runtime._slots.num_free
        try:
            session = self.runtime.open_session(prompt=prompt, seed=number)
        except errors.ResourceExhausted as error:
            self.num_refused += 1
            assert error.in_use == in_use == error.capacity == SLOTS
            return
        slot = session._seat.slot
        assert all(not c.failed and c.session._seat.slot != slot for c in self.clients)
        self.model.owner[slot] = number
        self.clients.append(Client(session, number, self.now_tick()))
        self.num_opened += 1

    def close(self, which: int, politely: bool) -> None:
        if client := self._pick(which):
            self.clients.remove(client)
            if politely:
                client.session.close()
            else:
                del client  # nobody can reach it any more
                gc.collect(0)

    def push(self, which: int, offset_s: float, windows: float) -> None:
        if client := self._pick(which):
            t = client.session.open_t + offset_s
            pcm = np.full(round(windows * N), client.number, np.float32)
            try:
                client.session.push_audio(pcm, t)
                client.session.push_text([client.number - 1] * 3)
                client.session.push_video(np.zeros((40, 40, 3), np.uint8), t)
            except errors.LateInput as error:
                assert offset_s < 0 and error.open_t == client.session.open_t
            except errors.InputBackpressure:
                pass

    def poll(self, which: int) -> None:
        if client := self._pick(which):
            for out in client.session.poll():
                assert out.epoch == client.session.epoch
                if isinstance(out, SpeechOut):
                    assert out.t > client.last_t and len(out.pcm) == N
                    client.last_t, client.polled = out.t, client.polled + 1

    def interrupt(self, which: int, ago_s: float) -> None:
        if client := self._pick(which):
            before = client.session.epoch
            assert client.session.interrupt(client.session.media_time - ago_s) == before + 1
            assert client.session.poll() == []

    def pause(self, which: int, paused: bool) -> None:
        if client := self._pick(which):
            client.session.pause() if paused else client.session.resume()

    def poison(self, which: int) -> None:
        """Its next tick faults."""
        if (client := self._pick(which)) and client.session._seat.present:
            self.model.poisoned.add(client.session._seat.slot)

    def tick(self, ticks: int) -> None:
        for _ in range(ticks):
            running = [c for c in self.clients if c.session._seat.present]
            self.runtime.run_ticks(1)
            for client in running:
                seat = client.session._seat
                if seat.slot in self.model.poisoned and seat.stats.ticks > 0:
                    assert seat.fault is not None
                    client.failed = True
                    self.num_faults += 1
            self.model.poisoned.clear()
            for client in [c for c in self.clients if c.failed]:
                self._leave_failed(client)
            self.check()

    def stall(self, seconds: float) -> None:
        """The machine stands still."""
        assert self.runtime.clock is not None
        self.runtime.clock.advance(int(seconds * 1e9))

    # What must be true

    def check(self) -> None:
        metrics, slots = self.runtime.metrics, self.runtime._slots
        totals = metrics._totals  # a report would sort all records
        assert self.model.mixed_up == []
        assert metrics.count + totals["skipped"] == self.now_tick()
        assert totals["rows"] == self.model.num_rows
        assert totals["faults"] == self.num_faults
        assert slots.num_free + len(slots.seats()) == SLOTS
        assert len(slots.seats()) == len(self.clients) + self._closing()
        for client in self.clients:
            self._check_client(client)

    def now_tick(self) -> int:
        return self.runtime._next_tick

    def _check_client(self, client: Client) -> None:
        session, stats = client.session, client.session.stats
        windows = max(0, self.now_tick() - session._seat.open_tick)
        assert round(session.open_t / PERIOD_S) == windows
        assert stats.ticks + stats.skipped_ticks + stats.absent_ticks == windows
        assert client.polled + stats.lost_outputs + stats.fenced_outputs <= stats.ticks
        counts = vars(stats)
        assert all(counts[name] >= count for name, count in client.counted.items())
        client.counted = counts

    def _closing(self) -> int:
        slots = self.runtime._slots
        return sum(seat.over for seat in slots.seats())

    def _leave_failed(self, client: Client) -> None:
        try:
            client.session.push_text("x")
        except errors.SessionFault as error:
            assert error.t >= 0
        else:
            raise AssertionError("a session with a fault took input")
        self.clients.remove(client)

    def _pick(self, which: int) -> Client | None:
        return self.clients[which % len(self.clients)] if self.clients else None
