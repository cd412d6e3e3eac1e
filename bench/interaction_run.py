"""Episodes of the `cue` model's tasks, lived through in a runtime on its virtual clock.

A `Player` is a client that plays one episode after another: 20 ms of audio at a time, two frames a
tick and text, through a line and `Intake`; without a line whole windows go in as they are. What the
session says is kept with the times that the runtime gives it.
"""

# Dimension key: W samples of a tick.

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from tml_runtime import InteractionModel, Runtime, Session
from tml_runtime.demo.cue.evaluate import BUDGET, EVALUATION
from tml_runtime.demo.cue.speech import Footage, Speech
from tml_runtime.demo.cue.stage import Episode
from tml_runtime.demo.cue.tasks import TASKS, make_episode
from tml_runtime.demo.cue.words import ID, WORDS, WordTokenizer
from tml_runtime.errors import SessionFault
from tml_runtime.net.faults import Link, Profile
from tml_runtime.net.intake import Intake

from .feed import JPEG_BITS, PIECE_NS, VirtualTime, pump
from .interaction_take import PERIOD_NS, PERIOD_S, RATE, REST, WINDOW, Take

DIRECT = "direct"  # no line: each window is whole and on the tick grid
JITTER = {
    "jitter20": Profile(delay_ms=20, jitter_ms=20),
    "jitter50": Profile(delay_ms=20, jitter_ms=50),
    "rate300": Profile(delay_ms=20, jitter_ms=2, rate_kbps=300),  # audio and frames take 290
}
AGEING = ("cue", "every", "speak", "wait_tone", "wait_flash")  # nothing that says numbers
AGEING_TICKS = 60
BETWEEN = 7  # episodes to age between two that are measured: what was counted is forgotten
RESEND_NS = 200_000_000  # text that was lost is sent again
PLAN = 3  # of EVALUATION's seeds; those below it belong to the trainer's own evaluation


def profile(name: str) -> Profile | None:
    """None for DIRECT. Raises InputValueError for a name that is not known."""
    if name == DIRECT:
        return None
    return JITTER[name] if name in JITTER else Profile.named(name)


@dataclass(frozen=True)
class Part:
    """Of what a session lives through: an episode, and whether it is measured."""

    episode: Episode
    measured: bool = True


@dataclass(order=True)
class _Packet:
    due_ns: int
    order: int
    put: Callable[[int], None] = field(compare=False)  # into the session, at the time it arrives
    num_bytes: int = field(compare=False, default=0)
    reliable: bool = field(compare=False, default=False)


class Player:
    """A client of `session`, which was opened at `open_ns`, that begins to capture at `begin_ns`.

    line: None puts windows in directly; then both times are the same. All calls come from one
    thread.
    """

    def __init__(
        self,
        session: Session,
        parts: Iterable[Part],
        line: Profile | None,
        *,
        seed: int,
        open_ns: int,
        begin_ns: int,
    ) -> None:
        self.session = session
        self.takes: list[Take] = []
        self.fault: str | None = None
        self.done = False
        self.windows = self.missing = 0  # until then
        self._apart_s = (begin_ns - open_ns) / 1e9
        self._begin_ns = begin_ns
        self._ticks = self._media(parts)
        self._num_ticks = 0
        self._intake = None if line is None else Intake(session, sample_rate=RATE)
        self._links = [] if line is None else [Link(line, 2 * seed), Link(line, 2 * seed + 1)]
        self._to_send: deque[_Packet] = deque()
        self._on_the_way: list[_Packet] = []
        self._order = count()

    def run(self, now_ns: int) -> None:
        """Capture, put in what has arrived, poll. Raises NotRunning."""
        if self.fault is not None:
            return
        try:
            while not self.done and self._begin_ns + self._num_ticks * PERIOD_NS <= now_ns:
                self._capture_tick()
            self._move(now_ns)
            self._poll()
        except SessionFault as fault:
            self.fault, self.done = str(fault), True

    def _media(self, parts: Iterable[Part]) -> Iterator[tuple[np.ndarray, Any, list[int]]]:
        """(audio, frames or None, text) of each tick; a take begins with the first of its part."""
        for number, part in enumerate(parts):
            episode = part.episode
            if part.measured:
                self.takes.append(Take(episode, self._num_ticks * PERIOD_S + self._apart_s))
            for tick in range(len(episode)):
                stop = [ID["stop"]] if number > 0 and tick == 0 else []
                seen = episode.frames_T_2_Y_Y_3[tick] if episode.seen_T[tick] else None
                yield episode.pcm_T_W[tick], seen, stop + list(episode.text[tick])
            for _ in range(REST):
                yield np.zeros(WINDOW, np.float32), None, []

    def _capture_tick(self) -> None:
        media = next(self._ticks, None)
        if media is None:
            stats = self.session.stats
            self.done, self.windows, self.missing = True, stats.ticks, stats.missing_windows
            return
        pcm_W, frames, text = media
        if self._intake is None:
            self._put_window(pcm_W, frames, text)
        else:
            self._to_send.extend(sorted(self._packets(self._intake, pcm_W, frames, text)))
        self._num_ticks += 1

    def _put_window(self, pcm_W: np.ndarray, frames: Any, text: list[int]) -> None:
        t = self._num_ticks * PERIOD_S
        self.session.push_audio(pcm_W, t)
        for k, frame in enumerate(() if frames is None else frames):
            self.session.push_video(frame, t + (k + 0.5) * PERIOD_S / 2)
        if text:
            self.session.push_text(text)

    def _packets(
        self, intake: Intake, pcm_W: np.ndarray, frames: Any, text: list[int]
    ) -> Iterator[_Packet]:
        begin_ns, num_pieces = self._begin_ns + self._num_ticks * PERIOD_NS, PERIOD_NS // PIECE_NS
        for k, piece in enumerate(np.split(pcm_W, num_pieces)):
            number = self._num_ticks * num_pieces + k

            def put(at_ns: int, number: int = number, piece: np.ndarray = piece) -> None:
                intake.audio(number, number * len(piece), piece, at_ns)

            yield self._packet(begin_ns + (k + 1) * PIECE_NS, put, 2 * len(piece))
        for k, frame in enumerate(() if frames is None else frames):
            number = 2 * self._num_ticks + k

            def show(at_ns: int, number: int = number, frame: np.ndarray = frame) -> None:
                intake.video(number, (2 * number + 1) * WINDOW // 4, frame, at_ns)

            due_ns = begin_ns + (2 * k + 1) * PERIOD_NS // 4
            yield self._packet(due_ns, show, frame.size // 3 * JPEG_BITS // 8)
        if text:
            words = " ".join(WORDS[word] for word in text)
            read = lambda at_ns: intake.text(words)  # noqa: E731
            yield self._packet(begin_ns + PERIOD_NS // 2, read, len(words), reliable=True)

    def _packet(self, due_ns: int, put: Any, num_bytes: int, reliable: bool = False) -> _Packet:
        return _Packet(due_ns, next(self._order), put, num_bytes, reliable)

    def _move(self, now_ns: int) -> None:
        while self._to_send and self._to_send[0].due_ns <= now_ns:
            packet = self._to_send.popleft()
            for at_ns in self._arrivals(packet):
                arrived = _Packet(at_ns, next(self._order), packet.put)
                heapq.heappush(self._on_the_way, arrived)
        while self._on_the_way and self._on_the_way[0].due_ns <= now_ns:
            packet = heapq.heappop(self._on_the_way)
            packet.put(packet.due_ns)

    def _arrivals(self, packet: _Packet) -> list[int]:
        media, signals = self._links
        if not packet.reliable:
            return media.send(packet.due_ns, packet.num_bytes)
        at_ns = packet.due_ns
        while not (arrivals := signals.send(at_ns, packet.num_bytes)):
            at_ns += RESEND_NS
        return arrivals[:1]

    def _poll(self) -> None:
        for out in self.session.poll():
            for take in self.takes[-2:]:
                t = out.t - take.begin_s
                if -PERIOD_S < t < take.duration_s:
                    take.add(out, t)


@dataclass(frozen=True)
class Condition:
    """line: DIRECT or a profile's name. minutes: that a session lives through before it is
    measured; 0: each episode has a session of its own."""

    line: str = DIRECT
    sessions: int = 1
    minutes: int = 0

    def __str__(self) -> str:
        age = f", after {self.minutes} min" if self.minutes else ""
        return f"{self.line}, {self.sessions} sessions{age}"


@dataclass(frozen=True)
class Played:
    """Of all sessions of a condition. windows: their ticks; missing: of these, not whole."""

    takes: list[Take]
    windows: int
    missing: int
    faults: list[str]


def held_out_episodes(
    count_each: int, num_ticks: int, speech: Speech, footage: Footage, tasks: Sequence[str]
) -> list[Episode]:
    """The same for every condition: nothing is lost but on its line."""
    numbers = {name: number for number, name in enumerate(TASKS)}
    return [
        make_episode(
            task,
            num_ticks,
            np.random.SeedSequence([EVALUATION, PLAN, numbers[task], n]),
            speech,
            footage,
            lose=0.0,
        )
        for n in range(count_each)
        for task in tasks
    ]


def play(
    model: InteractionModel,
    episodes: Sequence[Episode],
    condition: Condition,
    media: tuple[Speech, Footage],
    *,
    seed: int = 0,
    on_tick: Callable[[], None] = lambda: None,
    **options: Any,
) -> Played:
    """options: of Runtime. on_tick: called after each of `ticks_of` ticks, more or less."""
    takes: list[Take] = []
    faults: list[str] = []
    if condition.minutes == 0:
        lives = [[Part(episode)] for episode in episodes]
    else:
        num = min(condition.sessions, len(episodes))
        shares = [episodes[n::num] for n in range(num)]
        lives = [_life(share, condition.minutes, n, media) for n, share in enumerate(shares)]
    runtime = make_runtime(model, condition.sessions, seed, **options)
    windows = missing = 0
    with runtime:
        clock = VirtualTime(runtime)
        for first in range(0, len(lives), condition.sessions):
            players = [
                _enter(runtime, parts, condition, seed=seed * 65_537 + first + n, place=n)
                for n, parts in enumerate(lives[first : first + condition.sessions])
            ]
            while not all(player.done for player in players):
                _run_ticks(players, clock, 1, condition.line)
                on_tick()
            _run_ticks(players, clock, REST, condition.line)
            for player in players:
                windows += player.windows
                missing += player.missing
                takes += player.takes
                faults += [player.fault] if player.fault else []
                player.session.close()
    return Played(takes, windows, missing, faults)


def _run_ticks(players: Sequence[Player], clock: VirtualTime, num_ticks: int, line: str) -> None:
    if line != DIRECT:
        pump(players, clock, clock.now_ns() + num_ticks * PERIOD_NS)
        return
    for _ in range(num_ticks):  # nothing happens within a tick
        for player in players:
            player.run(clock.now_ns())
        clock.sleep_until(clock.now_ns() + PERIOD_NS)
    for player in players:
        player.run(clock.now_ns())


def ticks_of(condition: Condition, num_episodes: int, num_ticks: int) -> int:
    """That `play` runs of sessions side by side, for a progress bar."""
    each = num_ticks + REST
    if condition.minutes == 0:
        return -(-num_episodes // condition.sessions) * each
    share = -(-num_episodes // condition.sessions)
    between = (share - 1) * BETWEEN * (AGEING_TICKS + REST)
    return condition.minutes * 60_000_000_000 // PERIOD_NS + share * each + between


def make_runtime(model: InteractionModel, num_slots: int, seed: int = 0, **options: Any) -> Runtime:
    settings = {"budget": BUDGET, "tokenizer": WordTokenizer(), "realtime": False, **options}
    return Runtime(model, num_slots=num_slots, seed=seed, **settings)


def _enter(
    runtime: Runtime, parts: Iterable[Part], condition: Condition, *, seed: int, place: int
) -> Player:
    assert runtime.clock is not None
    line = profile(condition.line)
    now_ns = runtime.clock.now_ns()
    open_ns = -(-now_ns // PERIOD_NS) * PERIOD_NS
    # So that the sessions' pieces interleave.
    apart_ns = 0 if line is None else place * PIECE_NS // condition.sessions
    session = runtime.open_session(temperature=0.0, seed=seed)
    return Player(session, parts, line, seed=seed, open_ns=open_ns, begin_ns=open_ns + apart_ns)


def _life(
    episodes: Sequence[Episode], minutes: int, number: int, media: tuple[Speech, Footage]
) -> Iterator[Part]:
    """Minutes of episodes that are not measured, then those that are, and more between them."""
    ticks = AGEING_TICKS + REST
    ageing = (
        Part(
            make_episode(
                AGEING[n % len(AGEING)],
                AGEING_TICKS,
                np.random.SeedSequence([EVALUATION, PLAN + 1, number, n]),
                *media,
                lose=0.0,
            ),
            measured=False,
        )
        for n in count()
    )
    for _ in range(-(-minutes * 60_000_000_000 // (ticks * PERIOD_NS))):
        yield next(ageing)
    for n, episode in enumerate(episodes):
        for _ in range(BETWEEN if n > 0 else 0):
            yield next(ageing)
        yield Part(episode)
