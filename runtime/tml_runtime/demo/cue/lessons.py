"""What episodes are drawn: tasks by what is left to learn of them, and harder as a run goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .speech import Footage, Speech
from .stage import MAX_DELAY, Episode
from .tasks import TASKS, make_episode

LEAST = 0.1  # is added to each task's loss: what has been learnt comes up too


@dataclass(frozen=True)
class Lesson:
    """How episodes are drawn from `begin` on, a share of a run's steps.

    garble: least and most of the share of speech levels fed back that are off, and by how much;
    slips: the most of either share; for both see `make_batch`. varied: of the recordings, which
    are few. paces, talks, delays: see `make_episode`. lengths: how likely a step has three short
    episodes a share, two, one of 14 s, one of 30 s and one of a minute. counting: the share of
    episodes that count; None: as their losses are. loose: the share of episodes whose cues keep to
    no tick's begin, see `make_episode`. word: what a word that is due weighs, with silence 1;
    choice: what it weighs beside that, which word it is, given that one is due.
    """

    begin: float
    garble: tuple[float, float, int] = (0.0, 0.75, 4)
    slips: tuple[float, float] = (0.4, 0.04)
    varied: bool = True
    paces: tuple[float, ...] = (0.05, 0.2, 1.0)
    talks: float = 0.5
    delays: int = MAX_DELAY
    lengths: tuple[float, ...] = (0.45, 0.3, 0.15, 0.1, 0.0)
    counting: float | None = None
    loose: float = 0.0
    word: float = 3.0
    choice: float = 0.0

    def draw_garble(self, rng: np.random.Generator) -> tuple[float, int]:
        least, most, reach = self.garble
        return (float(rng.uniform(least, most)) if least < most else most), reach

    def draw_slips(self, rng: np.random.Generator) -> tuple[float, float]:
        """None in half of all batches."""
        share = max(0.0, rng.uniform(-1, 1))
        return share * self.slips[0], share * self.slips[1]

    def draw_paces(self, count: int, rng: np.random.Generator) -> list[float]:
        return [float(pace) for pace in rng.choice(self.paces, count)]


FIRST = Lesson(
    0.0, garble=(0.03, 0.03, 1), slips=(0.0, 0.0), varied=False, paces=(0.05, 0.2), delays=2
)
LESSONS = (
    # events lie close together, so that a tick has much to learn from, and waits are short: who has
    # learnt to look back a tick or two soon looks further
    FIRST,
    replace(FIRST, begin=0.1, delays=4),
    replace(FIRST, begin=0.17, delays=MAX_DELAY),
    # what is said can be read now, so it is fed back as the speech head says it; lines
    # bring cues between ticks, and lose some of what is heard
    Lesson(0.25, varied=False, loose=0.4),
    # other films look different, and other people sound different
    Lesson(0.43, loose=0.4),
    # long after a word it has to be remembered; few words are due then, so there is more of it, and
    # more time to take speech for a tone
    Lesson(
        0.74,
        paces=(0.2, 1.0, 2.5, 4.0, 7.0),
        talks=0.7,
        lengths=(0.1, 0.05, 0.3, 0.35, 0.2),
        counting=0.6,
        loose=0.08,
        word=2.0,
        choice=9.0,
    ),
)


def lesson_at(done: float) -> Lesson:
    """done: the share of all steps that are."""
    return next(lesson for lesson in reversed(LESSONS) if lesson.begin <= done)


def draw_tasks(
    losses: Mapping[str, float],
    count: int,
    rng: np.random.Generator,
    counting: float | None = None,
) -> list[str]:
    """A task comes up by the square of its loss. losses: a running mean for every task. counting:
    see `Lesson`."""
    often = (LEAST + np.array([losses[task] for task in TASKS])) ** 2
    often /= often.sum()
    if counting is not None:
        counts = np.array([task.startswith("count") for task in TASKS])
        for those, share in ((counts, counting), (~counts, 1 - counting)):
            often[those] *= share / often[those].sum()
    return [str(name) for name in rng.choice(list(TASKS), count, p=often)]


def draw_episodes(
    key: Sequence[int],
    lesson: Lesson,
    losses: Mapping[str, float],
    speech: Speech,
    footage: Footage,
) -> list[Episode]:
    """Mixed tasks: three short episodes, two, or one that is longer, or as long as a minute. All
    shares of a step have as many, so that none waits long for another. key: run, step, share."""
    shape = np.random.default_rng([2, *key[:-1]]).choice(5, p=lesson.lengths)
    rng = np.random.default_rng([3, *key])
    if shape == 0:
        lengths, sections = [int(rng.integers(26, 35))] * 3, 1
    elif shape == 1:
        lengths, sections = [int(rng.integers(40, 51))] * 2, 1
    elif shape == 2:
        lengths, sections = [int(rng.integers(64, 81))], int(rng.integers(1, 3))
    elif shape == 3:
        lengths, sections = [int(rng.integers(120, 181))], int(rng.integers(1, 4))
    else:
        lengths, sections = [int(rng.integers(240, 311))], 1
    names = draw_tasks(losses, len(lengths), rng, lesson.counting)
    paces = lesson.draw_paces(len(lengths), rng)
    is_loose = rng.random(len(lengths)) < lesson.loose
    speech = replace(speech, varied=lesson.varied)
    footage = replace(footage, varied=lesson.varied)
    return [
        make_episode(
            names[n],
            num_ticks,
            np.random.SeedSequence([4, *key, n]),
            speech,
            footage,
            sections=sections,
            pace=paces[n],
            talks=lesson.talks,
            delays=lesson.delays,
            loose=bool(is_loose[n]),
        )
        for n, num_ticks in enumerate(lengths)
    ]
