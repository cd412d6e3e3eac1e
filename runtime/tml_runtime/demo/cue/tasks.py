"""What episodes are about: each task reads an instruction, lets things happen, says what is due.

An answer is due in the tick that heard its cue, `delay` ticks later where the instruction says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from .speech import Footage, Speech
from .stage import ASK_HZ, CUE_HZ, LATE_S, MAX_DELAY, Episode, Event, Stage
from .words import NOW, NUMBERS, SCALE, TICK, YES

MAX_COUNT = len(NUMBERS) - 1
GAP = 15  # ticks between bursts at least, and so many times the pace at most: beyond local windows
Task = Callable[[Stage, int, int], None]  # stage, first tick, end


def make_episode(
    name: str,
    num_ticks: int,
    seed: np.random.SeedSequence | int,
    speech: Speech,
    footage: Footage,
    *,
    lose: float | None = None,
    sections: int = 1,
    pace: float = 1.0,
    talks: float = 0.5,
    delays: int = MAX_DELAY,
    loose: bool = False,
) -> Episode:
    """One episode of a task, or of several with "stop" between them; the last one is `name`.

    lose: the share of quiet ticks that are lost, by default none in most episodes. pace: below 1,
    events lie closer together; above 1, in bursts with long gaps between them. talks: how likely
    somebody talks all along, where that is to be ignored. delays: ticks to wait for, at most.
    loose: cues lie anywhere between ticks and packets are lost, as on a line; see `Stage.finish`.
    Raises KeyError for a task that is not in TASKS, ValueError for fewer than 24 ticks a section.
    """
    if num_ticks < 24 * sections:
        raise ValueError(f"{num_ticks=} is less than 24 ticks for each of {sections=}")
    rng = np.random.default_rng(seed)
    stage = Stage(num_ticks, rng, speech, footage, pace, talks, delays, loose)
    names = [str(rng.choice([n for n in TASKS if _follows(n, name)])) for _ in range(sections - 1)]
    names.append(name)
    ends = np.linspace(0, num_ticks, sections + 1).astype(int)
    for task, begin, end in zip(names, ends, ends[1:], strict=False):
        if begin > 0:
            stage.read(int(begin), "stop")
        TASKS[task](stage, int(begin) + int(rng.integers(4)), int(end))
    if lose is None:
        lose = 0.0 if rng.random() < 0.6 else rng.uniform(0.01, 0.06)
    sees = any(task.endswith(("flash", "motion")) for task in names) or rng.random() < 0.85
    return stage.finish(name, lose=lose, sees=sees)


def wait_tone(stage: Stage, begin: int, end: int) -> None:
    """Reads "wait tone 3": three ticks after each cue tone, "now"."""
    _wait(stage, begin, end, "tone", lambda tick: stage.tone(tick, CUE_HZ))


def wait_flash(stage: Stage, begin: int, end: int) -> None:
    _wait(stage, begin, end, "flash", stage.flash)


def count_tone(stage: Stage, begin: int, end: int) -> None:
    """Reads "count tone": says how many there were, after each."""
    _count(stage, begin, end, "tone", lambda tick: stage.tone(tick, CUE_HZ))


def count_flash(stage: Stage, begin: int, end: int) -> None:
    _count(stage, begin, end, "flash", stage.flash)


def count_motion(stage: Stage, begin: int, end: int) -> None:
    """Each time that the square has gone up and come down again; it never rests but below."""
    rng, heights, done = stage.rng, [0.0] * 4, 0
    stage.read(begin, "count", "motion")
    wanted = _wanted(stage)
    while len(heights) < 2 * (end - begin):
        half = int(rng.integers(3, 6))  # frames up, and as many down
        room = 2 * (end - begin) - len(heights) - 2 * half
        if done == wanted or room < 2:
            heights.append(0.0)
            continue
        way = [n / half for n in range(1, half + 1)]
        heights += [*way, *way[-2::-1], 0.0]
        done += 1
        stage.say(begin + (len(heights) - 1) // 2, NUMBERS[done])
        if stage.pace > 1:
            heights += [0.0] * (2 * _slow_gap(stage, 1))
        else:
            longest = max(3, 2 * room // (wanted + 1 - done) // 3)
            heights += [0.0] * int(rng.integers(2, 2 + longest))
    stage.move(begin, heights[: 2 * (end - begin)])
    stage.events.append(Event("count", end - 1, done))
    _sounds(stage, begin, end)


def speak(stage: Stage, begin: int, end: int) -> None:
    """Reads "speak": says the scale, a word a tick, until somebody talks for more than a tick: then
    it yields the floor. A word or a noise of a tick's length is no reason to."""
    rng, tick = stage.rng, begin
    while tick < end - 4:
        stage.read(tick, "speak")
        stop = min(tick + int(rng.integers(6, 24)), end)
        is_cut = stop < end - 4
        said = stop + 1 if is_cut else end
        for n, at in enumerate(range(tick, said)):
            stage.say(at, SCALE[n % len(SCALE)], "scale")
        _backchannels(stage, tick + 1, stop - 4)
        if not is_cut:
            return
        seconds = rng.uniform(0.7, 1.8)
        stage.speak_up(stop, seconds, rng.uniform(0.0, LATE_S if stage.loose else 0.05))
        stage.say(stop + 1, "<yield>", "yield")
        stage.events.append(Event("interruption", stop))
        tick = stop + int(seconds / 0.2) + int(rng.integers(3, 10))


def cue(stage: Stage, begin: int, end: int) -> None:
    """Reads "cue": says "yes" with each cue tone, while somebody talks."""
    stage.read(begin, "cue")
    stage.talk(begin, end)
    for tick in _spread(stage, begin + 1, end, 3, 16):
        if stage.rng.random() < 0.7:
            stage.tone(tick, CUE_HZ)
            stage.say(tick, YES)
        else:
            stage.tone(tick)


def every(stage: Stage, begin: int, end: int) -> None:
    """Reads "every 4": says "tick" every four ticks, until "stop"."""
    period = int(stage.rng.integers(2, max(2, stage.delays) + 1))
    stage.read(begin, "every", period)
    stop = end if stage.rng.random() < 0.3 else int(stage.rng.integers(begin + 8, end))
    for tick in range(begin + period, stop, period):
        stage.say(tick, TICK)
    if stop < end:
        stage.read(stop, "stop")
    _sounds(stage, begin, end)


def ask(stage: Stage, begin: int, end: int) -> None:
    """Reads "ask": delegates at each tone of ASK_HZ, and says the number that comes as a result."""
    rng = stage.rng
    stage.read(begin, "ask")
    for tick in _spread(stage, begin + 1, end - 1, 8, 14):
        if rng.random() < 0.25:
            stage.tone(tick, CUE_HZ if rng.random() < 0.5 else None)
            continue
        stage.tone(tick, ASK_HZ)
        stage.say(tick, "<delegate>")
        back, number = tick + int(rng.integers(1, 7)), int(rng.integers(len(NUMBERS)))
        if back < end:
            stage.read(back, "[result]", number, "[/result]")
            stage.say(back, NUMBERS[number])
    if rng.random() < stage.talks:
        stage.talk(begin, end)


TASKS: dict[str, Task] = {
    task.__name__: task
    for task in (
        wait_tone, wait_flash, count_tone, count_flash, count_motion, speak, cue, every, ask,
    )
}  # fmt: skip


def _follows(before: str, last: str) -> bool:
    """Whether an episode may hold both: what was counted before would have to be forgotten."""
    return not (before.startswith("count") and last.startswith("count"))


def _wait(stage: Stage, begin: int, end: int, what: str, happen: Callable[[int], None]) -> None:
    delay = int(stage.rng.integers(1, stage.delays + 1))
    stage.read(begin, "wait", what, delay)
    for tick in _spread(stage, begin + 1, end - delay, 2, 12):
        if stage.rng.random() < 0.65:
            happen(tick)
            stage.say(tick + delay, NOW)
        else:
            _distract(stage, tick, what)
    if stage.rng.random() < stage.talks:
        stage.talk(begin, end)


def _count(stage: Stage, begin: int, end: int, what: str, happen: Callable[[int], None]) -> None:
    stage.read(begin, "count", what)
    done, wanted = 0, _wanted(stage)
    longest = max(3, int(1.8 * (end - begin) / (wanted + 1)))
    for tick in _spread(stage, begin + 1, end, 2, longest):
        if done < wanted and stage.rng.random() < 0.8:
            done += 1
            happen(tick)
            stage.say(tick, NUMBERS[done])
        else:
            _distract(stage, tick, what)
    if stage.pace > 1:
        _fill(stage, begin + 1, end, what)
    stage.events.append(Event("count", end - 1, done))
    if stage.rng.random() < stage.talks:
        stage.talk(begin, end)


def _wanted(stage: Stage) -> int:
    """How many to count; where events are slow, as many as there is room for."""
    wanted = int(stage.rng.integers(1, MAX_COUNT + 1))
    return MAX_COUNT if stage.pace > 1 else wanted


def _fill(stage: Stage, begin: int, end: int, what: str) -> None:
    """Distractors in long gaps, in which nothing else happens."""
    tick = begin
    while tick < end:
        tick += int(stage.rng.integers(4, 16))
        if not stage.busy[tick - 1 : tick + 3].any() and tick < end:
            _distract(stage, tick, what)


def _distract(stage: Stage, tick: int, what: str) -> None:
    """Something that is not to be taken for `what`."""
    if stage.rng.random() < 0.5:
        stage.tone(tick, CUE_HZ if what != "tone" and stage.rng.random() < 0.5 else None)
    else:
        stage.flash(tick, other=what == "flash" or stage.rng.random() < 0.5)


def _sounds(stage: Stage, begin: int, end: int) -> None:
    """What is to be ignored: speech, tones."""
    if stage.rng.random() < stage.talks:
        stage.talk(begin, end)
    elif stage.rng.random() < 0.5:
        for tick in _spread(stage, begin + 1, end, 4, 12):
            stage.tone(tick, CUE_HZ if stage.rng.random() < 0.5 else None)


def _backchannels(stage: Stage, begin: int, end: int) -> None:
    for tick in _spread(stage, begin, end, 3, 9):
        seconds = stage.rng.uniform(0.1, 0.19)
        latest = 0.2 if stage.loose else 0.195 - seconds  # into its tick
        stage.speak_up(tick, seconds, stage.rng.uniform(0.0, latest))
        stage.events.append(Event("backchannel", tick))


def _spread(stage: Stage, begin: int, end: int, least: int, most: int) -> Iterator[int]:
    """Ticks in begin..end-1, `least` to `most` apart, or closer where the stage's pace is quick.
    Where it is slow they come in bursts, with long gaps between these."""
    rng, slow = stage.rng, stage.pace > 1
    most = least + max(1, round((most - least) * min(stage.pace, 1.0)))
    tick = begin + int(rng.integers(12 if slow else most))
    while tick < end:
        yield tick
        tick += _slow_gap(stage, least) if slow else int(rng.integers(least, most + 1))


def _slow_gap(stage: Stage, least: int) -> int:
    """Ticks: a few in a burst, many between two of them."""
    if stage.rng.random() < 0.65:
        return least + int(stage.rng.integers(3))
    return int(stage.rng.integers(GAP, int(GAP * stage.pace)))
