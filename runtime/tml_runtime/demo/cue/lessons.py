"""What episodes are drawn: tasks by what is left to learn of them, and harder as a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from .stage import MAX_DELAY
from .tasks import TASKS

LEAST = 0.1  # is added to each task's loss: what has been learnt comes up too


@dataclass(frozen=True)
class Lesson:
    """How episodes are drawn from `begin` on, a share of a run's steps.

    garble: least and most of the share of speech levels fed back that are off, and by how much;
    slips: the most of either share; for both see `make_batch`. varied: of the recordings, which
    are few. paces, talks, delays: see `make_episode`. lengths: the shares of batches of five short
    episodes, of three, of two, of a single long one and of one of a minute. counting: the share of
    episodes that count; None: as their losses are. word: what a word that is due weighs, with
    silence 1; choice: what it weighs beside that, which word it is, given that one is due.
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
    replace(FIRST, begin=0.08, delays=4),
    replace(FIRST, begin=0.14, delays=MAX_DELAY),
    # what is said can be read now, so it is fed back as the speech head says it
    Lesson(0.2, varied=False),
    # other films look different, and other people sound different
    Lesson(0.35),
    # long after a word it has to be remembered; few words are due then, so there is more of it, and
    # more time to take speech for a tone
    Lesson(
        0.6,
        paces=(0.2, 1.0, 2.5, 4.0, 7.0),
        talks=0.7,
        lengths=(0.1, 0.05, 0.35, 0.35, 0.15),
        counting=0.6,
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
