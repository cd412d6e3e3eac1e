"""Sessions that are kept as plain values and made sessions again; and values that are not one."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_oracle import ANCHOR, AUDIO, CLASSES, REPLY, TEXT, VIDEO, rows_buffer

from tml_kernels._core import LayerGroup, OutOfSessions, PageTable, Session

BUDGETS = dict(zip(CLASSES, (1, 4, 8, 6, 8), strict=True))
GROUPS = [
    LayerGroup(pages=30, columns=12, page_rows=4, span=16),
    LayerGroup(pages=16, columns=8, page_rows=4, window=8, history=4),
]


def table_with_a_session() -> tuple[PageTable, Session]:
    """Pages of all classes, some without their row, one closed by its span, a window that rolled.

    The list is out of order by then: evicted pages have left holes.
    """
    table = PageTable(GROUPS, max_sessions=3, lag=0)
    session = table.open(BUDGETS | {VIDEO: 1}, priority=-3)
    runs = [(ANCHOR, 3), (TEXT, 1), *[(VIDEO, 3), (AUDIO, 2), (REPLY, 1)] * 2, (TEXT, 6)]
    for page_class, tokens in [*runs, (VIDEO, 5), (TEXT, 2), (AUDIO, 1)]:
        table.reserve(session, [(page_class, tokens)])
        table.append(session, page_class, tokens, rows_buffer(2, tokens))
        table.commit(session)
        if page_class == REPLY:
            table.mark(session)
    return table, session


def as_lists(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_image_of_a_session() -> None:
    table, session = table_with_a_session()
    image = table.image(session)
    assert (image.length, image.mark, image.priority) == (30, 16, -3)
    assert image.budgets == [1, 4, 8, 1, 8]
    assert image.rolled_to == [0, 16]
    refs = [ref for group in range(2) for ref in table.pages(session, group)]
    assert [(p.group, p.base, p.used, p.page_class) for p in image.pages] == [
        (ref.group, ref.base, ref.used, ref.page_class.value) for ref in refs
    ]
    bases = [page.base for page in image.pages if page.group == 0]
    assert bases != sorted(bases)
    assert [p.positions for p in image.pages if p.page_class == TEXT.value and p.group == 0] == [
        [3, 16, 17, 18],
        [19, 20, 21, 27],
        [28],
    ]
    table.suspend(session)
    assert table.image(session) == image


def test_restored_elsewhere() -> None:
    table, session = table_with_a_session()
    image = table.image(session)
    refs = [ref for group in range(2) for ref in table.pages(session, group)]
    other = PageTable(GROUPS, max_sessions=1, lag=2)
    restored = other.restore(as_lists(image))
    assert other.session_stats(restored).suspended
    assert other.num_deltas == 0
    assert other.image(restored) == image
    given_out = other.resume(restored)
    assert [ref._replace(page=0) for ref in given_out] == [ref._replace(page=0) for ref in refs]
    assert other.num_deltas == len(refs)
    assert other.image(restored) == image
    # Both go on in the same way.
    for page_table, handle in ((table, session), (other, restored)):
        assert page_table.reserve(handle, [(REPLY, 2), (TEXT, 1)]) == [1, 1]
        for page_class, tokens in ((REPLY, 2), (TEXT, 1)):
            page_table.append(handle, page_class, tokens, rows_buffer(2, 2))
        page_table.commit(handle)
        page_table.check_invariants()
    assert table.image(session) == other.image(restored)
    with pytest.raises(OutOfSessions):
        other.restore(image)


def test_image_in_a_transaction() -> None:
    table, session = table_with_a_session()
    table.reserve(session, [])
    with pytest.raises(RuntimeError, match="image: slot=0 is in a transaction"):
        table.image(session)


LENGTH, MARK, PRIORITY, BUDGET, ROLLED_TO, PAGES = range(6)
GROUP, BASE, USED, CLASS, POSITIONS = range(5)
ANCHORS, FULL_TEXT, LAST_TEXT = 0, 19, 28  # their bases


def page_at(image: list[Any], base: int, group: int = 0) -> list[Any]:
    return next(page for page in image[PAGES] if (page[GROUP], page[BASE]) == (group, base))


def put(*path: int, value: object) -> Any:
    def change(image: list[Any]) -> None:
        for step in path[:-1]:
            image = image[step]
        image[path[-1]] = value

    return change


def put_positions(base: int, *positions: int, group: int = 0) -> Any:
    def change(image: list[Any]) -> None:
        page = page_at(image, base, group)
        page[BASE], page[USED], page[POSITIONS] = positions[0], len(positions), [*positions]

    return change


def drop_page(base: int, group: int) -> Any:
    return lambda image: image[PAGES].remove(page_at(image, base, group))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(LENGTH, value=-1), "length=-1"),
        (put(LENGTH, value=2**62 + 1), "length=4611686018427387905"),
        (put(LENGTH, value=2**63), "length does not fit into int64"),
        (put(LENGTH, value=30.0), "length: expected an int, got float"),
        (put(LENGTH, value=True), "length: expected an int, got bool"),
        (put(LENGTH, value=29), "length=29"),
        (put(LENGTH, value=31), "a window without its keys: rolled_to=16 length=31"),
        (put(MARK, value=31), "mark=31 length=30"),
        (put(MARK, value=-1), "mark=-1"),
        (put(MARK, value="16"), "mark: expected an int, got str"),
        (put(PRIORITY, value=-(2**63) - 1), "priority does not fit into int64"),
        (put(BUDGET, 0, value=0), "anchor=0"),
        (put(BUDGET, 1, value=2), "text: pages=3 budget=2"),
        (put(BUDGET, value=[9] * 4), "budgets: expected 5 values, got 4"),
        (put(ROLLED_TO, value=[0]), "rolled_to: groups=1, not 2"),
        (put(ROLLED_TO, 0, value=1), "group=0: rolled_to=1"),
        (put(ROLLED_TO, 1, value=12), "rolled_to=12"),
        (put(ROLLED_TO, 1, value=-16), "rolled_to=-16"),
        (put(PAGES, value="pages"), "pages: expected a list or a tuple, got str"),
        (put(PAGES, 0, value=[0, 0, 1]), "page: expected 5 values, got 3"),
        (put(PAGES, 0, GROUP, value=2), "group=2"),
        (put(PAGES, 0, GROUP, value=-1), "group=-1"),
        (put(PAGES, 0, GROUP, value=1), "class=anchor in a window"),
        (put(PAGES, 0, USED, value=0), "used=0"),
        (put(PAGES, 0, USED, value=4), "used=4 positions=3"),
        (put(PAGES, 0, USED, value=5), "used=5 page_rows=4"),
        (put(PAGES, 0, BASE, value=-1), "base=-1"),
        (put(PAGES, 0, BASE, value=1), "base=1 position=0"),
        (put(PAGES, 0, BASE, value=2**63 - 1), "base=9223372036854775807 length=30"),
        (put(PAGES, 0, CLASS, value=5), "page_class=5"),
        (put(PAGES, 0, CLASS, value=-1), "page_class=-1"),
        (put(PAGES, 0, POSITIONS, value={}), "positions: expected a list or a tuple, got dict"),
        (put(PAGES, 0, POSITIONS, 1, value=None), "positions: expected an int, got NoneType"),
        (put_positions(ANCHORS, 0, 2, 1), "position=1 descends"),
        (put_positions(ANCHORS, 0, 1, 1), "position=1 descends"),
        (put_positions(ANCHORS, 0, 1, 3), "position=3 is there twice"),
        (put_positions(ANCHORS, 0, 1, 16), "position=16 leaves base=0"),
        (put_positions(LAST_TEXT, 28, 30), "position=30 length=30"),
        (put_positions(FULL_TEXT, 19, 20, 21), "page of text was closed early: base=19"),
        (put_positions(FULL_TEXT, 19, 20, 21, 28), "position=28 is there twice"),
        (put_positions(FULL_TEXT, 12, 20, 21, 27), "pages of text overlap: base=12"),
        (put_positions(LAST_TEXT, 19), "ages: base=19"),
        (put_positions(20, 20, 21, 23, 24, group=1), "position=23 in a window, base=20"),
        (put_positions(20, 20, 21, 22, group=1), "a window|closed early"),
        (drop_page(20, group=1), "a window without its keys"),
        (drop_page(16, group=1), "a window without its keys"),
        (drop_page(28, group=1), "a window without its keys"),
        (lambda image: image.append(0), "image: expected 6 values, got 7"),
        (lambda image: image[PAGES].reverse(), "group=0 after 1"),
        (lambda image: image[PAGES].extend(image[PAGES][-1:] * 8), "columns=8"),
    ],
)
def test_not_an_image(change: Any, words: str) -> None:
    table, session = table_with_a_session()
    image = as_lists(table.image(session))
    change(image)
    table.take_deltas(rows_buffer(table.num_deltas, 4))
    before = table.stats(), table.work, table.num_sessions
    with pytest.raises(ValueError, match=words):
        table.restore(image)
    assert (table.stats(), table.work, table.num_sessions) == before
    assert table.num_deltas == 0
    table.check_invariants()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_change_is_refused_or_makes_a_session(data: st.DataObject) -> None:
    table, session = table_with_a_session()
    image = as_lists(table.image(session))
    for _ in range(data.draw(st.integers(1, 3))):
        place = image
        while True:
            index = data.draw(st.integers(0, len(place) - 1))
            if not isinstance(place[index], list) or not place[index]:
                break
            place = place[index]
        if data.draw(st.booleans()) and place is not image:
            place.insert(index, copy.deepcopy(place[index]))
        else:
            place[index] = data.draw(st.integers(-1, 32) | st.integers(-(2**64), 2**64))
    try:
        restored = table.restore(image)
    except ValueError:
        assert table.num_sessions == 1
        return
    assert as_lists(table.image(restored)) == image
    table.resume(restored)
    table.check_invariants()
    assert as_lists(table.image(restored)) == image
