"""Where a tick's tokens lie, against the same said run by run."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest

from tml_kernels.ops.embed_tokens import TokenKind
from tml_runtime._tick import TickLayout

KINDS = (TokenKind.TEXT, TokenKind.EMBEDDED, TokenKind.LEVELS, TokenKind.STEP)
SIZES = {"T": 40, "S": 5, "N": 7, "O": 3, "Z": 50, "A": 6}
INT32 = ("kind_T", "index_T", "slot_S", "start_S1")
SHAPES = {
    "kind_T": "T", "index_T": "T", "slot_S": "S", "start_S1": "S1", "at_S": "S", "last_S": "S",
    "length_O_S": "OS", "said_N": "N", "steps_N": "N", "tokens_S_A": "SA", "column_S_A": "SA",
    "position_Z": "Z",
}  # fmt: skip


def poisoned() -> dict[str, np.ndarray]:
    """Arrays as an earlier tick may have left them."""
    arrays = {}
    for name, axes in SHAPES.items():
        shape = (SIZES["S"] + 1,) if axes == "S1" else tuple(SIZES[axis] for axis in axes)
        arrays[name] = np.full(shape, -77, np.int32 if name in INT32 else np.int64)
    return arrays


def expected(slots: list[int], counts: list[list[int]], ids: list[int]) -> dict[str, np.ndarray]:
    """Arrays but position_Z and length_O_S; of runs, those of live rows."""
    num_rows, num_tokens = SIZES["S"], SIZES["T"]
    tokens, starts, columns, amounts = [], [0], [], []
    texts, levels, patches = iter(ids), iter(range(99)), iter(range(99))
    for row, slot in enumerate(slots):
        columns.append([])
        amounts.append([*counts[row][:-1], 1, 1, 1])
        for kind, count in zip(KINDS, [*counts[row][:-1], 1], strict=True):
            columns[-1].append(len(tokens))
            source = {
                TokenKind.TEXT: texts, TokenKind.LEVELS: levels, TokenKind.EMBEDDED: patches,
                TokenKind.STEP: iter([slot]),
            }[kind]  # fmt: skip
            tokens += [(kind, next(source)) for _ in range(count)]
        columns[-1] += [num_tokens + step * num_rows + row for step in range(SIZES["O"] - 1)]
        starts.append(len(tokens))
    idle, left = num_rows - len(slots), num_tokens - len(tokens)
    said = list(range(SIZES["N"]))
    for row, slot in enumerate(slots):
        said[slot] = SIZES["N"] + row
    kind_T, index_T = zip(*tokens, *[(TokenKind.NOTHING, 0)] * left, strict=True)
    lists: dict[str, Any] = {
        "kind_T": kind_T,
        "index_T": index_T,
        "slot_S": slots + [-1] * idle,
        "at_S": slots + [0] * idle,
        "start_S1": starts + starts[-1:] * idle,
        "last_S": [start - 1 for start in starts[1:]] + [0] * idle,
        "said_N": said,
        "steps_N": [SIZES["O"] * (slot in slots) for slot in range(SIZES["N"])],
        "tokens_S_A": amounts,
        "column_S_A": columns,
    }
    return {name: np.array(values) for name, values in lists.items()}


@pytest.mark.parametrize("num_rows", range(1, SIZES["S"] + 1))
def test_tokens_lie_where_their_runs_do(num_rows: int) -> None:
    dice = random.Random(num_rows)
    arrays = poisoned()
    layout = TickLayout(KINDS, **arrays)
    for _ in range(20):
        slots = dice.sample(range(SIZES["N"]), num_rows)
        counts = [[*(dice.choice((0, 1, 3)) for _ in KINDS[1:]), SIZES["O"]] for _ in slots]
        while sum(sum(row[:-1]) + 1 for row in counts) > SIZES["T"]:
            counts[dice.randrange(num_rows)][dice.randrange(3)] = 0
        ids = [dice.randrange(1000) for _ in range(sum(row[0] for row in counts))]
        layout.fill(slots, np.array(counts), ids)
        for name, values in expected(slots, counts, ids).items():
            part = slice(num_rows) if name.endswith("A") else slice(None)
            np.testing.assert_array_equal(arrays[name][part], values, name)
        assert not arrays["position_Z"].any()
        arrays["position_Z"][:] = np.arange(SIZES["Z"]) + 100
        layout.set_lengths()
        lengths = np.zeros((SIZES["O"], SIZES["S"]), np.int64)
        lengths[:, :num_rows] = 101 + arrays["last_S"][:num_rows] + np.arange(SIZES["O"])[:, None]
        np.testing.assert_array_equal(arrays["length_O_S"], lengths)


@pytest.mark.parametrize(
    ("slots", "counts", "ids", "words"),
    [
        ([7], [[0, 0, 1, 3]], [], "slot=7"),
        ([-1], [[0, 0, 1, 3]], [], "slot=-1"),
        ([0, 1, 2, 3, 4, 5], [[0, 0, 1, 3]] * 6, [], "slots=6 rows=5"),
        ([0, 1], [[0, 0, 1, 3]], [], "counts=4"),
        ([0], [[0, 0, 40, 3]], [], "count=1 before it=40"),
        ([0], [[0, -1, 3, 3]], [], "count=-1"),
        ([0], [[0, 2**62, 3, 3]], [], f"count={2**62}"),
        ([0], [[2, 0, 3, 3]], [5], "text=2 ids=1"),
        ([0], [[0, 0, 3, 3]], [5], "text=0 ids=1"),
        ([0], np.zeros((1, 4), np.int32), [], "counts: expected int64, got i"),
        ([0], np.zeros((1, 8), np.int64)[:, ::2], [], "counts is not contiguous"),
    ],
)
def test_what_there_is_no_room_for_changes_nothing(
    slots: list[int], counts: Any, ids: list[int], words: str
) -> None:
    arrays = poisoned()
    layout = TickLayout(KINDS, **arrays)
    with pytest.raises(ValueError, match=re.escape(words)):
        layout.fill(slots, np.asarray(counts), ids)
    assert all((array == -77).all() for array in arrays.values())


@pytest.mark.parametrize("name", SHAPES)
def test_arrays_that_do_not_go_together_are_refused(name: str) -> None:
    arrays = poisoned()
    with pytest.raises(ValueError, match=name.split("_")[0]):
        TickLayout(KINDS, **{**arrays, name: arrays[name].astype(np.float32)})
    short = {key: x for key, x in arrays.items() if key != name}
    with pytest.raises(ValueError, match=f"{name} is not given"):
        TickLayout(KINDS, **short)  # type: ignore
    odd = arrays[name].ravel()[:-1].copy()
    with pytest.raises(ValueError, match="is false"):
        TickLayout(KINDS, **{**arrays, name: odd})


def test_a_step_is_the_last_run() -> None:
    with pytest.raises(ValueError, match="kinds=3"):
        TickLayout(KINDS[:3], **poisoned())
    with pytest.raises(ValueError, match="kinds=0"):
        TickLayout((), **poisoned())
