"""Attention over a cache that rolls, against attention over a dictionary that drops as it does."""

# Dimension key: T tokens, H query heads, C head width, B features, X extent, L keys that are kept.

from __future__ import annotations

import os
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from tml_kernels import paged_attention, plan_pages
from tml_kernels.kv_cache import CLASSES, CacheGroup, PageClass, RollingKVCache, Session
from tml_kernels.testing import assert_bitwise, assert_matches

HEADS, WIDTH, FEATURES, EXTENT, ROWS = 2, 8, 3, 40, 4
TAU_FLOOR = 100.0
BUDGETS = dict(zip(CLASSES, (1, 2, 5, 3, 4), strict=True))
SLOT_0 = torch.zeros(1, dtype=torch.int32)


class Conversation:
    """One layer of one session, and what its keys and values were."""

    def __init__(
        self, window: int | None = None, *, history: int = 0, budgets: dict | None = None
    ) -> None:
        own = {"window": window, "history": history} if window else {"span": 48}
        self.group = CacheGroup(1, 1, WIDTH, pages=99, columns=90, page_rows=ROWS, **own)
        self.cache = RollingKVCache([self.group], max_sessions=1, page_dtype=torch.float32)
        self.session: Session = self.cache.open(budgets or BUDGETS)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.table_B_X = torch.randn(FEATURES, EXTENT)

    def tick(
        self, runs: list[tuple[PageClass, int]], *, attend: bool, sizes: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append the runs; (attention of the new tokens, in calls of `sizes`, the reference's)."""
        total = sum(n for _, n in runs)
        k_T_C, v_T_C = torch.randn(total, WIDTH), torch.randn(total, WIDTH)
        first = self.cache.length(self.session)
        self.cache.reserve(self.session, runs)
        rows, column = np.full((1, total), -1), 0
        for page_class, tokens in runs:
            self.cache.append(self.session, page_class, tokens, rows, column)
            column += tokens
        row_T = self.cache.apply(rows, first + np.arange(total)).row_K_T[0]
        pages = self.cache.groups[0]
        for x, value_T_C in ((pages.k_pages_L_P_G_R_C, k_T_C), (pages.v_pages_L_P_G_R_C, v_T_C)):
            x[0, row_T // ROWS, 0, row_T % ROWS] = value_T_C
        self.kept |= {first + t: (k_T_C[t], v_T_C[t]) for t in range(total)}
        result = (torch.empty(0), torch.empty(0))
        if attend:
            held = {p for page in self.cache.positions(self.session, 0) for p in page}
            self.kept = {p: kv for p, kv in self.kept.items() if p in held}
            q_T_H_C = torch.randn(total, HEADS, WIDTH)
            rel_T_H_B = torch.randn(total, HEADS, FEATURES)
            calls = [self.attend(q_T_H_C, rel_T_H_B, first, part) for part in cut(total, sizes)]
            result = torch.cat(calls), self.reference(q_T_H_C, rel_T_H_B, first)
        self.cache.commit(self.session)
        self.cache.tick()
        return result

    def attend(self, q_T_H_C: Tensor, rel_T_H_B: Tensor, first: int, part: range) -> Tensor:
        pages = self.cache.groups[0]
        return paged_attention(
            q_T_H_C[part.start : part.stop],
            pages.k_pages_L_P_G_R_C[0],
            pages.v_pages_L_P_G_R_C[0],
            plan_pages(pages.page_N_M, pages.base_N_M, pages.rows_N_M, SLOT_0),
            torch.tensor([0, len(part)], dtype=torch.int32),
            torch.tensor([first + part.stop]),
            row_position_P_R=pages.row_position_P_R,
            span=self.group.span,
            scale=WIDTH**-0.5,
            window=self.group.window,
            rel_T_H_B=rel_T_H_B[part.start : part.stop],
            rel_table_B_X=self.table_B_X,
            tau_floor=TAU_FLOOR,
        )

    def reference(self, q_T_H_C: Tensor, rel_T_H_B: Tensor, first: int) -> Tensor:
        """float64, from the definition, over what the dictionary kept."""
        position_L = torch.tensor(sorted(self.kept))
        k_L_C, v_L_C = (
            torch.stack([self.kept[int(p)][i] for p in position_L]).double() for i in range(2)
        )
        pq_T = first + torch.arange(len(q_T_H_C))
        distance_T_L = pq_T[:, None] - position_L
        profile_T_H_X = rel_T_H_B.double() @ self.table_B_X.double()
        index_T_H_L = distance_T_L.clamp(0, EXTENT - 1)[:, None].expand(-1, HEADS, -1)
        bias_T_H_L = profile_T_H_X.gather(2, index_T_H_L)
        bias_T_H_L[(distance_T_L >= EXTENT)[:, None].expand_as(bias_T_H_L)] = 0
        tau_T = 1 + 0.1 * ((pq_T + 1).double() / TAU_FLOOR).clamp(min=1).log()
        logit_T_H_L = q_T_H_C.double() @ k_L_C.T * WIDTH**-0.5 + bias_T_H_L
        hidden_T_L = distance_T_L < 0
        if self.group.window is not None:
            hidden_T_L |= distance_T_L >= self.group.window
        logit_T_H_L = logit_T_H_L * tau_T[:, None, None]
        return logit_T_H_L.masked_fill(hidden_T_L[:, None], -torch.inf).softmax(-1) @ v_L_C


def cut(total: int, sizes: list[int] | None) -> list[range]:
    ends = np.cumsum([0, *(sizes or [total])]).tolist()
    return [range(a, b) for a, b in pairwise(ends)]


def random_runs(dice: random.Random) -> list[tuple[PageClass, int]]:
    counts = (dice.choice((0, 0, 0, 1)), 2, dice.choice((0, 1, 3)), 2)
    classes = (PageClass.TEXT, PageClass.AUDIO, PageClass.VIDEO, PageClass.REPLY)
    return [(c, n) for c, n in zip(classes, counts, strict=True) if n]


@pytest.mark.parametrize("window", [None, 30])
def test_every_step_of_a_rolling_session(window: int | None) -> None:
    dice, talk = random.Random(3), Conversation(window)
    for _ in range(150):
        actual, expected = talk.tick(random_runs(dice), attend=True)
        assert_matches(actual, expected, dtype=torch.float32)
    assert talk.cache.length(talk.session) > 600 and len(talk.kept) < 64
    talk.cache.check_invariants()


@pytest.mark.slow
def test_a_long_session_is_as_right_at_its_end() -> None:
    """And everything is still where the books say. TML_TEST_LONG=1 is 100,000 steps."""
    dice, talk = random.Random(4), Conversation()
    steps = 100_000 if os.environ.get("TML_TEST_LONG") == "1" else 20_000
    for n in range(steps):
        check = n % 200 == 199
        result = talk.tick(random_runs(dice), attend=check)
        if check:
            assert_matches(*result, dtype=torch.float32)
    talk.cache.check_invariants()
    assert talk.cache.length(talk.session) > 5 * steps


def test_pieces_of_an_append_are_the_same_attention() -> None:
    """Whole or one by one; near only on the CPU, where products of other shapes have other bits."""
    dice, talk = random.Random(5), Conversation()
    for n in range(60):
        runs = random_runs(dice)
        total = sum(tokens for _, tokens in runs)
        sizes = [1] * total if n % 2 else [1, total - 1]
        actual, expected = talk.tick(runs, attend=True, sizes=sizes)
        assert_matches(actual, expected, dtype=torch.float32)


@pytest.mark.parametrize("window", [None, 30])
def test_what_was_rewound_leaves_no_trace(window: int | None) -> None:
    """Other page ids, and rows with tokens of the dropped future in them: bitwise the same."""
    roomy = dict.fromkeys(CLASSES, 30)  # else what a detour pushes out is gone for good
    plain, detoured = (Conversation(window, history=12, budgets=roomy) for _ in range(2))
    detoured.table_B_X = plain.table_B_X
    dice = random.Random(6)
    for n in range(30):
        if n % 3 == 2:
            kept, position = dict(detoured.kept), detoured.cache.length(detoured.session)
            detoured.tick([(PageClass.REPLY, 3), (PageClass.TEXT, 1)], attend=False)
            detoured.cache.rewind(detoured.session, position)
            detoured.kept = kept
        runs, results = random_runs(dice), []
        for talk in (plain, detoured):
            torch.manual_seed(n)
            results.append(talk.tick(runs, attend=True))
        assert_bitwise(results[1][0], results[0][0])
        assert_matches(*results[1], dtype=torch.float32)
    assert len(plain.kept) > 12
