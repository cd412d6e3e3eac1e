from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tml_kernels.ops.dmel import dmel_embed
from tml_kernels.ops.embed_tokens import TokenKind, embed_tokens
from tml_kernels.ops.embed_tokens.cases import EDGE, MODEL, Case
from tml_kernels.ops.embed_tokens.configs import SHIPPED, choose_config
from tml_kernels.ops.embed_tokens.kernel import launch_embed_tokens
from tml_kernels.ops.embed_tokens.reference import embed_tokens_ref
from tml_kernels.ops.rms_norm import rms_norm
from tml_kernels.testing import assert_bitwise, assert_matches

ALL_KINDS = Case(64, text=5, heard=4, embedded=3, steps=4, nothing=3, num_bands=6, num_levels=5)


def run_public(inputs: dict) -> Tensor:
    return embed_tokens(**inputs)


def run_kernel(inputs: dict) -> Tensor:
    out = inputs["embed_V_D"].new_empty(len(inputs["kind_T"]), inputs["embed_V_D"].shape[1])
    args: Any = (*inputs.values(), 1e-6, out)
    if len(out):
        launch_embed_tokens(*args)
    return out


PATHS = [
    pytest.param(run_public, "cpu", id="public"),
    pytest.param(run_kernel, None, id="kernel"),
    pytest.param(run_public, "cuda", id="gpu", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("run", "place"), PATHS)
@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_matches_the_oracle(run, place, case: Case, device: str) -> None:
    """Whose rows that no token names are NaN, or out of range."""
    inputs = case.make_inputs(place or device)
    assert_matches(run(inputs), embed_tokens_ref(**inputs), dtype=case.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_narrow_tables(place: str, dtype: torch.dtype) -> None:
    inputs = replace(ALL_KINDS, dtype=dtype).make_inputs(place)
    out = embed_tokens(**inputs)
    assert out.dtype == dtype
    assert_matches(out, embed_tokens_ref(**inputs))


def parts_of(inputs: dict) -> Tensor:
    """Token by token with the ops for one kind; a step is added up in the tables' dtype."""
    text = (inputs["embed_V_D"], inputs["embed_norm_D"])
    table = (inputs["table_Y_D"], inputs["table_norm_D"])

    def word(token: int) -> Tensor:
        return rms_norm(text[0][token : token + 1], text[1])

    def sound(levels: Tensor) -> Tensor:
        return dmel_embed(levels[None], *table, num_levels=inputs["num_levels"])

    rows = []
    for kind, index in zip(inputs["kind_T"].tolist(), inputs["index_T"].tolist(), strict=True):
        if kind == TokenKind.NOTHING:
            row = torch.zeros_like(text[0][:1])
        elif kind == TokenKind.TEXT:
            row = word(index)
        elif kind == TokenKind.LEVELS:
            row = sound(inputs["levels_A_B"][index])
        elif kind == TokenKind.EMBEDDED:
            row = inputs["x_P_D"][index : index + 1]
        else:
            row = word(int(inputs["token_N"][index]))
            for levels in inputs["levels_N_F_B"][index]:
                row = row + sound(levels)
        rows.append(row)
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_has_the_bits_of_its_parts(dtype: torch.dtype) -> None:
    inputs = replace(ALL_KINDS, dtype=dtype).make_inputs("cpu")
    assert_bitwise(embed_tokens(**inputs), parts_of(inputs))


@pytest.mark.parametrize(("run", "place"), PATHS)
def test_row_does_not_depend_on_neighbours(run, place, device: str) -> None:
    inputs = ALL_KINDS.make_inputs(place or device)
    together = run(inputs)
    names = ("kind_T", "index_T")
    for t in range(len(together)):
        alone = inputs | {name: inputs[name][t : t + 1].clone() for name in names}
        assert_bitwise(run(alone), together[t : t + 1])


@pytest.mark.parametrize(("run", "place"), PATHS)
def test_a_step_is_the_sum_of_its_parts(run, place, device: str) -> None:
    """The text row that its token has, and the rows its frames have when they are heard; with one
    frame of each the addition is exact to a rounding, so the bits are the same."""
    case = Case(96, text=3, steps=3, num_frames=1, num_bands=6, num_levels=5, dtype=torch.float32)
    inputs = case.make_inputs(place or device)
    at = inputs["kind_T"] == TokenKind.STEP
    row = inputs["index_T"][at]
    steps = run(inputs)[at]
    as_text = inputs | {
        "kind_T": torch.full_like(row, TokenKind.TEXT),
        "index_T": inputs["token_N"][row.long()].int(),
    }
    as_heard = inputs | {
        "kind_T": torch.full_like(row, TokenKind.LEVELS),
        "index_T": row,
        "levels_A_B": inputs["levels_N_F_B"][:, 0].contiguous(),
    }
    total = run(as_text) + run(as_heard)
    if total.device.type == "cpu":
        assert_bitwise(steps, total)
    else:  # a GPU may contract a product and the addition
        assert_matches(steps, total.double(), limit=2**-23)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tokens_may_be_of_either_width(dtype: torch.dtype, device: str) -> None:
    inputs = ALL_KINDS.make_inputs(device)
    expected = embed_tokens(**inputs)
    inputs["token_N"] = inputs["token_N"].to(dtype)
    assert_bitwise(embed_tokens(**inputs), expected)
    assert_matches(run_kernel(inputs), expected.double())


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_sources_may_be_left_out(place: str) -> None:
    inputs = Case(64, text=4, nothing=1, num_bands=6, num_levels=5).make_inputs(place)
    expected = embed_tokens(**inputs)
    for name in ("levels_A_B", "x_P_D", "token_N", "levels_N_F_B"):
        del inputs[name]
    out = torch.empty_like(expected)
    assert embed_tokens(**inputs, out_T_D=out) is out
    assert_bitwise(out, expected)


def test_kernel_takes_what_is_out_of_range_as_zeros(device: str) -> None:
    case = Case(64, text=2, heard=2, embedded=2, steps=2, num_frames=1, num_bands=6)
    inputs = case.make_inputs(device)
    kinds = [kind for kind in TokenKind for _ in range(2)] + [TokenKind.STEP]
    wrong = [-1, 9] * len(TokenKind) + [0]
    inputs["token_N"][0] = 9  # a step that is there, whose token is not
    inputs["levels_N_F_B"][0] = 255
    inputs["kind_T"] = torch.tensor(kinds, dtype=torch.int32, device=device)
    inputs["index_T"] = torch.tensor(wrong, dtype=torch.int32, device=device)
    out = run_kernel(inputs)
    assert not out[:-1].any()
    inputs["kind_T"][-1] = TokenKind.LEVELS
    inputs["levels_A_B"][0] = 15
    assert_bitwise(out[-1], run_kernel(inputs)[-1])  # sound alone, at the highest level


def test_opcheck() -> None:
    inputs = ALL_KINDS.make_inputs("cpu")
    args = (*inputs.values(), 1e-6, torch.zeros(len(inputs["kind_T"]), 64))
    torch.library.opcheck(torch.ops.tml_kernels.embed_tokens.default, args)


def test_every_width_has_a_config() -> None:
    for width in [1, 128, 129, 4096, 6144, 8192]:
        assert choose_config(width).why_not(width) is None
    assert SHIPPED[0].why_not(129) is not None
    with pytest.raises(ValueError, match="8193"):
        choose_config(8193)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


U8 = torch.zeros(2, 4, dtype=torch.uint8)
GOOD: dict[str, Any] = {
    "kind_T": int32(0, 1, 2, 3, 4),
    "index_T": int32(-1, 2, 1, 1, 1),
    "embed_V_D": torch.zeros(3, 8),
    "embed_norm_D": torch.ones(8),
    "table_Y_D": torch.zeros(12, 8),
    "table_norm_D": torch.ones(8),
    "levels_A_B": U8,
    "x_P_D": torch.zeros(2, 8),
    "token_N": torch.zeros(2, dtype=torch.int64),
    "levels_N_F_B": torch.zeros(2, 2, 4, dtype=torch.uint8),
    "num_levels": 3,
}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"kind_T": int32(0, 1, 2, 3, 5)}, ValueError, "kind_T: expected 0..4, got .*5"),
        ({"kind_T": GOOD["kind_T"].long()}, TypeError, "kind_T.*int64"),
        ({"index_T": int32(0)}, ValueError, "index_T: T=1, but T=5"),
        ({"index_T": GOOD["index_T"].to("meta")}, ValueError, "index_T: expected device cpu"),
        ({"index_T": int32(0, 3, 0, 0, 0)}, ValueError, "3 of kind TEXT is not in 0..2"),
        ({"index_T": int32(0, 0, -1, 0, 0)}, ValueError, "-1 of kind LEVELS is not in 0..1"),
        ({"index_T": int32(0, 0, 0, 2, 0)}, ValueError, "2 of kind EMBEDDED"),
        ({"index_T": int32(0, 0, 0, 0, 2)}, ValueError, "2 of kind STEP"),
        ({"x_P_D": None}, ValueError, "1 of kind EMBEDDED is not in 0..-1"),
        ({"token_N": torch.tensor([0, 3])}, ValueError, "token_N: .*3.* not all in 0..2"),
        ({"levels_A_B": U8 + 3}, ValueError, "3 is not below num_levels=3"),
        ({"levels_N_F_B": GOOD["levels_N_F_B"] + 3}, ValueError, "3 is not below num_levels=3"),
        ({"token_N": None}, ValueError, "both or neither"),
        ({"levels_N_F_B": None}, ValueError, "both or neither"),
        ({"levels_A_B": U8.int()}, TypeError, "levels_A_B.*int32"),
        ({"levels_A_B": U8[:, :3].contiguous()}, ValueError, "B=3, but B=4"),
        ({"num_levels": 5}, ValueError, "table_Y_D: 12 rows are not bands of num_levels=5"),
        ({"num_levels": 0}, ValueError, "num_levels: expected at least 1, got 0"),
        ({"table_Y_D": torch.zeros(12, 8).half()}, TypeError, "table_Y_D.*float16"),
        ({"table_Y_D": torch.zeros(12, 9)}, ValueError, "D=9, but D=8"),
        ({"embed_norm_D": torch.ones(8).half()}, TypeError, "embed_norm_D.*float16"),
        ({"x_P_D": torch.zeros(2, 8).half()}, TypeError, "x_P_D.*float16"),
        ({"token_N": torch.zeros(3).long()}, ValueError, "levels_N_F_B: N=2, but N=3"),
        ({"out_T_D": torch.zeros(4, 8)}, ValueError, "T=4, but T=5"),
        ({"embed_V_D": torch.zeros(3, 8, requires_grad=True)}, RuntimeError, "no backward"),
    ],
    ids=str,
)
def test_bad_input_changes_nothing(change: dict, error: type, words: str) -> None:
    out = torch.full((5, 8), 7.0)
    with pytest.raises(error, match=words):
        embed_tokens(**{"out_T_D": out, **GOOD, **change})
    assert (out == 7.0).all()


def test_good_input_is_good() -> None:
    assert embed_tokens(**GOOD).shape == (5, 8)
