"""The page table over a day, its bounds, and what it refuses by value."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_oracle import ANCHOR, AUDIO, CLASSES, REPLY, TEXT, VIDEO, rows_buffer

from tml_kernels._core import BudgetExceeded, LayerGroup, PageClass, PageTable, Session

TICKS_PER_HOUR = 5 * 3600
BUDGETS: dict[PageClass, int] = dict(zip(CLASSES, (1, 4, 8, 6, 8), strict=True))
RUNS = st.lists(st.tuples(st.sampled_from(CLASSES), st.integers(0, 9)), min_size=1, max_size=6)


def small_table(**other: int) -> PageTable:
    groups = [
        LayerGroup(pages=64, columns=40, page_rows=8),
        LayerGroup(pages=24, columns=12, page_rows=8, window=32),
    ]
    return PageTable(groups, **({"max_sessions": 2, "lag": 2} | other))


def one_group(pages: int = 2, **other: int) -> PageTable:
    return PageTable([LayerGroup(pages=pages, columns=1, **other)], max_sessions=1, lag=0)


def transact(table: PageTable, session: Session, *runs: tuple[PageClass, int]) -> None:
    rows_G_T = rows_buffer(2, max((tokens for _, tokens in runs), default=0))
    table.reserve(session, runs)
    for page_class, tokens in runs:
        table.append(session, page_class, tokens, rows_G_T)
    table.commit(session)


def pages_of(table: PageTable, session: Session, page_class: PageClass) -> list[list[int]]:
    """Positions of the class's pages without a window, from the oldest on."""
    pages = zip(table.pages(session, 0), table.positions(session, 0), strict=True)
    return sorted(rows for page, rows in pages if page.page_class == page_class)


def test_a_day_of_audio_and_video() -> None:
    """Pages, list lengths and work per tick are the same in every hour, and pages get full."""
    table = small_table()
    session = table.open(BUDGETS)
    transact(table, session, (ANCHOR, 3))
    deltas = array("q", bytes(8 * 4 * 2 * (40 + 12)))
    rows_G_T = rows_buffer(2, 7)
    runs = [(VIDEO, 3), (AUDIO, 2), (REPLY, 2)]
    hours, work, most_deltas = [], table.work, 0
    for hour in range(24):
        most_work = 0
        for tick in range(hour * TICKS_PER_HOUR, (hour + 1) * TICKS_PER_HOUR):
            table.tick(tick + 1)
            table.reserve(session, runs)
            column = 0
            for page_class, tokens in runs:
                table.append(session, page_class, tokens, rows_G_T, column)
                column += tokens
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
            if tick % 50 == 0:
                for page_class in (VIDEO, AUDIO, REPLY):
                    used = [len(page) for page in pages_of(table, session, page_class)]
                    assert set(used[:-1]) <= {8}
        held = [group.held for group in table.stats()]
        hours.append((held, table.session_stats(session).pages[0], most_work))
    assert table.session_stats(session).length == 3 + 24 * TICKS_PER_HOUR * 49 // 50 * 7
    assert hours[1:] == hours[:1] * 23
    assert hours[0][1] == [1, 0, 8, 6, 8]
    # A class without a window has at most its open page, a new one, and a third that is evicted,
    # whose hole the list's last entry fills; the window has one page in and one out.
    assert most_deltas <= 3 * 4 + 4
    assert hours[0][2] <= 48
    assert table.pages(session, 0)[0].page_class == ANCHOR


def test_positions_far_on() -> None:
    table = PageTable([LayerGroup(pages=3, columns=2, window=64)], max_sessions=1, lag=0)
    session = table.open(BUDGETS)
    rows_G_T = rows_buffer(1, 64)
    for n in range(1, 2000):
        table.tick(n)
        table.reserve(session, [(TEXT, 64)])
        table.append(session, TEXT, 64, rows_G_T)
        table.commit(session)
    assert [page.base for page in table.pages(session, 0)] == [64 * 1998]


def test_pages_of_interleaved_classes_get_full() -> None:
    groups = [LayerGroup(pages=40, columns=39), LayerGroup(pages=40, columns=39, window=2048)]
    assert [group.span for group in groups] == [2048, None]
    table = PageTable(groups, max_sessions=1, lag=1)
    session = table.open(dict.fromkeys(CLASSES, 20))
    transact(table, session, (TEXT, 70))
    totals = {TEXT: 70, AUDIO: 0, REPLY: 0, VIDEO: 0}
    for n in range(1, 101):
        table.tick(n)
        tick = {AUDIO: 4, REPLY: 4} if n % 2 else {VIDEO: 3, AUDIO: 4}
        transact(table, session, *tick.items())
        totals = {c: total + tick.get(c, 0) for c, total in totals.items()}
    for page_class, total in totals.items():
        pages = pages_of(table, session, page_class)
        assert len(pages) == -(-total // 64)
        assert sum(map(len, pages)) == total
    assert len(table.pages(session, 1)) == -(-sum(totals.values()) // 64)


def test_rows_of_an_append() -> None:
    """The header's example, and what its rewind leaves."""
    groups = [
        LayerGroup(pages=9, columns=8, page_rows=4, span=8),
        LayerGroup(pages=9, columns=8, page_rows=4, window=512),
    ]
    table = PageTable(groups, max_sessions=1, lag=1)
    session = table.open(BUDGETS)
    rows_G_T = rows_buffer(2, 12)
    for n in range(4):
        table.reserve(session, [(AUDIO, 2), (REPLY, 1)])
        assert table.append(session, AUDIO, 2, rows_G_T, 3 * n) == 3 * n
        assert table.append(session, REPLY, 1, rows_G_T, column=3 * n + 2) == 3 * n + 2
        table.commit(session)
    # Of the pages 2 and 1, which the first tick reserves, audio has the first; 3 is its second.
    assert rows_G_T.tolist() == [
        [8, 9, 4, 10, 11, 5, 12, 13, 6, 14, 15, 16],
        [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    ]
    assert pages_of(table, session, AUDIO) == [[0, 1, 3, 4], [6, 7, 9, 10]]
    assert pages_of(table, session, REPLY) == [[2, 5, 8], [11]]
    assert table.positions(session, 1) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert table.rewind(session, 8) == []
    assert pages_of(table, session, AUDIO) == [[0, 1, 3, 4], [6, 7]]
    assert pages_of(table, session, REPLY) == [[2, 5]]
    transact(table, session, (REPLY, 2), (AUDIO, 1))
    assert pages_of(table, session, REPLY) == [[2, 5, 8, 9]]
    assert pages_of(table, session, AUDIO) == [[0, 1, 3, 4], [6, 7, 10]]


def test_a_page_ends_with_its_span() -> None:
    groups = [LayerGroup(pages=9, columns=8, page_rows=8, span=10)]
    table = PageTable([*groups, LayerGroup(pages=9, columns=8, window=64)], max_sessions=2, lag=0)
    session = table.open(BUDGETS)
    transact(table, session, (AUDIO, 1), (TEXT, 8), (AUDIO, 4), (TEXT, 1))
    # 9 is the last position within base + span; a page of text is full before its span ends.
    assert pages_of(table, session, AUDIO) == [[0, 9], [10, 11, 12]]
    assert pages_of(table, session, TEXT) == [[1, 2, 3, 4, 5, 6, 7, 8], [13]]
    # The first page is open again once the second is gone, and a fork has it for its own.
    child, _ = table.fork(session)
    shared = {page.page for page in table.pages(session, 0)}
    copies = [copy for copy in table.rewind(child, 9) if copy.group == 0]
    assert [copy.rows for copy in copies] == [1]
    assert {copy.source for copy in copies} <= shared
    transact(table, child, (AUDIO, 1))
    assert pages_of(table, child, AUDIO) == [[0, 9]]
    assert pages_of(table, session, AUDIO) == [[0, 9], [10, 11, 12]]
    table.check_invariants()


@settings(max_examples=150, deadline=None)
@given(
    start=RUNS,
    runs=st.lists(st.tuples(st.sampled_from(CLASSES), st.integers(0, 9), st.integers(0, 9))),
    span=st.integers(4, 12),
)
def test_fewer_tokens_never_take_more_pages(
    start: list[tuple[PageClass, int]], runs: list[tuple[PageClass, int, int]], span: int
) -> None:
    groups = [
        LayerGroup(pages=200, columns=199, page_rows=4, span=span),
        LayerGroup(pages=200, columns=199, page_rows=4, window=9),
    ]
    table = PageTable(groups, max_sessions=1, lag=0)
    session = table.open(dict.fromkeys(CLASSES, 199))
    transact(table, session, *start)
    most = table.reserve(session, [(page_class, tokens) for page_class, tokens, _ in runs])
    table.roll_back(session)
    fewer = table.reserve(session, [(c, min(tokens, left)) for c, tokens, left in runs])
    assert all(few <= full for few, full in zip(fewer, most, strict=True))
    assert [group.reserved for group in table.stats()] == fewer


def test_freed_at_once_without_a_lag() -> None:
    table = small_table(lag=0)
    for _ in range(20):
        session = table.open(BUDGETS)
        transact(table, session, (TEXT, 32))
        assert table.stats()[0].free == 63 - 4
        assert table.roll(session, 0, 3) == 3
        assert table.stats()[0].free == 63 - 1
        table.close(session)
        assert [(group.free, group.waiting) for group in table.stats()] == [(63, 0), (23, 0)]


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
        (lambda t, s: LayerGroup(pages=2, columns=1, window=9, span=64), "span=64 window=9"),
        (lambda t, s: one_group(span=63), "span=63 page_rows=64"),
        (lambda t, s: one_group(page_rows=4096), "span=2048 page_rows=4096"),
        (lambda t, s: one_group(span=2**31), "span=2147483648"),
        (lambda t, s: PageTable([], max_sessions=1, lag=1), "groups=0"),
        (lambda t, s: small_table(max_sessions=0), "max_sessions=0"),
        (lambda t, s: small_table(lag=-1), "lag=-1"),
        (lambda t, s: one_group(pages=1), "pages=1"),
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
        (lambda t, s: t.positions(s, 2), "group=2"),
        (lambda t, s: t.first_key(2), "group=2"),
        (lambda t, s: t.tick(0), "n=0 last=0"),
        (lambda t, s: t.mark((1,)), "session: expected"),
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
        (array("i", [0] * 8), "expected int64, got i"),
        (array("q", [0] * 7), "size=7 num_deltas=2"),
        (memoryview(array("q", [0] * 16))[::2], "not contiguous"),
    ],
)
def test_bad_delta_buffer(out: object, words: str) -> None:
    table = small_table()
    session = table.open(BUDGETS)
    transact(table, session, (TEXT, 1))
    with pytest.raises(ValueError, match=words):
        table.take_deltas(out)  # pyright: ignore[reportArgumentType]
    assert table.num_deltas == 2


@pytest.mark.parametrize(
    ("rows", "column", "words"),
    [
        (memoryview(array("q", [0] * 8)), 0, "got ndim=1"),
        (memoryview(bytearray(16)).cast("i", (2, 2)), 0, "expected int64, got i"),
        (rows_buffer(4, 2)[::2], 0, "not contiguous"),
        (rows_buffer(3, 2), 0, "groups=3, not 2"),
        (rows_buffer(2, 1), 0, "tokens=2 column=0 rows: T=1"),
        (rows_buffer(2, 4), 3, "tokens=2 column=3 rows: T=4"),
        (rows_buffer(2, 4), 5, "column=5 rows: T=4"),
        (rows_buffer(2, 4), -1, "column=-1"),
    ],
)
def test_bad_rows_buffer(rows: memoryview, column: int, words: str) -> None:
    table = small_table()
    session = table.open(BUDGETS)
    table.reserve(session, [(TEXT, 2)])
    before = rows.tobytes()
    with pytest.raises(ValueError, match=words):
        table.append(session, TEXT, 2, rows, column)
    assert rows.tobytes() == before
    assert table.session_stats(session).length == 0
    with pytest.raises(BufferError):
        table.append(session, TEXT, 2, rows_buffer(2, 2).toreadonly())
    assert table.append(session, TEXT, 2, rows_buffer(2, 2)) == 0


def test_positions_go_to_the_rows_of_all_groups_without_a_window() -> None:
    groups = [
        LayerGroup(pages=5, columns=4, page_rows=8),
        LayerGroup(pages=6, columns=4, page_rows=8, window=16),
        LayerGroup(pages=7, columns=4, page_rows=8),
    ]
    table = PageTable(groups, max_sessions=1, lag=0)
    assert table.num_placed == 2
    rows = memoryview(array("q", [9, -1, 3, 1, 2, 4, 0, 55, -1])).cast("b").cast("q", (3, 3))
    out, positions = array("q", [77] * 6), array("q", [77] * 6)
    table.place(rows.toreadonly(), array("q", [100, 101, 2**40]), out, positions)
    assert out.tolist() == [9, -1, 3, 40, 95, -1]
    assert positions.tolist() == [100, 101, 2**40] * 2


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((1, 2, 4, 4), "groups=1, not 2"),
        ((2, 3, 4, 4), "positions: T=3 rows: T=4"),
        ((2, 4, 3, 4), "placed_rows: X=3 placed_positions: X=4, not 4"),
        ((2, 4, 4, 8), "placed_rows: X=4 placed_positions: X=8, not 4"),
    ],
)
def test_bad_sizes_of_what_is_placed(sizes: tuple[int, ...], words: str) -> None:
    groups, *others = sizes
    positions, placed_rows, placed_positions = (array("q", [77] * n) for n in others)
    with pytest.raises(ValueError, match=words):
        small_table().place(rows_buffer(groups, 4), positions, placed_rows, placed_positions)
    assert {*placed_rows, *placed_positions} == {77}


def test_deltas_of_a_page_that_grows_and_shrinks() -> None:
    groups = [
        LayerGroup(pages=9, columns=5, page_rows=8),
        LayerGroup(pages=9, columns=3, page_rows=8, window=64),
    ]
    table = PageTable(groups, max_sessions=2, lag=1)
    assert (table.num_keys, table.first_key(0), table.first_key(1)) == (16, 0, 10)
    deltas = array("q", bytes(8 * 4 * 16))

    def changes() -> list[tuple[int, ...]]:
        deltas[:] = array("q", [77] * len(deltas))
        count = table.take_deltas(deltas)
        rows = [tuple(deltas[4 * i : 4 * i + 4]) for i in range(16)]
        assert rows[count:] == [(-1, 0, 0, 0)] * (16 - count)
        return rows[:count]

    table.open(BUDGETS)
    session = table.open(BUDGETS)
    transact(table, session, (TEXT, 5), (AUDIO, 1))
    assert changes() == [(5, 2, 0, 5), (13, 1, 0, 8), (6, 1, 5, 1)]
    transact(table, session, (TEXT, 1))
    assert changes() == [(5, 2, 0, 6)]
    table.rewind(session, 5)
    assert sorted(changes()) == [(5, 2, 0, 5), (6, -1, 0, 0)]
    table.suspend(session)
    assert sorted(changes()) == [(5, -1, 0, 0), (13, -1, 0, 0)]
