"""Saved sessions: what goes out comes back, and nothing that was changed on the way is believed."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_cache import BUDGETS, GROUPS, keys, make_cache, tick

from tml_kernels._core import SessionImage
from tml_kernels._tensor_file import TensorFile, TensorFileError
from tml_kernels.kv_cache import (
    CLASSES,
    CacheGroup,
    OutOfPages,
    OutOfSessions,
    PageClass,
    RollingKVCache,
    Session,
    SessionFileError,
    SlotTensor,
)
from tml_kernels.kv_cache.session_file import read_session_file, write_session_file

RUNS = [(PageClass.VIDEO, 3), (PageClass.AUDIO, 2), (PageClass.REPLY, 2)]


def saved(path: Path, ticks: int = 12) -> tuple[RollingKVCache, Session]:
    cache = make_cache()
    session = cache.open(BUDGETS, priority=2)
    for _ in range(ticks):
        tick(cache, session, RUNS)
    cache.slot_rows(session.slot)["counter"].fill_(77)
    cache.save(session, path)
    return cache, session


def test_a_session_comes_back_in_another_cache(tmp_path: Path) -> None:
    path = tmp_path / "session"
    cache, session = saved(path)
    other = make_cache(page_dtype=torch.float32, max_sessions=3)
    other.open(BUDGETS)
    twin = other.load(path)
    assert other.session_stats(twin) == cache.session_stats(session)
    assert twin.slot == 1 and other.slot_rows(1)["counter"] == 77
    for g in range(2):
        assert keys(other, twin, g) == keys(cache, session, g) != {}
        assert all(position == key for position, key in keys(other, twin, g).items())
    other.check_invariants()
    for each, handle in ((cache, session), (other, twin)):
        tick(each, handle, RUNS)
    assert other.positions(twin, 0) == cache.positions(session, 0)
    assert other.load(path, priority=5) and other.session_stats(Session(2, 1)).priority == 5


def test_it_is_cut_to_the_budgets_of_where_it_goes_on(tmp_path: Path) -> None:
    """The newest pages of every class are left, and what is read of them is what was written."""
    path = tmp_path / "session"
    cache, session = saved(path)
    few = dict.fromkeys(CLASSES, 1) | {PageClass.AUDIO: 3}
    other = cache_of((other_group(columns=11), GROUPS[1]))
    twin = other.load(path, budgets=few)
    other.check_invariants()
    was, now = (each.session_stats(handle) for each, handle in ((cache, session), (other, twin)))
    assert now.length == was.length and now.pages[1] == was.pages[1]
    assert now.pages[0] == [min(n, few[c]) for c, n in zip(CLASSES, was.pages[0], strict=True)]
    assert sum(now.pages[0]) < sum(was.pages[0])
    for g in range(2):
        left, all_of_it = keys(other, twin, g), keys(cache, session, g)
        assert left and all_of_it == {**all_of_it, **left}
    newest = {
        ref.page_class: ref.base
        for ref in sorted(cache.pages(session, 0), key=lambda ref: ref.base)
    }
    assert {ref.base for ref in other.pages(twin, 0)} >= set(newest.values())
    for _ in range(100):
        tick(other, twin, RUNS)
    other.check_invariants()
    assert all(
        n <= few[c] for c, n in zip(CLASSES, other.session_stats(twin).pages[0], strict=True)
    )


@pytest.mark.parametrize(("there", "here"), [(24, 8), (8, 0), (8, 24)])
def test_its_windows_reach_back_as_they_do_where_it_goes_on(
    there: int, here: int, tmp_path: Path
) -> None:
    path = tmp_path / "session"
    caches = [cache_of((GROUPS[0], replace(GROUPS[1], history=n))) for n in (there, here)]
    session = caches[0].open(BUDGETS)
    for _ in range(12):
        tick(caches[0], session, RUNS)
    caches[0].save(session, path)
    twin = caches[1].load(path)
    caches[1].check_invariants()
    if here > there:
        assert keys(caches[1], twin, 1) == keys(caches[0], session, 1)
    for each, handle in zip(caches, (session, twin), strict=True):
        for _ in range(40):
            tick(each, handle, RUNS)
    alone = cache_of((GROUPS[0], replace(GROUPS[1], history=here)))
    other = alone.open(BUDGETS)
    for _ in range(52):
        tick(alone, other, RUNS)
    assert keys(caches[1], twin, 1) == keys(alone, other, 1)


def test_more_anchors_than_are_kept_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "session"
    cache = make_cache()
    session = cache.open(BUDGETS | {PageClass.ANCHOR: 3})
    tick(cache, session, [(PageClass.ANCHOR, 9)])
    cache.save(session, path)
    with pytest.raises(SessionFileError, match="has 3 anchor pages, more than the 1 kept here"):
        cache.load(path, budgets=BUDGETS)
    with pytest.raises(ValueError, match="budgets: expected one of each class, got 1"):
        cache.load(path, budgets={PageClass.TEXT: 1})
    assert cache.stats().sessions == 1
    cache.check_invariants()


def test_it_is_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "session"
    saved(path)
    with safe_open(path, "pt") as file:
        assert {"0.k", "0.row_position", "1.v", "state.counter"} <= set(file.keys())
        assert file.metadata()["format"] == "tml-session/1"
        assert file.get_tensor("state.counter") == 77


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "session"
    saved(path, ticks=2)
    small = path.read_bytes()
    saved(path)
    assert path.read_bytes() != small and [p.name for p in tmp_path.iterdir()] == ["session"]
    cache = make_cache()
    session = cache.open(BUDGETS)
    with pytest.raises(FileNotFoundError):
        cache.save(session, tmp_path / "nowhere" / "session")


def test_every_changed_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "session"
    saved(path, ticks=3)
    whole = path.read_bytes()
    cache = make_cache()
    step = max(1, len(whole) // 300)
    for at in [*range(1500), *range(1500, len(whole), step), len(whole) - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(SessionFileError):
            cache.load(path)
    assert cache.stats().sessions == 0


@pytest.mark.parametrize("left", [0, 7, 8, 100, 2000, -1])
def test_truncated_or_longer_files_are_refused(left: int, tmp_path: Path) -> None:
    path = tmp_path / "session"
    saved(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    with pytest.raises(SessionFileError, match=str(path)):
        make_cache().load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(SessionFileError, match="altered or truncated"):
        make_cache().load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    text = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "weights").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(SessionFileError, match="not a saved session"):
        make_cache().load(tmp_path / "weights")
    with pytest.raises(SessionFileError, match="cannot be read"):
        make_cache().load(tmp_path / "missing")


def cache_of(groups: tuple[CacheGroup, ...], **options: object) -> RollingKVCache:
    slots = {"counter": SlotTensor(torch.zeros(3, dtype=torch.int64))}
    options = {"page_dtype": torch.float32, "slot_tensors": slots, "max_sessions": 3} | options
    return RollingKVCache(groups, **options)  # type: ignore[arg-type]


def other_group(**changes: object) -> CacheGroup:
    return CacheGroup(**{**vars(GROUPS[0]), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cache_of(GROUPS, page_dtype=torch.bfloat16), "page_dtype is torch.float32"),
        (lambda: cache_of(GROUPS[:1]), "groups is"),
        (lambda: cache_of((other_group(head_width=4), GROUPS[1])), "'head_width': 3"),
        (lambda: cache_of((other_group(span=48), GROUPS[1])), "'span': 24"),
        (lambda: cache_of(GROUPS, slot_tensors={}), None),
        (
            lambda: cache_of(GROUPS, slot_tensors={"taps": SlotTensor(torch.zeros(3, 2))}),
            "state.taps: is missing",
        ),
        (
            lambda: cache_of(GROUPS, slot_tensors={"counter": SlotTensor(torch.zeros(3, 2))}),
            r"state.counter: expected torch.float32 \(2,\), got torch.int64 \(\)",
        ),
    ],
    ids=["dtype", "groups", "width", "span", "fewer slot tensors", "missing", "shape"],
)
def test_a_cache_of_another_shape(make, words: str | None, tmp_path: Path) -> None:
    path = tmp_path / "session"
    saved(path)
    cache = make()
    if words is None:  # what it does not ask for may be there
        cache.load(path)
        return
    with pytest.raises(SessionFileError, match=words):
        cache.load(path)
    assert cache.stats().sessions == 0
    cache.check_invariants()


def test_no_room_for_it_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "session"
    saved(path)
    tight = cache_of((other_group(pages=6), GROUPS[1]))
    with pytest.raises(OutOfPages):
        tight.load(path)
    assert tight.stats().sessions == 0 and tight.stats().host_bytes == 0
    tight.check_invariants()
    full = make_cache(max_sessions=1, slot_tensors={"counter": SlotTensor(torch.zeros(1).long())})
    full.open(BUDGETS)
    with pytest.raises(OutOfSessions):
        full.load(path)


@pytest.mark.parametrize("part", ["scatter", "check_positions"])
def test_a_load_that_fails_holds_nothing(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "session"
    saved(path)
    cache = make_cache()

    def refuse(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(f"tml_kernels.kv_cache.cache.{part}", refuse)
        with pytest.raises(MemoryError):
            cache.load(path)
    assert cache.stats().sessions == 0 and cache.stats().host_bytes == 0
    cache.check_invariants()
    cache.load(path)


def test_rows_whose_positions_are_not_the_books_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "session"
    saved(path)
    file, description = read_session_file(path)
    tensors = {name: file.tensor(name).clone() for name in file.entries}
    tensors["0.row_position"][0, 1, 0] = 999_999
    write_session_file(path, tensors.items(), description)
    cache = make_cache()
    with pytest.raises(SessionFileError, match=r"0\.row_position: page 1 contradicts"):
        cache.load(path)
    assert cache.stats().sessions == 0
    cache.check_invariants()


@pytest.mark.parametrize("description", [[1], 3, "_" * 200_000], ids=["list", "number", "deep"])
def test_a_description_that_is_none(description: object, tmp_path: Path) -> None:
    path = tmp_path / "session"
    write_session_file(path, [("x", torch.zeros(1))], description)  # type: ignore[arg-type]
    whole = path.read_bytes()
    text = re.search(rb'\\"_+\\"', whole)
    if text is not None:
        whole = whole.replace(text[0], b"[" * len(text[0]))
        place = whole.index(b'"sha256": "') + 11
        zeros = whole[:place] + b"0" * 64 + whole[place + 64 :]
        digest = hashlib.sha256(zeros).hexdigest().encode()
        path.write_bytes(whole[:place] + digest + whole[place + 64 :])
    with pytest.raises(SessionFileError, match="its description cannot be read"):
        read_session_file(path)


SHAPES = {  # of no bytes, all of them
    "a side beyond 64 bits": [2**70],
    "sides that wrap": [2**32, 2**32],
    "nothing, and too wide": [0, 2**32, 2**32],
}


def _header(shape: list[int]) -> str:
    return json.dumps({"x": {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}})


HEADERS = {"deep": "[" * 200_000} | {name: _header(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie_are_a_typed_error(name: str, tmp_path: Path) -> None:
    path, header = tmp_path / "file", HEADERS[name].encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(TensorFileError):
        TensorFile(path)


def test_a_dtype_that_no_file_holds_is_refused_before_one_is_written(tmp_path: Path) -> None:
    path = tmp_path / "session"
    cache = make_cache(slot_tensors={"flag": SlotTensor(torch.zeros(3, dtype=torch.bool))})
    with pytest.raises(TensorFileError, match=r"state\.flag: torch\.bool is not one of F32"):
        cache.save(cache.open(BUDGETS), path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image: image.update(length=3), "its pages contradict themselves"),
        (lambda image: image["pages"][0].__setitem__(1, 5), "its pages contradict themselves"),
        (lambda image: image["pages"].append([9, 0, 1, 1, [0]]), "list of pages cannot be read"),
        (lambda image: image["pages"].pop(), "expected torch.float32"),
        (lambda image: image.update(pages=None), "list of pages cannot be read"),
    ],
    ids=["length", "base", "group", "a page less", "no list"],
)
def test_books_that_contradict_themselves(change, words: str, tmp_path: Path) -> None:
    """With a checksum that is right: the file was written so."""
    path = tmp_path / "session"
    saved(path)
    file, description = read_session_file(path)
    image = dict(zip(SessionImage._fields, description["image"], strict=True))
    change(image)
    tensors = [(name, file.tensor(name).clone()) for name in file.entries]
    write_session_file(path, tensors, description | {"image": list(image.values())})
    cache = make_cache()
    with pytest.raises(SessionFileError, match=words):
        cache.load(path)
    assert cache.stats().sessions == 0
    cache.check_invariants()
