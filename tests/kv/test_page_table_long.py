"""The page table over a day, its bounds, and what it refuses by value."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest
from page_oracle import ANCHOR, AUDIO, CLASSES, REPLY, TEXT, VIDEO

from tml_kernels._core import BudgetExceeded, LayerGroup, PageClass, PageTable

TICKS_PER_HOUR = 5 * 3600
BUDGETS: dict[PageClass, int] = dict(zip(CLASSES, (1, 4, 8, 6, 8), strict=True))


def small_table(**other: int) -> PageTable:
    groups = [
        LayerGroup(pages=64, columns=40, page_rows=8),
        LayerGroup(pages=24, columns=12, page_rows=8, window=32),
    ]
    return PageTable(groups, **({"max_sessions": 2, "lag": 2} | other))


def test_a_day_of_audio_and_video() -> None:
    """Pages, list lengths and work per tick are the same in every hour."""
    table = small_table()
    session = table.open(BUDGETS)
    table.reserve(session, [(ANCHOR, 3)])
    table.append(session, ANCHOR, 3)
    table.commit(session)
    deltas = array("q", bytes(8 * 6 * 2 * (40 + 12)))
    runs = [(VIDEO, 3), (AUDIO, 2), (REPLY, 2)]
    hours, work, most_deltas = [], table.work, 0
    for hour in range(24):
        most_work = 0
        for tick in range(hour * TICKS_PER_HOUR, (hour + 1) * TICKS_PER_HOUR):
            table.tick(tick + 1)
            table.reserve(session, runs)
            for page_class, tokens in runs:
                table.append(session, page_class, tokens)
            if tick % 50 == 49:
                table.roll_back(session)
            else:
                table.commit(session)
            changed = table.take_deltas(deltas)
            work, before = table.work, work
            if tick > 100:
                most_work = max(most_work, work - before)
                most_deltas = max(most_deltas, changed)
            if tick % 500 == 0:
                table.check_invariants()
        held = [group.held for group in table.stats()]
        hours.append((held, table.session_stats(session).pages[0], most_work))
    assert table.session_stats(session).length == 3 + 24 * TICKS_PER_HOUR * 49 // 50 * 7
    assert hours[1:] == hours[:1] * 23
    assert hours[0][1] == [1, 0, 8, 6, 8]
    # A tick has three new pages without a window, at most one with; each also pushes one out.
    assert most_deltas <= 16
    assert hours[0][2] <= 48
    assert table.pages(session, 0)[0].page_class == ANCHOR


def test_positions_far_on() -> None:
    table = PageTable([LayerGroup(pages=3, columns=2, window=64)], max_sessions=1, lag=0)
    session = table.open(BUDGETS)
    for n in range(1, 2000):
        table.tick(n)
        table.reserve(session, [(TEXT, 64)])
        table.append(session, TEXT, 64)
        table.commit(session)
    assert [page.base for page in table.pages(session, 0)] == [64 * 1998]


def test_classes_do_not_mix_without_a_window() -> None:
    table = PageTable(
        [LayerGroup(pages=9, columns=8), LayerGroup(pages=9, columns=8, window=512)],
        max_sessions=1,
        lag=1,
    )
    session = table.open(BUDGETS)
    assert table.reserve(session, [(TEXT, 70), (AUDIO, 3)]) == [3, 2]
    table.append(session, TEXT, 70)
    position, spans = table.append(session, AUDIO, 3)
    assert position == 70
    assert [(span.group, span.row % 64, span.count) for span in spans] == [(0, 0, 3), (1, 6, 3)]
    table.commit(session)
    assert [(p.base, p.used) for p in table.pages(session, 0)] == [(0, 64), (64, 6), (70, 3)]
    assert [(p.base, p.used) for p in table.pages(session, 1)] == [(0, 64), (64, 9)]


def test_victim() -> None:
    table = small_table(max_sessions=4)
    low, idle, busy, high = (table.open(BUDGETS, priority=p) for p in (0, 1, 1, 2))
    table.tick(1)
    table.reserve(busy, [])
    table.commit(busy)
    assert table.victim(high) == low
    assert table.victim(low) == low
    table.suspend(low)
    assert table.victim(busy) == idle
    assert table.victim(idle) == busy
    table.close(idle)
    assert table.victim(high) == busy


def test_budget_words() -> None:
    table = small_table()
    session = table.open(BUDGETS)
    with pytest.raises(BudgetExceeded, match=r"anchor pages: needed=2 limit=1"):
        table.reserve(session, [(ANCHOR, 9)])
    with pytest.raises(BudgetExceeded, match=r"columns pages: needed=41 limit=40"):
        table.reserve(session, [(TEXT, 321)])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t, s: LayerGroup(pages=2, columns=1, window=0), "window=0"),
        (lambda t, s: PageTable([], max_sessions=1, lag=1), "groups=0"),
        (lambda t, s: small_table(max_sessions=0), "max_sessions=0"),
        (lambda t, s: small_table(lag=-1), "lag=-1"),
        (
            lambda t, s: PageTable([LayerGroup(pages=1, columns=1)], max_sessions=1, lag=0),
            "pages=1",
        ),
        (lambda t, s: t.open({TEXT: 1}), "expected one of each class, got 1"),
        (lambda t, s: t.open(BUDGETS | {VIDEO: 0}), "video=0"),
        (lambda t, s: t.reserve(s, [(AUDIO, -2)]), "audio=-2"),
        (lambda t, s: t.reserve(s, [(PageClass(9), 1)]), "class=9"),
        (lambda t, s: t.rewind(s, -1), "position=-1"),
        (lambda t, s: t.rewind(s, 1), "position=1 length=0"),
        (lambda t, s: t.roll(s, 1, 1), "group=1 rolls by its window"),
        (lambda t, s: t.roll(s, 2, 1), "group=2"),
        (lambda t, s: t.roll(s, 0, -1), "pages=-1"),
        (lambda t, s: t.pages(s, -1), "group=-1"),
        (lambda t, s: t.tick(0), "n=0 last=0"),
        (lambda t, s: t.mark((1,)), "session="),
    ],
)
def test_bad_value(call: Callable, words: str) -> None:
    table = small_table()
    session = table.open(BUDGETS)
    with pytest.raises(ValueError, match=words):
        call(table, session)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (array("i", [0] * 12), "expected int64, got i"),
        (array("q", [0] * 11), "size=11 num_deltas=2"),
        (memoryview(array("q", [0] * 24))[::2], "not contiguous"),
    ],
)
def test_bad_delta_buffer(out: object, words: str) -> None:
    table = small_table()
    session = table.open(BUDGETS)
    table.reserve(session, [(TEXT, 1)])
    table.append(session, TEXT, 1)
    with pytest.raises(ValueError, match=words):
        table.take_deltas(out)  # pyright: ignore[reportArgumentType]
    assert table.num_deltas == 2


def test_a_closed_page_opens_again_on_the_device() -> None:
    table = PageTable([LayerGroup(pages=9, columns=8, page_rows=8)], max_sessions=1, lag=1)
    session = table.open(BUDGETS)
    table.reserve(session, [(TEXT, 5), (AUDIO, 1)])
    table.append(session, TEXT, 5)
    table.append(session, AUDIO, 1)
    table.commit(session)
    deltas = array("q", bytes(8 * 12))
    assert table.take_deltas(deltas) == 2
    assert list(deltas) == [0, 0, 0, 2, 0, 5, 0, 0, 1, 1, 5, 8]
    table.rewind(session, 5)
    assert table.take_deltas(deltas) == 2
    assert list(deltas) == [0, 0, 1, -1, 0, 0, 0, 0, 0, 2, 0, 8]
