"""Verbs of RollingKVCache one by one: what each does, and what it refuses without a trace."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from small_cache import BUDGETS, GROUPS, append, keys, make_cache, tick

from tml_kernels.kv_cache import (
    CLASSES,
    BudgetExceeded,
    CacheGroup,
    NoSnapshot,
    OutOfPages,
    OutOfSessions,
    PageClass,
    ReservationExceeded,
    RollingKVCache,
    Session,
    SlotTensor,
    UnknownSession,
    WindowPassed,
)

TEXT, AUDIO, VIDEO, REPLY = CLASSES[1:]
RUNS = [(VIDEO, 3), (AUDIO, 2), (REPLY, 2)]


def opened(ticks: int = 0, **changes: object) -> tuple[RollingKVCache, Session]:
    cache = make_cache(**changes)
    session = cache.open(BUDGETS)
    for _ in range(ticks):
        tick(cache, session, RUNS)
    return cache, session


def snapshot(cache: RollingKVCache) -> list:
    """Everything that can be seen."""
    pools = cache._pools
    tables = [pools.page_Q, pools.base_Q, pools.rows_Q, pools.row_position_W]
    contents = [x.clone() for group in cache.groups for x in group.contents().values()]
    groups = range(len(cache.groups))
    sessions = [
        (cache.session_stats(s), [(cache.positions(s, g), cache.pages(s, g)) for g in groups])
        for s in cache._sessions.values()
    ]
    state = [x.tensor.clone() for x in cache._state.tensors.values()]
    return [[t.tolist() for t in (*tables, *contents, *state)], sessions, cache.stats()]


def test_classes_fill_pages_of_their_own() -> None:
    cache, session = opened(ticks=3)
    held: dict[PageClass, list[int]] = {page_class: [] for page_class in CLASSES}
    pages = zip(cache.pages(session, 0), cache.positions(session, 0), strict=True)
    for ref, positions in sorted(pages, key=lambda page: page[0].base):
        held[ref.page_class] += positions
    assert held[VIDEO] == [0, 1, 2, 7, 8, 9, 14, 15, 16]
    assert held[AUDIO] == [3, 4, 10, 11, 17, 18]
    assert held[REPLY] == [5, 6, 12, 13, 19, 20]
    assert len(cache.pages(session, 0)) == 3 + 2 + 2
    assert keys(cache, session, 0) == {p: float(p) for p in range(21)}


def test_video_goes_first_when_the_session_must_make_room() -> None:
    """The pool of the group without a window has room for five pages beside the zero page."""
    group = CacheGroup(**{**vars(GROUPS[0]), "pages": 6})
    cache = RollingKVCache([group], max_sessions=1, page_dtype=torch.float32)
    session = cache.open(dict.fromkeys(CLASSES, 9))
    for runs in ([(VIDEO, 4)], [(TEXT, 4)], [(AUDIO, 4)], [(VIDEO, 4)], [(REPLY, 2)]):
        tick(cache, session, runs)
    assert cache.stats().groups[0].free == 0
    tick(cache, session, [(TEXT, 4)])
    assert sorted(keys(cache, session, 0)) == [*range(4, 22)]
    tick(cache, session, [(TEXT, 4)])  # a full page of video is no open page
    assert sorted(keys(cache, session, 0)) == [*range(4, 12), *range(16, 26)]
    before = snapshot(cache)
    with pytest.raises(OutOfPages, match="needed=6 free=0 evictable=4") as caught:
        cache.reserve(session, [(TEXT, 24)])
    assert (caught.value.needed, caught.value.group) == (6, 0)
    assert snapshot(cache) == before  # what would not be enough is not dropped


def test_an_idle_session_makes_room_by_going_to_host_memory() -> None:
    group = CacheGroup(**{**vars(GROUPS[0]), "pages": 5})
    cache = RollingKVCache([group], max_sessions=2, page_dtype=torch.float32)
    idle, busy = (cache.open(BUDGETS) for _ in range(2))
    tick(cache, idle, [(AUDIO, 3), (REPLY, 3)])
    tick(cache, busy, [(AUDIO, 3), (REPLY, 3)])
    before = keys(cache, idle, 0)
    tick(cache, busy, [(TEXT, 1)])
    assert cache.is_suspended(idle) and cache.stats().suspended == 1
    assert cache.stats().host_bytes > 0
    with pytest.raises(OutOfPages):  # the other one has just spoken
        cache.resume(idle)
    assert cache.is_suspended(idle)
    cache.tick()
    cache.resume(idle)
    assert cache.is_suspended(busy) and keys(cache, idle, 0) == before
    cache.check_invariants()


def test_without_host_memory_nothing_is_suspended(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, session = opened(ticks=3)
    before = keys(cache, session, 0)

    def refuse(*args: object, **options: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("tml_kernels.kv_cache.cache.gather", refuse)
        with pytest.raises(MemoryError):
            cache.suspend(session)
    assert not cache.is_suspended(session) and keys(cache, session, 0) == before
    cache.suspend(session)
    with monkeypatch.context() as patch:
        patch.setattr("tml_kernels.kv_cache.cache.scatter", refuse)
        with pytest.raises(MemoryError):
            cache.resume(session)
    assert cache.is_suspended(session)
    cache.check_invariants()
    cache.resume(session)
    assert keys(cache, session, 0) == before
    tick(cache, session, [(AUDIO, 2)])
    cache.check_invariants()


@pytest.mark.parametrize("part", ["to_device", "RollingKVCache.write"])
def test_what_the_device_was_not_told_it_is_told_later(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other sessions too: an entry left behind is a page that is somebody else's by then."""
    cache, session = opened(ticks=9)
    other = cache.open(BUDGETS)
    assert cache._table.num_deltas > 0  # what the last commit dropped

    def refuse(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(f"tml_kernels.kv_cache.cache.{part}", refuse)
        with pytest.raises(MemoryError):
            append(cache, other, [(AUDIO, 2)])
    cache.roll_back(other)
    cache.check_invariants()
    tick(cache, session, RUNS)
    cache.check_invariants()


def test_rows_of_another_shape_or_dtype_are_refused_before_the_device_is_told() -> None:
    cache, _ = opened(ticks=9)
    rows, positions = np.full((2, 1), -1), np.zeros(1, np.int64)
    before = cache._table.num_deltas
    for bad in ((rows[:1], positions), (rows.astype(float), positions), (rows, positions[:, None])):
        with pytest.raises(ValueError, match="expected int64"):
            cache.apply(*bad)
    assert cache._table.num_deltas == before > 0
    cache.check_invariants()


@pytest.mark.parametrize("part", ["copy_pages", "SlotState.copy"])
def test_a_fork_that_fails_holds_nothing(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, session = opened(ticks=3)
    before = cache.stats()

    def refuse(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(f"tml_kernels.kv_cache.cache.{part}", refuse)
        with pytest.raises(MemoryError):
            cache.fork(session)
    assert cache.stats() == before
    cache.check_invariants()
    assert keys(cache, cache.fork(session), 0) == keys(cache, session, 0)


def test_a_fork_between_commit_and_tick_remembers_what_its_parent_does() -> None:
    cache, session = opened(ticks=2)
    append(cache, session, [(AUDIO, 2)])
    cache.commit(session)
    child = cache.fork(session)
    cache.tick()
    for each in (session, child):
        assert cache.rewind(each, 14) == 14 and cache.rewind(each, 7) == 7
    cache.check_invariants()


def test_ticks_of_some_make_nobody_idle() -> None:
    """Who had part in the last tick of all is not suspended for one of its own priority."""
    group = CacheGroup(**{**vars(GROUPS[0]), "pages": 5})
    cache = RollingKVCache([group], max_sessions=3, page_dtype=torch.float32)
    one, other, third = (cache.open(BUDGETS) for _ in range(3))
    for session in (one, other):
        append(cache, session, [(AUDIO, 3), (REPLY, 3)])
        cache.commit(session)
    cache.tick()
    cache.tick([third])
    with pytest.raises(OutOfPages):
        cache.reserve(other, [(TEXT, 1)])
    assert not cache.is_suspended(one)
    cache.tick()
    cache.reserve(other, [(TEXT, 1)])
    assert cache.is_suspended(one)
    cache.roll_back(other)
    cache.check_invariants()


def test_a_tick_of_who_is_gone_is_none() -> None:
    cache, session = opened(ticks=1)
    gone = cache.open(BUDGETS)
    cache.close(gone)
    append(cache, session, [(AUDIO, 1)])
    cache.commit(session)
    with pytest.raises(UnknownSession):
        cache.tick([session, gone])
    assert cache.stats().ticks == 1
    with pytest.raises(RuntimeError, match="has committed in this tick already"):
        cache.reserve(session, [(AUDIO, 1)])


def test_nobody_commits_twice_at_once() -> None:
    cache, session = opened()
    append(cache, session, [(AUDIO, 1)])
    with pytest.raises(ValueError, match="slot=0 is given twice"):
        cache.commit_all([session, session])
    assert cache.session_stats(session).in_transaction
    cache.commit(session)


def test_no_message_has_an_address() -> None:
    cache = make_cache()
    with pytest.raises(ValueError, match=r"session: expected one that .* got tuple") as refused:
        cache.length((1, 2, object()))  # pyright: ignore[reportArgumentType]
    assert "0x" not in str(refused.value)
    with pytest.raises(TypeError) as wrong:
        cache.open({AUDIO: 2.5})  # pyright: ignore[reportArgumentType]
    assert " at 0x" not in str(wrong.value)


def test_what_is_rolled_back_before_its_first_tick_keeps_its_state() -> None:
    cache, session = opened(ticks=2)
    append(cache, session, [(AUDIO, 3)])
    cache.commit(session)
    cache.slot_rows(session.slot)["counter"].fill_(5)
    child = cache.fork(session)
    append(cache, child, [(AUDIO, 1)])
    cache.slot_rows(child.slot)["counter"].fill_(6)
    cache.roll_back(child)
    assert cache.slot_rows(child.slot)["counter"] == 5
    cache.tick()
    cache.check_invariants()


def test_a_tick_longer_ago_than_is_remembered_can_be_rolled_back_to() -> None:
    cache = make_cache(num_snapshots=3)
    session = cache.open(BUDGETS)
    counter = cache.slot_rows(session.slot)["counter"]
    for ago in (5, 4, 3):
        append(cache, session, [(AUDIO, 1)])
        counter.fill_(ago)
        cache.commit(session)
        cache.tick([session], ago=ago)
        append(cache, session, [(AUDIO, 1)])
        counter.fill_(99)
        cache.roll_back(session)
        assert counter == ago


def test_going_back_finds_the_newest_state_of_a_length_and_forgets_later_ones() -> None:
    cache, session = opened()
    counter = cache.slot_rows(session.slot)["counter"]
    for n in (1, 2, 3):  # lengths of 7, 14 and 21
        append(cache, session, RUNS)
        counter.fill_(n)
        cache.commit(session)
        cache.tick()
    counter.fill_(4)
    cache.tick()  # of no tokens
    child = cache.fork(session)
    append(cache, session, [(AUDIO, 1)])
    counter.fill_(5)
    cache.commit(session)
    cache.tick()
    assert cache.rewind(session, 21) == 21 and counter == 4
    append(cache, session, [(AUDIO, 1)])
    counter.fill_(6)
    cache.roll_back(session)
    assert counter == 4
    assert cache.rewind(session, 14) == 14 and counter == 2
    tick(cache, session, [(AUDIO, 8)])
    with pytest.raises(NoSnapshot) as refused:
        cache.rewind(session, 21)
    assert refused.value.kept == [0, 7, 14, 22]
    assert cache.rewind(child, 14) == 14 and cache.slot_rows(child.slot)["counter"] == 2
    cache.check_invariants()


def test_nobody_goes_back_to_what_the_slot_held_before() -> None:
    cache, session = opened(ticks=1)
    cache.close(session)
    heir = cache.open(BUDGETS)
    tick(cache, heir, [(AUDIO, 8)])
    with pytest.raises(NoSnapshot) as refused:
        cache.rewind(heir, 7)
    assert refused.value.kept == [0, 8]


@pytest.mark.parametrize(("remembered", "kept"), [(1, [0, 4]), (3, [0, 2, 3, 4])])
def test_a_tick_longer_ago_than_is_remembered_takes_the_place_of_the_oldest(
    remembered: int, kept: list[int]
) -> None:
    cache = make_cache(num_snapshots=remembered)
    session = cache.open(BUDGETS)
    for only in (None, None, None, [session]):
        append(cache, session, [(AUDIO, 1)])
        cache.commit(session)
        cache.tick(only, ago=0 if only is None else 5)
    with pytest.raises(NoSnapshot) as refused:
        cache.rewind(session, 1)
    assert refused.value.kept == kept


def test_a_tick_of_some_takes_the_place_of_theirs_alone() -> None:
    cache = make_cache(num_snapshots=3)
    one, other = (cache.open(BUDGETS) for _ in range(2))
    for _ in range(3):
        append(cache, one, [(AUDIO, 1)])
        append(cache, other, [(AUDIO, 1)])
        cache.commit_all([one, other])
        cache.tick()
    for ago in (1, 0):
        append(cache, one, [(AUDIO, 1)])
        cache.commit(one)
        cache.tick([one], ago=ago)
    with pytest.raises(NoSnapshot) as refused:
        cache.rewind(one, 2)
    assert refused.value.kept == [0, 1, 4, 5]
    assert cache.rewind(other, 1) == 1 and cache.rewind(one, 4) == 4
    cache.check_invariants()


def test_priority_decides_who_goes() -> None:
    group = CacheGroup(**{**vars(GROUPS[0]), "pages": 5})
    cache = RollingKVCache([group], max_sessions=2, page_dtype=torch.float32)
    low, high = (cache.open(BUDGETS, priority=p) for p in (0, 1))
    tick(cache, high, [(AUDIO, 3), (REPLY, 3)])
    tick(cache, low, [(AUDIO, 3), (REPLY, 3)])
    cache.tick()
    with pytest.raises(OutOfPages):
        cache.reserve(low, [(TEXT, 1)])
    assert not cache.is_suspended(high)
    tick(cache, high, [(TEXT, 1)])
    assert cache.is_suspended(low)


def test_barge_in_drops_the_reply_that_was_never_played() -> None:
    cache, session = opened(ticks=3)
    counter = cache.slot_rows(session.slot)["counter"]
    counter.fill_(3)
    cache.tick()
    assert cache.mark(session) == 21
    counter.fill_(4)
    tick(cache, session, [(REPLY, 5)])
    assert cache.rewind(session) == 21
    assert counter == 3
    assert sorted(keys(cache, session, 0)) == list(range(21))
    tick(cache, session, [(AUDIO, 2)])
    assert keys(cache, session, 0) == {p: float(p) for p in range(23)}


def test_a_setting_stays_where_time_goes_back_and_goes_with_its_session() -> None:
    heat = SlotTensor(torch.zeros(3), reset=1.0, is_setting=True)
    cache, session = opened(ticks=2, slot_tensors={"heat": heat})
    assert cache.slot_rows(session.slot)["heat"] == 1.0
    cache.slot_rows(session.slot)["heat"].fill_(0.5)
    cache.rewind(session, 7)
    append(cache, session, RUNS)
    cache.roll_back(session)
    child = cache.fork(session)
    for each in (session, child):
        assert cache.slot_rows(each.slot)["heat"] == 0.5
    cache.close(session)
    assert cache.slot_rows(cache.open(BUDGETS).slot)["heat"] == 1.0


def test_a_fork_shares_pages_and_goes_its_own_way() -> None:
    cache, session = opened(ticks=3)
    cache.slot_rows(0)["counter"].fill_(9)
    child = cache.fork(session)
    assert cache.slot_rows(child.slot)["counter"] == 9
    # Seven pages, of which three are open and copied.
    assert cache.stats().groups[0][-2:] == (7 + 3, 4)
    tick(cache, child, [(VIDEO, 3)])
    tick(cache, session, [(TEXT, 1)])
    assert keys(cache, session, 0) == {p: float(p) for p in range(22)}
    assert keys(cache, child, 0) == {p: float(p) for p in range(24)}
    cache.close(session)
    assert keys(cache, child, 0) == {p: float(p) for p in range(24)}
    cache.check_invariants()


def test_a_recycled_page_shows_nothing_of_its_former_owner() -> None:
    """A canary in every page of a closed session: none of it is visible to the next one."""
    cache, session = opened(ticks=8)
    for group in cache.groups:
        for ref in cache.pages(session, cache.groups.index(group)):
            for x in group.contents().values():
                if x.dtype == torch.float32:
                    x[:, ref.page] = 1e9
    cache.slot_rows(session.slot)["counter"].fill_(1_000)
    cache.close(session)
    heir = cache.open(BUDGETS)
    assert heir.slot == session.slot and heir.epoch > session.epoch
    assert cache.slot_rows(heir.slot)["counter"] == 0
    for _ in range(8):
        tick(cache, heir, RUNS)
        for g in range(2):
            assert all(key == position for position, key in keys(cache, heir, g).items())
    cache.check_invariants()


def test_memory_is_allocated_once() -> None:
    cache, session = opened(ticks=20)
    tensors = [x for group in cache.groups for x in group.contents().values()]
    places = [x.data_ptr() for x in tensors]
    gc.collect()
    before = len([x for x in gc.get_objects() if isinstance(x, torch.Tensor)])
    for _ in range(50):
        tick(cache, session, RUNS)
    gc.collect()
    assert len([x for x in gc.get_objects() if isinstance(x, torch.Tensor)]) == before
    assert [x.data_ptr() for x in tensors] == places


def test_a_day_on_the_host() -> None:
    """24 simulated hours of 200 ms: pages, lists and work a tick are those of the first hour."""
    cache, session = opened(slot_tensors={})
    per_hour, hours, rows = 5 * 3600, [], np.full((2, 7), -1)
    table, work, deltas = cache._table, 0, np.empty((cache.num_keys, 4), np.int64)
    for _ in range(24):
        most = 0
        for _ in range(per_hour):
            cache.reserve(session, RUNS)
            for column, (page_class, tokens) in zip((0, 3, 5), RUNS, strict=True):
                cache.append(session, page_class, tokens, rows, column)
            cache.commit(session)
            cache.tick()
            table.take_deltas(deltas.data)
            work, before = table.work, work
            most = max(most, work - before)
        table.check_invariants()
        hours.append((most, [g.held for g in table.stats()], cache.session_stats(session).pages))
    assert cache.length(session) == 24 * per_hour * 7
    assert hours[1:] == hours[1:2] * 23
    assert hours[0][1:] == hours[1][1:]


BAD = {
    "a closed session": (lambda c, s: c.reserve(Session(0, 9), RUNS), UnknownSession, "epoch=9"),
    "a session that never was": (lambda c, s: c.length(Session(7, 1)), UnknownSession, "slot=7"),
    "a slot that never was": (
        lambda c, s: c.reserve(Session(99, 1), []), UnknownSession, "slot=99",
    ),
    "a negative slot": (lambda c, s: c.reserve(Session(-1, 1), []), UnknownSession, "slot=-1"),
    "append at rest": (lambda c, s: c.append(s, TEXT, 1, rows()), RuntimeError, "append: slot=0"),
    "commit at rest": (lambda c, s: c.commit(s), RuntimeError, "commit: slot=0 is at rest"),
    "roll back at rest": (lambda c, s: c.roll_back(s), RuntimeError, "roll_back: slot=0"),
    "resume what is there": (lambda c, s: c.resume(s), RuntimeError, "resume: slot=0"),
    "a negative run": (lambda c, s: c.reserve(s, [(AUDIO, -1)]), ValueError, "audio=-1"),
    "more anchors than pages": (
        lambda c, s: c.reserve(s, [(PageClass.ANCHOR, 9)]), BudgetExceeded, "anchor pages",
    ),
    "more than the columns": (
        lambda c, s: c.reserve(s, [(AUDIO, 200)]), BudgetExceeded, "columns pages",
    ),
    "rewind into the future": (lambda c, s: c.rewind(s, 99), ValueError, "position=99"),
    "rewind between ticks": (lambda c, s: c.rewind(s, 27), NoSnapshot, "position=27"),
    "rewind past the window": (lambda c, s: c.rewind(s, 0), WindowPassed, "position=0"),
    "rewind without a mark": (lambda c, s: c.rewind(s), RuntimeError, "slot=0 has no mark"),
    "roll a window": (lambda c, s: c.roll(s, 1, 1), ValueError, "group=1 rolls by its window"),
    "budgets of no page": (lambda c, s: c.open(BUDGETS | {VIDEO: 0}), ValueError, "video=0"),
    "budgets of some classes": (lambda c, s: c.open({TEXT: 1}), ValueError, "one of each class"),
    "rows of another shape": (
        lambda c, s: c.apply(np.zeros((1, 3), np.int64), np.zeros(3, np.int64)),
        ValueError, r"rows: expected int64 \(2, 3\), got",
    ),
}  # fmt: skip


def rows() -> np.ndarray:
    return np.full((2, 9), -1)


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_changes_nothing(name: str) -> None:
    call, error, words = BAD[name]
    cache, session = opened(ticks=6)
    before = snapshot(cache)
    with pytest.raises(error, match=words):
        call(cache, session)
    assert snapshot(cache) == before
    cache.check_invariants()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda c, s: c.append(s, TEXT, 1, rows()), ReservationExceeded, "append of text"),
        (lambda c, s: c.append(s, AUDIO, 3, rows()), ReservationExceeded, "tokens=3 left=2"),
        (lambda c, s: c.append(s, AUDIO, 1, rows().astype(np.int32)), ValueError, "int64"),
        (lambda c, s: c.append(s, AUDIO, 2, rows(), 8), ValueError, "column"),
        (lambda c, s: c.append(s, AUDIO, 1, rows()[:, ::2]), ValueError, "contiguous"),
        (lambda c, s: c.reserve(s, RUNS), RuntimeError, "is in a transaction"),
        (lambda c, s: c.fork(s), RuntimeError, "fork"),
        (lambda c, s: c.suspend(s), RuntimeError, "suspend"),
        (lambda c, s: c.mark(s), RuntimeError, "mark"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_in_a_transaction(call: Callable, error: type, words: str) -> None:
    cache, session = opened(ticks=2)
    before = snapshot(cache)
    cache.reserve(session, RUNS)
    with pytest.raises(error, match=words):
        call(cache, session)
    cache.roll_back(session)
    cache.apply(np.empty((2, 0), np.int64), np.empty(0, np.int64))
    assert snapshot(cache)[1:] == before[1:]


def test_a_second_transaction_in_a_tick_is_refused() -> None:
    """Its slot tensors could not be rolled back: no snapshot lies between the two."""
    cache, session = opened(ticks=1)
    append(cache, session, RUNS)
    cache.commit(session)
    with pytest.raises(RuntimeError, match="slot=0 has committed in this tick"):
        cache.reserve(session, RUNS)
    with pytest.raises(RuntimeError, match="commit: slot=0 is at rest"):
        cache.commit(session)
    cache.tick()
    cache.reserve(session, RUNS)


def test_a_tick_of_others_is_no_snapshot_of_who_has_committed() -> None:
    cache = make_cache()
    first, second = (cache.open(BUDGETS) for _ in range(2))
    for session in (first, second):
        append(cache, session, RUNS)
        cache.commit(session)
    cache.tick([first])
    with pytest.raises(RuntimeError, match="slot=1 has committed in this tick"):
        cache.reserve(second, RUNS)
    runs = [page_class for page_class, _ in RUNS]
    tokens = np.array([[n for _, n in RUNS]] * 2)
    assert cache.reserve_all([first, second], runs, tokens) == 1
    cache.roll_back(first)
    cache.tick([second])
    cache.reserve(second, RUNS)
    cache.roll_back(second)
    assert cache.length(second) == sum(n for _, n in RUNS)


def test_all_slots_taken() -> None:
    cache, _ = opened()
    sessions = [cache.open(BUDGETS) for _ in range(2)]
    with pytest.raises(OutOfSessions, match="max_sessions=3"):
        cache.open(BUDGETS)
    cache.close(sessions[0])
    with pytest.raises(UnknownSession):
        cache.close(sessions[0])
    assert cache.open(BUDGETS).slot == sessions[0].slot


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"page_dtype": torch.float64}, TypeError, "page_dtype: expected one of .*float64"),
        ({"max_sessions": 0, "slot_tensors": {}}, ValueError, "max_sessions=0"),
        ({"lag": -1}, ValueError, "lag=-1"),
        ({"num_snapshots": 0}, ValueError, "num_snapshots=0"),
        (
            {"slot_tensors": {"taps": SlotTensor(torch.zeros(3, 4), axis=1)}},
            ValueError, "taps: expected 3 slots on axis 1, got 4",
        ),
    ],
)  # fmt: skip
def test_bad_options(change: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        make_cache(**change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": 0}, "num_layers=0"),
        ({"pages": 1}, "pages=1"),
        ({"window": 4}, "span"),
        ({"span": 3}, "span"),
        ({"history": 2}, "history=2"),
    ],
)
def test_bad_groups(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RollingKVCache(
            [CacheGroup(**{**vars(GROUPS[0]), **change})],
            max_sessions=1,
            page_dtype=torch.float32,
        )
