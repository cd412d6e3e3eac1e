"""sample's kernel against the oracle and the plain path, in the interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from kernel_sample import SMALL, random_options, rows_of, run_kernel, take_rows
from torch import Tensor

from tml_kernels.ops.sample import sample
from tml_kernels.ops.sample.cases import BENCH, EDGE, Case
from tml_kernels.ops.sample.configs import (
    SHIPPED,
    Config,
    Problem,
    choose_config,
    scratch_sizes,
    scratch_words,
)
from tml_kernels.ops.sample.reference import sample_ref
from tml_kernels.testing import assert_bitwise, randn

NAN, INF = float("nan"), float("inf")


def assert_as_oracle(inputs: dict, config: Config | None = SMALL) -> tuple[Tensor, Tensor]:
    token, fault = run_kernel(inputs, config)
    expected, expected_fault = sample_ref(**inputs)
    assert_bitwise(token, expected)
    assert_bitwise(fault, expected_fault)
    return token, fault


def few_rows(case: Case, device: str) -> dict:
    """Rows of a case that are slow to interpret: one with each of its ways to draw."""
    inputs = case.make_inputs(device)
    return take_rows(inputs, slice(0, 8)) if device == "cpu" else inputs


@pytest.mark.parametrize("case", [*EDGE, Case(2, 320, num_hidden=58), Case(3, 1000)], ids=str)
def test_kernel(case: Case, device: str) -> None:
    assert_as_oracle(few_rows(case, device))


def test_kernel_as_shipped(device: str) -> None:
    """Many blocks, runs that are skipped, and the padding behind an odd width."""
    inputs = Case(4, 5001).make_inputs(device)
    assert_as_oracle(take_rows(inputs, slice(1, 4)), config=None)


def test_kernel_over_the_whole_vocabulary(device: str) -> None:
    logits = Case(1, 201024, num_hidden=966).make_inputs(device)["logits_S_V"]
    assert_as_oracle(rows_of(logits, 1, temperature=0.5, top_p=0.5), config=None)


@pytest.mark.parametrize(
    "config", [Config(16, 16, 16, 1), Config(16, 128, 64, 1), Config(4, 32, 8, 1)], ids=str
)
def test_every_cut_gives_the_same(config: Config, device: str) -> None:
    inputs = few_rows(Case(8, 90), device)
    assert_as_oracle(take_rows(inputs, slice(4, 6)), config)


def contested(num_rows: int, vocabulary: int, device: str) -> dict:
    """Rows from flat to peaked, cold and hot: draws that are won by much and by little."""
    logits = randn(num_rows, vocabulary, device=device)
    s = torch.arange(num_rows, device=device)
    logits *= torch.tensor([0.0, 0.3, 2.0, 20.0], device=device)[s % 4][:, None]
    logits[s % 5 == 1, 3] = logits.max() + 2.0  # one that takes most of the mass
    inputs = rows_of(logits[0], num_rows) | {"logits_S_V": logits}
    temperature = torch.tensor([1e-38, 0.01, 0.7, 1.0, 30.0, 1e35], device=device)[s % 6]
    return inputs | {"temperature_S": temperature}


def test_bounds_never_leave_out_the_best_draw(device: str) -> None:
    num_rows = 48 if device == "cpu" else 12_000
    assert_as_oracle(contested(num_rows, 150, device))


@pytest.mark.parametrize("top_k", [0, 40])
def test_top_p_decides_by_runs_as_by_columns(top_k: int, device: str) -> None:
    num_rows = 30 if device == "cpu" else 12_000
    inputs = contested(num_rows, 150, device)
    s = torch.arange(num_rows, device=device)
    inputs["top_p_S"] = torch.tensor([0.02, 0.3, 0.6, 0.9, 0.99], device=device)[s % 5]
    inputs["top_k_S"] = torch.full_like(inputs["top_k_S"], top_k)
    assert_as_oracle(inputs)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {}, {"top_k": 4}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.5}]
)
def test_ties_go_to_the_lowest_id(options: dict, device: str) -> None:
    """Five values, both zeros among them, over several blocks."""
    values = torch.tensor([0.0, -0.0, 1.0, 1.5, -INF], device=device)
    logits = values[torch.randint(5, (150,)).to(device)]
    assert_as_oracle(rows_of(logits, 2, **options))


@pytest.mark.parametrize(
    "options",
    [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-6}, {"top_k": 3, "top_p": 0.4}, {"top_p": 0.9}],
)
def test_flat_rows_are_narrowed_to_few(options: dict, device: str) -> None:
    """Most draws are refused here, again and again."""
    for logits in (torch.zeros(100), 0.01 * randn(100)):
        assert_as_oracle(rows_of(logits.to(device), 1, **options))


@pytest.mark.parametrize("top_k", [90, 99, 100, 2**31 - 1])
def test_top_k_of_nearly_all(top_k: int, device: str) -> None:
    logits = randn(100, device=device)
    logits[::3] = -INF
    assert_as_oracle(rows_of(logits, 2, top_k=top_k, top_p=0.8))


@pytest.mark.parametrize("case", [Case(7, 77), Case(3, 33)], ids=str)
def test_options(case: Case, device: str) -> None:
    inputs = few_rows(case, device)
    plain, _ = run_kernel(inputs)
    token, fault = assert_as_oracle(random_options(inputs))
    assert not fault.any()
    assert (token != plain).any()


@pytest.mark.parametrize(
    "names", [("min_p_S",), ("bias_id_S_N", "bias_S_N"), ("seen_S_W", "penalty_S")]
)
def test_one_option_alone(names: tuple, device: str) -> None:
    inputs = take_rows(Case(6, 90).make_inputs(device), slice(1, 6, 2))
    given = random_options(inputs)
    given["min_p_S"] = torch.full_like(given["min_p_S"], 0.2)
    assert_as_oracle(inputs | {name: given[name] for name in names})


def test_everything_forbidden_is_a_fault(device: str) -> None:
    inputs = rows_of(randn(3, device=device), 2, top_p=0.9) | {"fallback": 1}
    inputs["bias_id_S_N"] = torch.tensor([[2, 1, 0], [2, 1, 2]], device=device).int()
    inputs["bias_S_N"] = torch.full((2, 3), -INF, device=device)
    inputs["logits_S_V"][:, 1] = INF  # also what is infinite
    token, fault = run_kernel(inputs)
    assert fault.tolist() == [True, False]
    assert token.tolist() == [1, 0]


def test_mass_within_rounding_of_p(device: str) -> None:
    """At the edge of top-p the kernel draws as the oracle does for a p next to it."""
    logits = randn(60, device=device, scale=2.0)
    p_V = torch.softmax(logits.double(), 0).sort(descending=True).values.cumsum(0)
    draws = 8
    inputs = rows_of(logits, draws)
    inputs["top_p_S"] = p_V[:draws].float()
    token, _ = run_kernel(inputs)
    near = []
    for scale in (1.0 - 2e-6, 1.0 + 2e-6):
        inputs["top_p_S"] = (p_V[:draws] * scale).float()
        near.append(sample_ref(**inputs)[0])
    assert ((token == near[0]) | (token == near[1])).all()


def test_fault_rows_fall_back_alone(device: str) -> None:
    inputs = rows_of(randn(100, device=device), 6, temperature=0.8, top_p=0.9)
    expected, _ = run_kernel(inputs)
    inputs["logits_S_V"][0, 99] = NAN
    inputs["logits_S_V"][2] = -INF
    inputs["logits_S_V"][3, :64] = NAN  # a whole block
    inputs["logits_S_V"][5, 1:] = -INF
    inputs["temperature_S"][3] = 0.0
    token, fault = run_kernel(inputs | {"fallback": 9})
    assert fault.tolist() == [True, False, True, True, False, False]
    assert token.tolist() == [9, int(expected[1]), 9, 9, int(expected[4]), 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-30])
@pytest.mark.parametrize("top_p", [1.0, 0.99])
def test_extreme_logits(temperature: float, top_p: float, device: str) -> None:
    rows = torch.full((5, 80), -INF)
    rows[0, [3, 70]] = torch.tensor([3.0, INF])  # +inf wins
    rows[1, [3, 70]] = -3e38  # far below what a temperature can divide
    rows[2, [3, 69, 70]] = torch.tensor([-3e38, 0.0, 3e38])
    rows[3, 40] = 5.0  # one candidate
    rows[4, [2, 40, 70]] = torch.tensor([5.0, INF, INF])  # they share the draw
    inputs = rows_of(rows[0], 5, temperature=temperature, top_p=top_p)
    inputs["logits_S_V"] = rows
    token, fault = run_kernel(
        {k: v.to(device) if k != "fallback" else v for k, v in inputs.items()}
    )
    assert not fault.any()
    assert_bitwise(token.cpu(), sample_ref(**inputs, dtype=torch.float32)[0])


@pytest.mark.parametrize(
    "change",
    [
        {"temperature_S": NAN},
        {"temperature_S": INF},
        {"temperature_S": -1.0},
        {"top_p_S": NAN},
        {"top_p_S": -1.0},
        {"top_p_S": 7.0},
        {"top_k_S": -3},
    ],
    ids=str,
)
def test_what_the_plain_path_refuses_still_ends_in_a_token(change: dict, device: str) -> None:
    """A device cannot raise: such a row gets some token that could be drawn, and ends."""
    logits = randn(40, device=device)
    logits[20:] = -INF
    inputs = rows_of(logits, 2, top_k=30)
    for name, value in change.items():
        inputs[name] = torch.full_like(inputs[name], value)
    token, fault = run_kernel(inputs)
    assert not fault.any()
    assert ((token >= 0) & (token < 20)).all()


def test_row_does_not_depend_on_neighbours_or_place(device: str) -> None:
    inputs = few_rows(Case(8, 77), device)
    together, _ = run_kernel(inputs)
    alone = take_rows(inputs, slice(2, 3))
    assert_bitwise(run_kernel(alone)[0], together[2:3])
    order = torch.tensor([7, 2, 5, 1, 0], device=device)
    turned = take_rows(inputs, order)
    turned["logits_S_V"][1] = NAN
    token, fault = run_kernel(turned)
    assert fault.tolist() == [False, True, False, False, False]
    others = [0, 2, 3, 4]
    assert_bitwise(token[others], together[order][others])


def test_a_scratch_serves_one_call_after_another(device: str) -> None:
    """Its counters are zero again, nothing else needs to be, and nothing behind it is touched."""
    inputs = take_rows(Case(4, 150).make_inputs(device), slice(2, 4))
    sizes = scratch_sizes(2, 150, SMALL)
    scratch = torch.full((sum(sizes) + 5,), -(2**30), dtype=torch.int32, device=device)
    scratch[: sizes[0]] = 0
    first = run_kernel(inputs, scratch=scratch)
    other = inputs | {"counter_S": inputs["counter_S"] + 1, "logits_S_V": -inputs["logits_S_V"]}
    run_kernel(other, scratch=scratch)
    again = run_kernel(inputs, scratch=scratch)
    assert not scratch[: sizes[0]].any()
    assert (scratch[sum(sizes) :] == -(2**30)).all()
    assert_bitwise(again[0], first[0])
    assert_bitwise(again[0], run_kernel(inputs)[0])


def test_every_vocabulary_has_a_config() -> None:
    for vocabulary in (1, 127, 320, 201024, 262144, 262145, 1 << 20):
        problem = Problem(vocabulary)
        config = choose_config(problem)
        assert config.why_not(problem) is None
        assert sum(scratch_sizes(3, vocabulary, config)) == scratch_words(3, vocabulary)
    assert SHIPPED[0].why_not(Problem(262145)) is not None
    assert Config(run_v=128, block_v=64).why_not(Problem(320)) is not None
    assert Config(run_v=128, look_v=64).why_not(Problem(320)) is not None
    with pytest.raises(ValueError, match="V=1048577"):
        choose_config(Problem((1 << 20) + 1))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 7, 64])
def test_gpu_options_at_full_size(num_rows: int) -> None:
    inputs = Case(num_rows, 201024, num_hidden=966).make_inputs("cuda")
    assert_as_oracle(random_options(inputs), config=None)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 7, 64])
def test_gpu_full_size(num_rows: int) -> None:
    """Every way to draw, with 64 rows; run again, bitwise the same."""
    inputs = Case(num_rows, 201024, num_hidden=966).make_inputs("cuda")
    first, _ = assert_as_oracle(inputs, config=None)
    scratch = torch.zeros(scratch_words(num_rows, 201024), dtype=torch.int32, device="cuda")
    for _ in range(20):
        token, fault = sample(**inputs, scratch_M=scratch)
        assert_bitwise(token, first)
        assert not fault.any()
    for s in range(0, num_rows, 9):
        assert_bitwise(sample(**take_rows(inputs, slice(s, s + 1)))[0], first[s : s + 1])


@pytest.mark.gpu
@pytest.mark.parametrize("case", BENCH, ids=str)
def test_gpu_bench_cases(case: Case) -> None:
    assert_as_oracle(case.make_inputs("cuda"), config=None)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [300_001, 1_000_000])
def test_gpu_wide_rows(vocabulary: int) -> None:
    assert_as_oracle(Case(12, vocabulary).make_inputs("cuda"), config=None)


def test_a_min_p_above_one_is_one(device: str) -> None:
    logits = torch.zeros(5, device=device)
    given = rows_of(logits, 40) | {"min_p_S": torch.ones(40, device=device)}
    token, _ = run_kernel(given)
    assert token.unique().numel() == 5  # equals of the best are kept
    above, _ = run_kernel(given | {"min_p_S": given["min_p_S"] * 1.5})
    assert_bitwise(above, token)


def test_a_bias_of_an_id_beyond_the_vocabulary_is_unused(device: str) -> None:
    given = rows_of(torch.randn(5, device=device), 3)
    bias_id = torch.tensor([[5], [7], [2**31 - 1]], dtype=torch.int32, device=device)
    bias = torch.full((3, 1), float("inf"), device=device)
    token, fault = run_kernel(given | {"bias_id_S_N": bias_id, "bias_S_N": bias})
    assert not fault.any()
    assert_bitwise(token, run_kernel(given)[0])
