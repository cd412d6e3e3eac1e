"""Drafted steps are those of step-by-step sampling: to the token, and so in distribution."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from scipy import stats
from torch import Tensor

from tml_kernels.testing import assert_bitwise, randn
from tml_runtime.model.output import Drawing
from tml_runtime.model.verify import Verified, draw, verify_draft

V, STEPS, FIRST = 4, 3, 2  # three tokens in a row, the first after token 2
NAN = float("nan")

# A model in which a token's logits follow from the one before, and what drafts for it.
MODEL_V_V = 1.2 * torch.sin(torch.arange(16.0) ** 2).reshape(V, V)
DRAFTS = {
    "the model itself": MODEL_V_V,
    "near it": MODEL_V_V + 0.4 * torch.cos(torch.arange(16.0)).reshape(V, V),
    "its opposite": -3.0 * MODEL_V_V,
    "one token": torch.tensor([0.0, -99.0, -99.0, -99.0]).expand(V, V),
}
SETTINGS = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "narrow": {"temperature": 1.5, "top_k": 3, "top_p": 0.9, "min_p": 0.05},
    "greedy": {"temperature": 0.0},
}


def drawing_of(
    num_rows: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    device: str = "cpu",
) -> Drawing:
    """Rows of one session, each with counts of its own."""
    return Drawing(
        torch.full((num_rows,), temperature, device=device),
        torch.full((num_rows,), top_k, dtype=torch.int32, device=device),
        torch.full((num_rows,), top_p, device=device),
        torch.full((num_rows,), min_p, device=device),
        torch.full((num_rows,), 5, device=device),
        STEPS * torch.arange(num_rows, device=device),
    )


def rows(drawing: Drawing, index_R: Tensor) -> Drawing:
    return Drawing(*(setting_S[index_R] for setting_S in drawing))


def one_by_one(drawing: Drawing) -> Tensor:
    token_S = torch.full_like(drawing.top_k_S, FIRST)
    said = []
    for k in range(STEPS):
        token_S, fault_S = draw(MODEL_V_V[token_S], drawing, k, fallback=0)
        assert not fault_S.any()
        said.append(token_S)
    return torch.stack(said, 1)


def draft_and_verify(drawing: Drawing, draft_V_V: Tensor, begin_S: Tensor, step: int) -> Verified:
    """One pass for the steps from `step` to the last, after token `begin`."""
    token_S, drafted = begin_S, []
    for k in range(step, STEPS - 1):
        token_S, _ = draw(draft_V_V[token_S], drawing, k, fallback=0)
        drafted.append(token_S)
    draft_S_J = torch.stack([begin_S, *drafted], 1)[:, 1:]
    inputs_S_K = torch.cat([begin_S[:, None], draft_S_J], 1)
    return verify_draft(MODEL_V_V[inputs_S_K], draft_S_J, drawing, step, fallback=0)


def in_passes(drawing: Drawing, draft_V_V: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens [S, STEPS], how many the first pass gave [S])."""
    num_rows = len(drawing.seed_S)
    token_S_K = torch.full((num_rows, STEPS), -1, dtype=torch.int32)
    length_S = torch.zeros(num_rows, dtype=torch.int64)
    first_S = torch.zeros(0)
    for k in range(STEPS):  # rows that are at step k all go on from there
        at_R = (length_S == k).nonzero()[:, 0]
        before_R = token_S_K[at_R, k - 1] if k else torch.full_like(at_R, FIRST, dtype=torch.int32)
        done = draft_and_verify(rows(drawing, at_R), draft_V_V, before_R, k)
        token_S_K[at_R, k:] = done.token_S_K
        length_S[at_R] += done.length_S
        first_S = done.length_S if k == 0 else first_S
    assert (length_S == STEPS).all()
    return token_S_K, first_S


def probabilities(setting: dict) -> Tensor:
    """[V, V] of the next token, by the definition of each setting; written for these few."""
    kept_V_V = torch.zeros(V, V, dtype=torch.float64)
    for v in range(V):
        p_V = torch.softmax(MODEL_V_V[v].double() / setting.get("temperature", 1.0), 0)
        order = p_V.argsort(descending=True).tolist()[: setting.get("top_k") or V]
        total, mass = sum(float(p_V[u]) for u in order), 0.0
        for u in order:
            if mass < setting.get("top_p", 1.0) * total and p_V[u] >= setting.get(
                "min_p", 0.0
            ) * float(p_V.max()):
                kept_V_V[v, u] = p_V[u]
            mass += float(p_V[u])
    return kept_V_V / kept_V_V.sum(1, keepdim=True)


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_drafted_tokens_are_those_of_step_by_step_sampling(draft: str, setting: str) -> None:
    drawing = drawing_of(2000, **SETTINGS[setting])
    token_S_K, first_S = in_passes(drawing, DRAFTS[draft])
    assert_bitwise(token_S_K, one_by_one(drawing))
    if draft == "the model itself":
        assert (first_S == STEPS).all()
    elif draft == "its opposite" and setting == "greedy":
        assert (first_S == 1).all()


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "greedy"])
@pytest.mark.parametrize("draft", ["near it", "one token"])
def test_three_tokens_follow_the_models_joint_distribution(draft: str, setting: str) -> None:
    n = 20_000
    token_S_K, _ = in_passes(drawing_of(n, **SETTINGS[setting]), DRAFTS[draft])
    p_V_V = probabilities(SETTINGS[setting])
    expected = torch.stack(
        [
            n * p_V_V[FIRST, a] * p_V_V[a, b] * p_V_V[b, c]
            for a, b, c in product(range(V), repeat=STEPS)
        ]
    )
    observed = torch.bincount((token_S_K.long() * torch.tensor([V * V, V, 1])).sum(1), minlength=64)
    kept = expected > 0
    assert (observed[~kept] == 0).all()
    often = expected > 5  # the others as one, or the chi-square limit would not apply
    assert often.sum() > 20
    cells = [
        torch.cat([count[often], count[~often].sum()[None]]).numpy()
        for count in (observed.double(), expected)
    ]
    used = cells[1] > 0
    # Fixed seeds: a p-value under 1e-3 would be a defect, not bad luck.
    assert stats.chisquare(cells[0][used], cells[1][used]).pvalue > 1e-3


@pytest.mark.parametrize("draft", ["near it", "its opposite"])
def test_drafts_are_kept_as_often_as_the_coupling_promises(draft: str) -> None:
    n = 20_000
    drawing = drawing_of(n)
    begin_S = torch.full((n,), FIRST, dtype=torch.int32)
    kept_S = draft_and_verify(drawing, DRAFTS[draft], begin_S, 1).length_S - 1
    p_V, q_V = (logits[FIRST].double().softmax(0) for logits in (MODEL_V_V, DRAFTS[draft]))
    least = float(torch.minimum(p_V, q_V).sum() / torch.maximum(p_V, q_V).sum())
    most = float(torch.minimum(p_V, q_V).sum())  # of any scheme
    assert least - 0.015 < float(kept_S.double().mean()) < most + 0.015


def case(num_rows: int = 6, steps: int = 4) -> dict:
    """Rows that are right for none, one, two, ... steps."""
    drawing = drawing_of(num_rows)
    logits_S_K_V = randn(num_rows, steps, 9)
    right = verify_draft(
        logits_S_K_V, torch.full((num_rows, steps - 1), -1, dtype=torch.int32), drawing, fallback=3
    )
    assert (right.length_S == 1).all() and (right.token_S_K[:, 1:] == -1).all()
    drawn = [draw(logits_S_K_V[:, k].contiguous(), drawing, k, fallback=3)[0] for k in range(steps)]
    draft_S_J = torch.stack(drawn, 1)[:, :-1].clone()
    for s in range(num_rows):
        draft_S_J[s, s % steps :] = (draft_S_J[s, s % steps :] + 1) % 9
    return {
        "logits_S_K_V": logits_S_K_V,
        "draft_S_J": draft_S_J,
        "drawing": drawing,
        "fallback": 3,
        "drawn_S_K": torch.stack(drawn, 1),
    }


def test_a_row_ends_at_its_first_wrong_draft() -> None:
    inputs = case()
    drawn_S_K = inputs.pop("drawn_S_K")
    done = verify_draft(**inputs)
    assert done.length_S.tolist() == [1, 2, 3, 4, 1, 2]
    for s, length in enumerate(done.length_S.tolist()):
        assert_bitwise(done.token_S_K[s, :length], drawn_S_K[s, :length])
        assert (done.token_S_K[s, length:] == -1).all()


def test_a_draft_that_was_wrong_beside_its_token_ends_the_row() -> None:
    inputs = case()
    del inputs["drawn_S_K"]
    agrees_S_J = torch.ones_like(inputs["draft_S_J"], dtype=torch.bool)
    agrees_S_J[3, 1] = agrees_S_J[5, 0] = agrees_S_J[0, 2] = False
    done = verify_draft(**inputs, agrees_S_J=agrees_S_J)
    assert done.length_S.tolist() == [1, 2, 3, 2, 1, 1]


def test_a_row_does_not_depend_on_its_neighbours_or_place() -> None:
    inputs = case()
    del inputs["drawn_S_K"]
    together = verify_draft(**inputs)

    def taken(index_R: Tensor) -> Verified:
        per_row = {name: inputs[name][index_R] for name in ("logits_S_K_V", "draft_S_J")}
        return verify_draft(
            **per_row, drawing=rows(inputs["drawing"], index_R), fallback=inputs["fallback"]
        )

    for index_R in (*torch.arange(6)[:, None], torch.arange(6).flip(0), torch.arange(0)):
        for ours, theirs in zip(taken(index_R), together, strict=True):
            assert_bitwise(ours, theirs[index_R])


def test_a_fault_counts_where_its_step_does() -> None:
    inputs = case()
    del inputs["drawn_S_K"]
    inputs["logits_S_K_V"][2, 0, 1] = NAN  # at the beginning: the draft of it is wrong now
    inputs["logits_S_K_V"][0, 2] = NAN  # behind the end
    inputs["logits_S_K_V"][3, 2, 8] = NAN
    inputs["draft_S_J"][3, 2] = 3  # what a fault says is what was drafted
    done = verify_draft(**inputs)
    assert done.fault_S.tolist() == [False, False, True, True, False, False]
    assert done.length_S.tolist() == [1, 2, 1, 4, 1, 2]
    assert done.token_S_K[2, 0] == 3 and done.token_S_K[3, 2] == 3


def test_one_step_is_a_plain_draw() -> None:
    logits_S_V, drawing = randn(5, 9), drawing_of(5)
    nothing = torch.empty(5, 0, dtype=torch.int32)
    done = verify_draft(logits_S_V[:, None], nothing, drawing, 7, fallback=0)
    assert_bitwise(done.token_S_K[:, 0], draw(logits_S_V, drawing, 7, fallback=0)[0])
    assert (done.length_S == 1).all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits_S_K_V": torch.zeros(6, 0, 9)}, ValueError, "K=0"),
        ({"logits_S_K_V": torch.zeros(6, 4, 9).double()}, TypeError, "logits_S_K_V"),
        ({"draft_S_J": torch.zeros(6, 4, dtype=torch.int32)}, ValueError, "J=4, .* K=4"),
        ({"draft_S_J": torch.zeros(5, 3, dtype=torch.int32)}, ValueError, "draft_S_J: S=5"),
        ({"draft_S_J": torch.zeros(6, 3)}, TypeError, "draft_S_J"),
        ({"agrees_S_J": torch.ones(6, 2, dtype=torch.bool)}, ValueError, "agrees_S_J: J=2"),
        ({"agrees_S_J": torch.ones(6, 3)}, TypeError, "agrees_S_J"),
        ({"drawing": drawing_of(5)}, ValueError, "S"),
        ({"fallback": 9}, ValueError, "fallback"),
    ],
)
def test_bad_input_is_named(change: dict, error: type, words: str) -> None:
    inputs = case()
    del inputs["drawn_S_K"]
    with pytest.raises(error, match=words):
        verify_draft(**inputs | change)


@pytest.mark.gpu
def test_a_graph_holds_it() -> None:
    """And another content of the same shapes is another answer of the same graph."""
    inputs = case(num_rows=32)
    del inputs["drawn_S_K"]
    drawing = Drawing(*(setting_S.cuda() for setting_S in inputs["drawing"]))
    logits, draft = inputs["logits_S_K_V"].cuda(), inputs["draft_S_J"].cuda()
    verify_draft(logits, draft, drawing, fallback=3)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        done = verify_draft(logits, draft, drawing, fallback=3)
    for draft_S_J in (inputs["draft_S_J"], inputs["draft_S_J"].roll(1, 0)):
        draft.copy_(draft_S_J)
        graph.replay()
        expected = verify_draft(**inputs | {"draft_S_J": draft_S_J})
        for ours, theirs in zip(done, expected, strict=True):
            assert_bitwise(ours.cpu(), theirs)
