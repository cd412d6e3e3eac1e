"""The verbs for many sessions at once: each is as if called for one after the other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from small_cache import BUDGETS, make_cache

from tml_kernels._core import ReservationExceeded, UnknownSession
from tml_kernels.kv_cache import CLASSES, PageClass, RollingKVCache, Session

RUN_CLASSES = (PageClass.TEXT, PageClass.AUDIO, PageClass.REPLY)


def opened() -> tuple[RollingKVCache, list[Session]]:
    cache = make_cache()
    return cache, [cache.open(BUDGETS) for _ in range(3)]


def one_by_one(
    cache: RollingKVCache,
    sessions: list[Session],
    tokens_S_R: np.ndarray,
    column_S_R: np.ndarray,
    rows: np.ndarray,
    position_T: np.ndarray,
) -> None:
    for session, tokens_R, column_R in zip(sessions, tokens_S_R, column_S_R, strict=True):
        runs = zip(RUN_CLASSES, tokens_R.tolist(), column_R.tolist(), strict=True)
        for page_class, tokens, column in runs:
            first = cache.append(session, page_class, tokens, rows, column)
            position_T[column : column + tokens] = np.arange(first, first + tokens)


def test_many_at_once_are_as_one_after_the_other() -> None:
    rng = np.random.default_rng(3)
    (one, one_sessions), (cache, sessions) = opened(), opened()
    for tick in range(60):
        chosen = rng.permutation(3)[: rng.integers(0, 4)].tolist()
        mine, others = [sessions[s] for s in chosen], [one_sessions[s] for s in chosen]
        tokens_S_R = rng.integers(0, 4, (len(chosen), 3))
        column_S_R = (np.cumsum(tokens_S_R) - tokens_S_R.ravel()).reshape(-1, 3)
        width = int(tokens_S_R.sum())
        made = [(np.full((2, width), -1), np.full(width, -1)) for _ in range(2)]
        assert cache.reserve_all(mine, RUN_CLASSES, tokens_S_R) == len(chosen)
        for session, tokens in zip(others, tokens_S_R.tolist(), strict=True):
            one.reserve(session, list(zip(RUN_CLASSES, tokens, strict=True)))
        cache.append_all(mine, RUN_CLASSES, tokens_S_R, column_S_R, *made[0])
        one_by_one(one, others, tokens_S_R, column_S_R, *made[1])
        for batch, single in zip(*made, strict=True):
            np.testing.assert_array_equal(batch, single)
        if tick % 7 == 3:
            for session, other in zip(mine, others, strict=True):
                cache.roll_back(session)
                one.roll_back(other)
        else:
            cache.commit_all(mine)
            for other in others:
                one.commit(other)
        assert cache.tick() == one.tick()
        for g in range(2):
            assert cache.dropped(g) == one.dropped(g)
            held = np.sum([cache.session_stats(s).pages[g] for s in sessions], axis=0)
            assert cache.held(sessions, g) == held.tolist()
            for session, other in zip(sessions, one_sessions, strict=True):
                assert cache.pages(session, g) == one.pages(other, g)
    assert sum(cache.dropped(0)) > 10
    assert not any(cache.dropped(1))  # pages that leave a window are not lost
    cache._table.check_invariants()


def test_reserving_stops_where_one_is_refused() -> None:
    cache, sessions = opened()
    tokens_S_R = np.ones((3, 3), np.int64)
    cache.suspend(sessions[1])
    assert cache.reserve_all(sessions, RUN_CLASSES, tokens_S_R) == 1
    cache.roll_back(sessions[0])
    cache.resume(sessions[1])
    cache.close(sessions[2])
    assert cache.reserve_all(sessions, RUN_CLASSES, tokens_S_R) == 2
    cache.commit_all(sessions[:2])
    assert cache.reserve_all(sessions, RUN_CLASSES, tokens_S_R) == 0  # they have had this tick
    assert cache.reserve_all([], RUN_CLASSES, tokens_S_R[:0]) == 0


def test_what_was_not_reserved_is_refused_and_can_be_rolled_back() -> None:
    cache, sessions = opened()
    assert cache.reserve_all(sessions, RUN_CLASSES, np.ones((3, 3), np.int64)) == 3
    tokens_S_R = np.array([[1, 1, 1], [1, 9, 1], [1, 1, 1]])
    rows, position_T = np.full((2, 9), -1), np.full(9, -1)
    with pytest.raises(ReservationExceeded):
        cache.append_all(
            sessions, RUN_CLASSES, tokens_S_R, np.zeros((3, 3), np.int64), rows, position_T
        )
    for session in sessions:
        cache.roll_back(session)
    assert [cache.length(session) for session in sessions] == [0, 0, 0]
    cache._table.check_invariants()


def test_committing_is_for_all_or_none() -> None:
    cache, sessions = opened()
    assert cache.reserve_all(sessions[:2], RUN_CLASSES, np.ones((2, 3), np.int64)) == 2
    with pytest.raises(RuntimeError, match="commit: slot=2 is at rest"):
        cache.commit_all(sessions)
    assert all(cache.session_stats(session).in_transaction for session in sessions[:2])


ONES, ROWS, POSITIONS = np.ones((3, 3), np.int64), np.zeros((2, 9), np.int64), np.zeros(9, np.int64)
BAD = {
    "tokens of another dtype": (
        lambda t, s: t.reserve_all(s, RUN_CLASSES, ONES.astype(np.int32)), "tokens: expected int64"
    ),
    "tokens of fewer sessions": (lambda t, s: t.reserve_all(s, RUN_CLASSES, ONES[:2]), "S=2"),
    "tokens of fewer runs": (lambda t, s: t.reserve_all(s, CLASSES, ONES), "R=3 classes=5"),
    "a strided array": (lambda t, s: t.reserve_all(s, RUN_CLASSES, ONES.T), "not contiguous"),
    "no sessions": (lambda t, s: t.reserve_all([(1,)] * 3, RUN_CLASSES, ONES), "session: expected"),
    "rows of one group": (
        lambda t, s: t.append_all(s, RUN_CLASSES, ONES, ONES, ROWS[:1], POSITIONS), "groups=1"
    ),
    "positions of fewer tokens": (
        lambda t, s: t.append_all(s, RUN_CLASSES, ONES, ONES, ROWS, POSITIONS[:8]), "T=8 rows: T=9"
    ),
    "a column beyond": (
        lambda t, s: t.append_all(s, RUN_CLASSES, ONES, 9 * ONES, ROWS, POSITIONS), "column=9"
    ),
    "a column before": (
        lambda t, s: t.append_all(s, RUN_CLASSES, ONES, -ONES, ROWS, POSITIONS), "column=-1"
    ),
    "a group that is not there": (lambda t, s: t.held(s, 2), "group=2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays_are_refused(name: str) -> None:
    cache, sessions = opened()
    call: Callable = BAD[name][0]
    with pytest.raises(ValueError, match=BAD[name][1]):
        call(cache._table, sessions)
    assert cache.work == 0
    with pytest.raises(UnknownSession):
        cache.held([*sessions, Session(0, 99)], 0)
