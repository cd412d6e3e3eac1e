from __future__ import annotations

import pytest
import torch
from kernel_sample import PER_ROW, random_options, rows_of, take_rows
from scipy import stats
from torch import Tensor

from tml_kernels.ops.sample import sample
from tml_kernels.ops.sample.cases import EDGE, MODEL, Case
from tml_kernels.ops.sample.reference import edit_ref, sample_ref
from tml_kernels.testing import assert_bitwise, randn

NAN, INF = float("nan"), float("inf")


def check(case: Case, device: str) -> None:
    inputs = case.make_inputs(device)
    token, fault = sample(**inputs)
    expected, expected_fault = sample_ref(**inputs)
    assert_bitwise(token, expected)
    assert_bitwise(fault, expected_fault)
    assert not fault.any()
    assert (inputs["logits_S_V"].gather(1, token[:, None].long()) > -INF).all()


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_public(case: Case) -> None:
    check(case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_gpu(case: Case) -> None:
    check(case, "cuda")


def kept_probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The distribution to draw from, written as a loop over the tokens in order."""
    p = torch.softmax(logits.double() / temperature, 0)
    order = sorted(range(len(p)), key=lambda v: (-float(logits[v]), v))
    order = order[: top_k or len(order)]
    mass, kept, total = 0.0, [], sum(float(p[v]) for v in order)
    for v in order:
        if kept and mass >= top_p * total:
            break
        kept.append(v)
        mass += float(p[v])
    result = torch.zeros_like(p)
    result[kept] = p[kept] / p[kept].sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.7), (1.3, 6, 0.8)],
)
@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_draws_follow_the_distribution(
    place: str, temperature: float, top_k: int, top_p: float
) -> None:
    n, logits = 20_000, 1.5 * torch.sin(torch.arange(20.0) ** 2)
    token, fault = sample(
        **rows_of(logits.to(place), n, temperature=temperature, top_k=top_k, top_p=top_p)
    )
    assert not fault.any()
    observed = torch.bincount(token.long().cpu(), minlength=20)
    expected = n * kept_probabilities(logits, temperature, top_k, top_p)
    kept = expected > 0
    assert (observed[~kept] == 0).all()
    assert kept.sum() > 1
    assert float(expected[kept].min()) > 5  # or the chi-square limit would not apply
    # Fixed seeds: a p-value under 1e-3 would be a defect, not bad luck.
    assert stats.chisquare(observed[kept], expected[kept]).pvalue > 1e-3


def test_successive_draws_are_independent() -> None:
    token, _ = sample(**rows_of(torch.zeros(4), 20_000))
    pairs = torch.bincount(4 * token[:-1].long() + token[1:].long(), minlength=16)
    assert stats.chisquare(pairs).pvalue > 1e-3


def test_sessions_with_one_counter_are_independent() -> None:
    inputs = rows_of(torch.zeros(4), 20_000)
    inputs["seed_S"], inputs["counter_S"] = inputs["counter_S"], inputs["seed_S"]
    token, _ = sample(**inputs)
    assert stats.chisquare(torch.bincount(token.long(), minlength=4)).pvalue > 1e-3


def test_greedy_takes_the_largest_and_ties_go_to_the_lowest_id() -> None:
    logits = torch.tensor([1.0, 3.0, -2.0, 3.0, 3.0])
    token, _ = sample(**rows_of(logits, 50, temperature=0.0, top_k=2, top_p=0.1))
    assert (token == 1).all()


def test_ties_at_the_edge_of_top_k_and_top_p_keep_the_lowest_ids() -> None:
    logits = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    token, _ = sample(**rows_of(logits, 500, top_k=2))
    assert set(token.tolist()) == {1, 3}
    token, _ = sample(**rows_of(logits, 500, top_k=4))
    assert set(token.tolist()) == {0, 1, 3, 4}
    token, _ = sample(**rows_of(torch.zeros(8), 500, top_p=0.25))
    assert set(token.tolist()) == {0, 1}


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-6}])
def test_the_best_is_always_kept(options: dict) -> None:
    token, fault = sample(**rows_of(torch.sin(torch.arange(30.0)), 200, **options))
    assert (token == 14).all()  # sin(14) = 0.99 is the largest
    assert not fault.any()


def test_row_does_not_depend_on_neighbours_or_place() -> None:
    inputs = Case(40, 77).make_inputs("cpu")
    together, _ = sample(**inputs)
    for s in range(40):
        alone = inputs | {name: inputs[name][s : s + 1].clone() for name in PER_ROW}
        assert_bitwise(sample(**alone)[0], together[s : s + 1])
    turned = inputs | {name: inputs[name].flip(0).contiguous() for name in PER_ROW}
    assert_bitwise(sample(**turned)[0], together.flip(0))


def test_draw_depends_on_seed_and_counter() -> None:
    logits = torch.zeros(1000)
    inputs = rows_of(logits, 64)
    token, _ = sample(**inputs)
    other, _ = sample(**inputs | {"seed_S": inputs["seed_S"] + 1})
    again, _ = sample(**inputs)
    assert_bitwise(token, again)
    assert (token != other).sum() > 55
    assert token.unique().numel() > 55


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_fault_rows_fall_back_alone(temperature: float) -> None:
    inputs = rows_of(randn(16), 6, temperature=temperature, top_k=5, top_p=0.9)
    expected, _ = sample(**inputs)
    inputs["logits_S_V"][1, 7] = NAN
    inputs["logits_S_V"][3] = -INF
    inputs["logits_S_V"][4, :15] = NAN
    token, fault = sample(**inputs | {"fallback": 9})
    assert fault.tolist() == [False, True, False, True, True, False]
    assert token[fault].tolist() == [9, 9, 9]
    assert_bitwise(token[~fault], expected[~fault])


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-30])
def test_extreme_logits(temperature: float) -> None:
    rows = torch.tensor(
        [
            [0.0, INF, -INF, 3.0],  # +inf wins
            [-INF, -3e38, -INF, -3e38],  # far below what a temperature can divide
            [3e38, -3e38, 0.0, -INF],
            [-INF, -INF, 5.0, -INF],  # one candidate
        ]
    )
    inputs = rows_of(rows[0], 4, temperature=temperature, top_p=0.99) | {"logits_S_V": rows}
    token, fault = sample(**inputs)
    assert not fault.any()
    assert token[[0, 2, 3]].tolist() == [1, 0, 2]
    assert token[1] in (1, 3)


def test_several_infinite_logits_share_the_draw() -> None:
    logits = torch.tensor([5.0, INF, -INF, INF])
    token, _ = sample(**rows_of(logits, 100))
    assert set(token.tolist()) == {1, 3}
    token, _ = sample(**rows_of(logits, 100, temperature=0.0))
    assert set(token.tolist()) == {1}


def test_edits_follow_their_definition() -> None:
    inputs = random_options(Case(6, 77).make_inputs("cpu"))
    logits, bias_id, bias = (inputs[n] for n in ("logits_S_V", "bias_id_S_N", "bias_S_N"))
    words, penalty = inputs["seen_S_W"], inputs["penalty_S"]
    bias_id[:, 2] = bias_id[:, 1]  # twice the same id
    edited = edit_ref(logits.double(), bias_id, bias, words, penalty)
    for s in range(6):
        for v in range(77):
            value = float(logits[s, v])
            value += sum(float(bias[s, n]) for n in range(5) if bias_id[s, n] == v)
            if int(words[s, v // 32]) >> (v % 32) & 1:
                value = value / float(penalty[s]) if value > 0 else value * float(penalty[s])
            assert float(edited[s, v]) == pytest.approx(value, rel=1e-12)


def test_forbidden_ids_are_never_drawn() -> None:
    inputs = rows_of(torch.zeros(6), 300, top_p=0.9)
    inputs["bias_id_S_N"] = torch.tensor([0, 3, 5]).int().repeat(300, 1)
    inputs["bias_S_N"] = torch.full((300, 3), -INF)
    token, fault = sample(**inputs)
    assert not fault.any()
    assert set(token.tolist()) == {1, 2, 4}
    token, _ = sample(**inputs | {"temperature_S": torch.zeros(300)})
    assert (token == 1).all()


@pytest.mark.parametrize(("min_p", "kept"), [(0.0, 4), (0.2, 3), (0.5, 2), (0.6, 1), (1.0, 1)])
def test_min_p_keeps_what_is_near_the_best(min_p: float, kept: int) -> None:
    """At temperature 2 the probabilities are as 1, 0.55, 0.3 and 0.1."""
    logits = 2.0 * torch.tensor([1.0, 0.55, 0.3, 0.1]).log()
    inputs = rows_of(logits, 500, temperature=2.0) | {"min_p_S": torch.full((500,), min_p)}
    assert set(sample(**inputs)[0].tolist()) == set(range(kept))


def test_options_that_change_nothing() -> None:
    inputs = Case(20, 77).make_inputs("cpu")
    options = random_options(inputs)
    options["min_p_S"] = torch.zeros(20)
    options["penalty_S"] = torch.ones(20)
    options["bias_id_S_N"] = torch.full_like(options["bias_id_S_N"], -1)
    assert_bitwise(sample(**options)[0], sample(**inputs)[0])


def test_options_are_a_rows_own() -> None:
    inputs = random_options(Case(12, 77).make_inputs("cpu"))
    together, _ = sample(**inputs)
    expected, _ = sample_ref(**inputs)
    assert_bitwise(together, expected)
    for s in range(12):
        assert_bitwise(sample(**take_rows(inputs, slice(s, s + 1)))[0], together[s : s + 1])


def test_writes_into_out() -> None:
    inputs = Case(5, 20).make_inputs("cpu")
    out, fault = torch.empty(5, dtype=torch.int32), torch.empty(5, dtype=torch.bool)
    result = sample(**inputs, out_S=out, fault_S=fault)
    assert result[0] is out
    assert result[1] is fault
    assert_bitwise(out, sample(**inputs)[0])
    assert not fault.any()


def test_opcheck() -> None:
    inputs = Case(5, 20).make_inputs("cpu")
    out, fault = torch.empty(5, dtype=torch.int32), torch.empty(5, dtype=torch.bool)
    *rest, fallback = inputs.values()
    given = list(random_options(inputs).values())[-5:]
    for options in ([None] * 5, given):
        args = (*rest, *options, fallback, out, fault, None)
        torch.library.opcheck(torch.ops.tml_kernels.sample.default, args)


def biased(ids: list, bias: float) -> dict:
    id_S_N = torch.tensor(ids * 2, dtype=torch.int32)
    return {"bias_id_S_N": id_S_N, "bias_S_N": torch.full(id_S_N.shape, bias)}


def seen(num_words: int, penalty: float) -> dict:
    words = torch.zeros(2, num_words, dtype=torch.int32)
    return {"seen_S_W": words, "penalty_S": torch.full((2,), penalty)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits_S_V": torch.zeros(2, 8).half()}, TypeError, "logits_S_V.*float16"),
        ({"logits_S_V": torch.zeros(8, 2).T}, ValueError, "logits_S_V: must be contiguous"),
        ({"temperature_S": torch.zeros(3)}, ValueError, "temperature_S: S=3, but S=2"),
        ({"temperature_S": torch.tensor([1.0, -0.5])}, ValueError, "temperature_S: .*got -0.5"),
        ({"temperature_S": torch.tensor([NAN, 1.0])}, ValueError, "temperature_S: .*got nan"),
        ({"temperature_S": torch.tensor([INF, 1.0])}, ValueError, "temperature_S: .*got inf"),
        ({"top_k_S": torch.zeros(2).long()}, TypeError, "top_k_S.*int64"),
        ({"top_k_S": torch.tensor([3, -1]).int()}, ValueError, "top_k_S: .*got -1"),
        ({"top_p_S": torch.tensor([0.5, 1.5])}, ValueError, "top_p_S: .*got 1.5"),
        ({"top_p_S": torch.tensor([NAN, 0.5])}, ValueError, "top_p_S: .*got nan"),
        ({"seed_S": torch.zeros(2).int()}, TypeError, "seed_S.*int32"),
        ({"counter_S": torch.zeros(1).long()}, ValueError, "counter_S: S=1, but S=2"),
        ({"fallback": 8}, ValueError, "fallback: .*0..7, got 8"),
        ({"fallback": -1}, ValueError, "fallback: .*got -1"),
        ({"out_S": torch.zeros(2).long()}, TypeError, "out_S.*int64"),
        ({"fault_S": torch.zeros(3).bool()}, ValueError, "fault_S: S=3, but S=2"),
        ({"min_p_S": torch.tensor([0.5, 1.5])}, ValueError, "min_p_S: .*got 1.5"),
        ({"min_p_S": torch.zeros(3)}, ValueError, "min_p_S: S=3, but S=2"),
        ({"bias_S_N": torch.zeros(2, 1)}, ValueError, "bias_id_S_N: goes with bias_S_N"),
        ({"seen_S_W": torch.zeros(2, 1).int()}, ValueError, "penalty_S: goes with seen_S_W"),
        (biased([[3]], 0.5) | {"bias_S_N": torch.zeros(2, 2)}, ValueError, "N=2, but N=1"),
        (biased([[8]], 0.5), ValueError, "bias_id_S_N: .*-1..7, got 8"),
        (biased([[-2]], 0.5), ValueError, "bias_id_S_N: .*got -2"),
        (biased([[3]], INF), ValueError, "bias_S_N: .*got inf"),
        (biased([[3]], NAN), ValueError, "bias_S_N: .*got nan"),
        (seen(1, 0.0), ValueError, "penalty_S: .*got 0.0"),
        (seen(1, INF), ValueError, "penalty_S: .*got inf"),
        (seen(2, 1.0), ValueError, "seen_S_W: V=8 takes 1 words, got W=2"),
        ({"scratch_M": torch.zeros(99)}, TypeError, "scratch_M.*float32"),
        ({"scratch_M": torch.zeros(45).int()}, ValueError, "scratch_M: 258 words.*M=45"),
        ({"logits_S_V": torch.zeros(2, 8, requires_grad=True)}, RuntimeError, "no backward"),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    out = torch.full((2,), 7, dtype=torch.int32)
    inputs = rows_of(torch.zeros(8), 2) | {"out_S": out} | change
    with pytest.raises(error, match=words):
        sample(**inputs)
    assert (out == 7).all()
