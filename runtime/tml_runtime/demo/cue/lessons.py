"""What is made harder, and from which step on: the tasks first, then what is unlike them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .tasks import TASKS


@dataclass(frozen=True)
class Lesson:
    """How episodes are drawn from `first_step` on.

    garble: least and most of the share of speech levels fed back that are off, and by how much; see
    `make_batch`. often: how often a task is drawn, where it is not 1; without any, no two episodes
    of a step have the same task. varied: of the film, which is short. paces: see `make_episode`.
    """

    first_step: int
    garble: tuple[float, float, int] = (0.0, 0.75, 4)
    often: tuple[tuple[str, float], ...] = ()
    varied: bool = True
    paces: tuple[float, ...] = (1.0,)

    def draw_garble(self, rng: np.random.Generator) -> tuple[float, int]:
        least, most, reach = self.garble
        return (float(rng.uniform(least, most)) if least < most else most), reach

    def draw_tasks(self, count: int, rng: np.random.Generator) -> list[str]:
        if not self.often:
            return [str(name) for name in rng.permutation(list(TASKS))[:count]]
        often = np.array([dict(self.often).get(task, 1.0) for task in TASKS])
        return [str(name) for name in rng.choice(list(TASKS), count, p=often / often.sum())]

    def draw_paces(self, count: int, rng: np.random.Generator) -> list[float]:
        if len(self.paces) == 1:
            return [self.paces[0]] * count
        return [float(pace) for pace in rng.choice(self.paces, count)]


_WAITS = (("wait_tone", 3.0), ("wait_flash", 3.0), ("every", 3.0))
LESSONS = (
    Lesson(0, garble=(0.03, 0.03, 1), varied=False),
    # what is said can be read now, as the speech head says it
    Lesson(450, varied=False),
    # what takes long to learn comes more often
    Lesson(542, often=_WAITS, varied=False),
    # other films look different
    Lesson(626, often=_WAITS),
    # more to learn in a tick
    Lesson(877, often=(*_WAITS, ("ask", 2.0)), paces=(0.1, 0.3, 1.0)),
)


def lesson_at(step: int) -> Lesson:
    return next(lesson for lesson in reversed(LESSONS) if lesson.first_step <= step)
