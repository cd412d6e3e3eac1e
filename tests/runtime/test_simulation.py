"""Everything that may happen to sessions, in any order, on the virtual clock; and a day of it."""

from __future__ import annotations

import gc
import random
import sys

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from world import World

DAY_S = 24 * 3600
which = st.integers(0, 7)


class Sessions(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(prompt_tokens=st.sampled_from([0, 0, 1, 64]))
    def open(self, prompt_tokens: int) -> None:
        self.world.open(prompt_tokens)

    @rule(which=which, politely=st.booleans())
    def close(self, which: int, politely: bool) -> None:
        self.world.close(which, politely)

    @rule(
        which=which,
        offset_s=st.sampled_from([0.0, 0.05, 0.3, -0.1, 3.0, 99.0]),
        windows=st.sampled_from([0.0, 0.1, 1.0, 4.5]),
    )
    def push(self, which: int, offset_s: float, windows: float) -> None:
        self.world.push(which, offset_s, windows)

    @rule(which=which)
    def poll(self, which: int) -> None:
        self.world.poll(which)

    @rule(which=which, ago_s=st.sampled_from([0.0, 0.12, 0.5, 1.4, 60.0]))
    def interrupt(self, which: int, ago_s: float) -> None:
        self.world.interrupt(which, ago_s)

    @rule(which=which, paused=st.booleans())
    def pause(self, which: int, paused: bool) -> None:
        self.world.pause(which, paused)

    @rule(which=which)
    def poison(self, which: int) -> None:
        self.world.poison(which)

    @rule(ticks=st.integers(1, 4))
    def tick(self, ticks: int) -> None:
        self.world.tick(ticks)

    @rule(seconds=st.sampled_from([0.05, 0.25, 1.0, 100.0]))
    def stall(self, seconds: float) -> None:
        self.world.stall(seconds)

    def teardown(self) -> None:
        self.world.tick(2)
        self.world.runtime.stop()


Sessions.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestSessions = Sessions.TestCase


def live(world: World, dice: random.Random) -> None:
    """One event, ticks most of all."""
    which = dice.randrange(8)
    event = dice.random()
    if event < 0.45:
        world.tick(dice.randint(1, 2))
    elif event < 0.65:
        world.push(which, dice.choice([0.0, 0.0, 0.3, -0.1, 9.0]), dice.choice([0.1, 1.0, 2.5]))
    elif event < 0.75:
        world.poll(which)
    elif event < 0.83:
        world.open(dice.choice([0, 0, 5, 64]))
    elif event < 0.90:
        world.close(which, dice.random() < 0.7)
    elif event < 0.93:
        world.interrupt(which, dice.choice([0.0, 0.4, 1.2]))
    elif event < 0.96:
        world.pause(which, dice.random() < 0.4)
    elif event < 0.965:
        world.poison(which)
    else:
        world.stall(dice.choice([0.1, 0.3, 5.0, 600.0]))


def test_a_day() -> None:
    """24 hours with a thousand sessions. The machine sleeps through most of it, so that some ten
    thousand ticks run and the others are skipped and accounted for."""
    world, dice = World(), random.Random(24)
    blocks = 0
    while world.runtime.media_ns() < DAY_S * 10**9:
        live(world, dice)
        if blocks == 0 and world.num_opened > 100:
            gc.collect()
            blocks = sys.getallocatedblocks()
    for client in list(world.clients):
        client.session.close()
    world.clients.clear()
    world.tick(2)
    report = world.runtime.report()
    assert report["slots_free"] == report["slots"]
    assert report["ticks"] > 3_000 and world.num_opened > 500
    assert world.num_refused > 0 and world.num_faults > 0
    assert report["ticks"] + report["skipped"] >= DAY_S * 5
    gc.collect()
    # Records of ticks and clients' counts are there once; a leak of one object a session is 500.
    assert sys.getallocatedblocks() - blocks < 400
