from __future__ import annotations

import math

import pytest
import torch
from kernel_paged_attention import as_table, pieces, row_alone, with_unseen_pages
from torch import Tensor

from tml_kernels._page_plan import PagePlan
from tml_kernels.ops.paged_attention import paged_attention
from tml_kernels.ops.paged_attention.cases import BENCH, EDGE, FAR, MODEL, Case, Row
from tml_kernels.ops.paged_attention.reference import paged_attention_ref
from tml_kernels.ops.plan_pages import plan_pages
from tml_kernels.testing import assert_bitwise, assert_matches, randn

MIXED = Case((Row(4, 30), Row(1, 200), Row(0, 9), Row(9, 70)), window=50, extent=40, tau_floor=7.0)


def check(case: Case, device: str) -> None:
    inputs = case.make_inputs(device)
    assert_matches(paged_attention(**inputs), paged_attention_ref(**inputs), dtype=case.dtype)


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_public(case: Case) -> None:
    check(case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_gpu(case: Case) -> None:
    check(case, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    check(Case((Row(4, 90),), extent=32, dtype=dtype), "cpu")
    check(Case((Row(4, 90),), extent=32, page_dtype=dtype), "cpu")


def one_query(inputs: dict, s: int, i: int, h: int) -> Tensor:
    """out[C] of query i of row s, head h: the definition, key by key, in Python's arithmetic."""
    start, length = inputs["start_S1"].tolist(), int(inputs["length_S"][s])
    t, pq = start[s] + i, length - (start[s + 1] - start[s]) + i
    k_pages, v_pages = inputs["k_pages_P_G_R_C"].double(), inputs["v_pages_P_G_R_C"].double()
    g = h * k_pages.shape[1] // inputs["q_T_H_C"].shape[1]
    q, window, floor = inputs["q_T_H_C"][t, h].double(), inputs["window"], inputs["tau_floor"]
    tau = 1.0 if floor is None else 1.0 + 0.1 * math.log(max((pq + 1) / floor, 1.0))
    logits, values = [], []
    row_position = inputs.get("row_position_P_R")
    for page, base, rows in zip(*(x[s].tolist() for x in inputs["plan"][:3]), strict=True):
        for r in range(rows):
            position = base + r if row_position is None else int(row_position[page, r])
            distance = pq - position
            if page < 0 or distance < 0 or (window is not None and distance >= window):
                continue
            bias = 0.0
            if inputs["rel_T_H_B"] is not None and distance < inputs["rel_table_B_X"].shape[1]:
                profile = inputs["rel_table_B_X"][:, distance].double()
                bias = float(inputs["rel_T_H_B"][t, h].double() @ profile)
            logit = tau * (inputs["scale"] * float(q @ k_pages[page, g, r]) + bias)
            if inputs["softcap"] is not None:
                logit = inputs["softcap"] * math.tanh(logit / inputs["softcap"])
            logits.append(logit)
            values.append(v_pages[page, g, r])
    weight = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0)
    return (weight[:, None] * torch.stack(values)).sum(0)


@pytest.mark.parametrize(
    "case",
    [
        Case((Row(3, 9), Row(2, 20)), 4, 2, 8, extent=6, page_rows=4),
        Case((Row(3, 20),), 4, 1, 8, window=7, extent=7, tau_floor=2.0, page_rows=4),
        Case((Row(2, 11),), 3, 3, 8, extent=30, softcap=1.5, tau_floor=4.0, page_rows=4),
        Case((Row(2, FAR, 9),), 2, 1, 8, extent=5, tau_floor=128000.0, page_rows=4),
        Case((Row(2, 21),), 2, 1, 8, extent=9, window=15, page_rows=4, segment=3),
        Case((Row(3, 29), Row(1, 9)), 2, 1, 8, extent=6, page_rows=4, runs=(3, 2), span=13),
    ],
    ids=str,
)
def test_reference_is_the_definition(case: Case) -> None:
    inputs = case.make_inputs("cpu")
    out = paged_attention_ref(**inputs)
    start = inputs["start_S1"].tolist()
    for s, row in enumerate(case.rows):
        for i in range(row.new):
            for h in range(case.num_heads):
                expected = one_query(inputs, s, i, h)
                torch.testing.assert_close(out[start[s] + i, h], expected, rtol=1e-10, atol=1e-12)


def plan_of(page: list, base: list, rows: list) -> PagePlan:
    page_S_M, base_S_M = torch.tensor(page, dtype=torch.int32), torch.tensor(base)
    rows_S_M = torch.tensor(rows, dtype=torch.int32)
    return PagePlan(page_S_M, base_S_M, rows_S_M, (page_S_M >= 0).sum(1).int())


@pytest.mark.parametrize(("window", "extent"), [(None, 6), (None, 40), (5, 5)])
def test_reference_agrees_with_transformers(window: int | None, extent: int) -> None:
    pytest.importorskip("transformers")
    from transformers.models.inkling import modeling_inkling as theirs

    n, heads, kv_heads, width, floor = 21, 4, 2, 8, 4.0
    q, k, v = (randn(n, count, width).double() for count in (heads, kv_heads, kv_heads))
    rel, table = randn(n, heads, 3).double(), randn(3, extent).double()
    position = torch.arange(n)
    distance = position[:, None] - position
    mask = torch.zeros(n, n, dtype=torch.float64)
    mask[(distance < 0) | (distance >= (window or n))] = float("-inf")
    tau = 1.0 + 0.1 * torch.log(((position + 1).double() / floor).clamp(min=1.0))

    bias = theirs.InklingRelativeLogits(3, extent).double()
    with torch.no_grad():
        bias.proj.copy_(table)
        module = torch.nn.Module()
        module.num_key_value_groups, module.training = heads // kv_heads, False
        expected, _ = theirs.eager_attention_forward(
            module,
            (q * tau[:, None, None]).transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            mask,
            scaling=1 / width,
            position_bias=bias(rel[None], position, position) * tau[:, None],
        )
    out = paged_attention_ref(
        q,
        k.transpose(0, 1).view(kv_heads, 3, 7, width).transpose(0, 1),
        v.transpose(0, 1).view(kv_heads, 3, 7, width).transpose(0, 1),
        plan_of([[0, 1, 2]], [[0, 7, 14]], [[7, 7, 7]]),
        torch.tensor([0, n], dtype=torch.int32),
        torch.tensor([n]),
        scale=1 / width,
        window=window,
        rel_T_H_B=rel,
        rel_table_B_X=table,
        tau_floor=floor,
    )
    # Their softmax is in float32.
    torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-6)


def test_order_of_the_page_list_is_bitwise_neutral() -> None:
    inputs = Case((Row(5, 600), Row(1, 300)), extent=64).make_inputs("cpu")
    expected = paged_attention(**inputs)
    slot = torch.arange(2, dtype=torch.int32)
    for _ in range(4):
        plan = plan_pages(*as_table(inputs["plan"]), slot)
        assert_bitwise(paged_attention(**inputs | {"plan": plan}), expected)


@pytest.mark.parametrize(
    "case",
    [
        Case((Row(5, 600),), window=100, extent=64),
        Case((Row(5, 600),), extent=64),
        Case((Row(5, 600),), extent=64, runs=(4, 4)),
    ],
    ids=str,
)
def test_pages_that_nobody_sees_are_bitwise_neutral(case: Case) -> None:
    """A ring that still lists pages before the window, and pages reserved ahead."""
    inputs = case.make_inputs("cpu")
    expected = paged_attention(**inputs)
    assert_bitwise(paged_attention(**with_unseen_pages(inputs)), expected)


def test_classes_have_the_bits_of_one_run() -> None:
    """Here keys are added up by position, wherever they lie."""
    case = Case((Row(9, 500),), extent=64, runs=(4, 4))
    inputs = case.make_inputs("cpu")
    keys = {name: torch.zeros(8, 2, 64, 32) for name in ("k_pages_P_G_R_C", "v_pages_P_G_R_C")}
    page_M, rows_M = inputs["plan"].page_S_M[0], inputs["plan"].rows_S_M[0]
    for page, rows in zip(page_M.tolist(), rows_M.tolist(), strict=True):
        for r in range(rows):
            position = int(inputs["row_position_P_R"][page, r])
            for name, linear in keys.items():
                linear[position // 64, :, position % 64] = inputs[name][page, :, r]
    base = [list(range(0, 512, 64))]
    given = {k: v for k, v in inputs.items() if k not in ("row_position_P_R", "span")}
    linear = given | keys | {"plan": plan_of([list(range(8))], base, [[64] * 8])}
    assert_bitwise(paged_attention(**inputs), paged_attention(**linear))


def test_row_does_not_depend_on_the_other_rows() -> None:
    inputs = MIXED.make_inputs("cpu")
    together = paged_attention(**inputs)
    for s in range(len(MIXED.rows)):
        alone, tokens = row_alone(inputs, s)
        assert_bitwise(paged_attention(**alone), together[tokens])


@pytest.mark.parametrize("window", [None, 37])
def test_an_append_in_pieces_is_the_same_attention(window: int | None) -> None:
    case = Case((Row(20, 130),), window=window, extent=32, tau_floor=10.0)
    inputs = case.make_inputs("cpu")
    whole = paged_attention(**inputs)
    for sizes in ((1,) * 20, (3, 17), (19, 1)):
        parts = [paged_attention(**piece) for piece in pieces(inputs, sizes)]
        assert_matches(torch.cat(parts), whole)


def test_shared_pages_are_copies() -> None:
    """Two rows with a common prefix and one page of their own each, as after a fork."""
    inputs = Case((Row(2, 150), Row(2, 150)), extent=64).make_inputs("cpu")
    page_S_M = inputs["plan"].page_S_M
    shared_S_M = page_S_M.clone()
    for m in range(2):
        for name in ("k_pages_P_G_R_C", "v_pages_P_G_R_C"):
            inputs[name][page_S_M[1, m]] = inputs[name][page_S_M[0, m]]
        shared_S_M[1, m] = page_S_M[0, m]
    assert not torch.equal(shared_S_M, page_S_M)
    shared = inputs | {"plan": inputs["plan"]._replace(page_S_M=shared_S_M)}
    assert_bitwise(paged_attention(**shared), paged_attention(**inputs))


@pytest.mark.parametrize("length", [0, 40])
def test_query_that_sees_nothing_gives_zeros(length: int) -> None:
    """Idle rows (length 0) and rows with an empty list, NaN queries; neighbours as before."""
    inputs = Case((Row(2, 40), Row(3, 50)), extent=16).make_inputs("cpu")
    expected = paged_attention(**inputs)
    inputs["q_T_H_C"][:2] = float("nan")
    inputs["length_S"][0] = length
    if length:
        inputs["plan"].page_S_M[0], inputs["plan"].count_S[0] = -1, 0
    out = paged_attention(**inputs)
    assert (out[:2] == 0).all()
    assert_bitwise(out[2:], expected[2:])


def test_query_older_than_every_page_gives_zeros() -> None:
    """Of two queries, the keys of the first's window are gone."""
    inputs = Case((Row(2, 66, 1),), window=1).make_inputs("cpu")
    inputs["plan"].base_S_M[0, 0] = 65
    inputs["k_pages_P_G_R_C"].nan_to_num_(0.5)
    inputs["v_pages_P_G_R_C"].nan_to_num_(0.5)
    out = paged_attention(**inputs)
    assert (out[0] == 0).all()
    assert (out[1] != 0).any()


def test_nan_key_stays_in_its_row() -> None:
    inputs = Case((Row(2, 40), Row(3, 50)), extent=16).make_inputs("cpu")
    expected = paged_attention(**inputs)
    page = inputs["plan"].page_S_M[0, 0]
    inputs["k_pages_P_G_R_C"][page, :, 5] = float("nan")
    out = paged_attention(**inputs)
    assert out[:2].isnan().all()
    assert_bitwise(out[2:], expected[2:])


def test_positions_near_a_billion_are_exact() -> None:
    """The same context moved by FAR gives the same bits: nothing but tau reads a position."""
    case = Case((Row(4, 150),), window=64, extent=50)
    near = case.make_inputs("cpu")
    plan = near["plan"]._replace(base_S_M=near["plan"].base_S_M + FAR)
    far = near | {"plan": plan, "length_S": near["length_S"] + FAR}
    assert_bitwise(paged_attention(**far), paged_attention(**near))


def test_relative_view_and_copy_give_the_same_bits() -> None:
    inputs = MIXED.make_inputs("cpu")
    assert not inputs["rel_T_H_B"].is_contiguous()
    copied = inputs | {"rel_T_H_B": inputs["rel_T_H_B"].contiguous()}
    assert_bitwise(paged_attention(**inputs), paged_attention(**copied))


def test_writes_into_out() -> None:
    inputs = MIXED.make_inputs("cpu")
    out = torch.empty_like(inputs["q_T_H_C"])
    assert paged_attention(**inputs, out_T_H_C=out) is out
    assert_bitwise(out, paged_attention(**inputs))


OPCHECKED = [
    MIXED,
    Case((Row(2, 70),), softcap=2.0),
    Case((Row(2, 70),), runs=(4, 4)),
]


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck(case: Case) -> None:
    inputs = case.make_inputs("cpu")
    names = ("q_T_H_C", "k_pages_P_G_R_C", "v_pages_P_G_R_C", "start_S1", "length_S")
    q, k_pages, v_pages, start, length = (inputs[name] for name in names)
    span = inputs.get("span", k_pages.shape[2])
    names = ("scale", "window", "rel_T_H_B", "rel_table_B_X", "tau_floor")
    args = (
        q, k_pages, v_pages, *inputs["plan"], start, length, inputs.get("row_position_P_R"), span,
        *(inputs[name] for name in names), 0.1, inputs["softcap"],
        inputs.get("k_scale_P_G_R"), inputs.get("v_scale_P_G_R"), torch.empty_like(q), None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.tml_kernels.paged_attention.default, args)


def test_cost_counts_visible_keys() -> None:
    one = BENCH[0].cost()
    assert one.flops == 4 * 32 * 128 * 1024
    # k and v in bf16; q, out, rel; the table in float32; 16 pages of id, base and rows
    assert one.bytes == 2 * 2 * 1024 * 1024 + 2 * 2 * 4096 + 2 * 512 + 4 * 16 * 1024 + 16 * 16
    assert Case((Row(3, 100),), window=10).cost().flops == 4 * 4 * 32 * 30
    assert Case((Row(3, 3),)).cost().flops == 4 * 4 * 32 * 6


FP8 = torch.zeros(5, 2, 4, 8).to(torch.float8_e4m3fn)
POSITION = torch.arange(0, 8, 2).expand(5, 4).contiguous()


def changed(**fields: Tensor) -> dict:
    plan = plan_of([[0, -1, -1]] * 2, [[0, -1, -1]] * 2, [[4, 0, 0]] * 2)
    return {"plan": plan._replace(**fields)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q_T_H_C": torch.zeros(3, 3, 8)}, ValueError, "q_T_H_C.*multiple of G=2, got 3"),
        ({"q_T_H_C": torch.zeros(3, 4, 8).double()}, TypeError, "q_T_H_C.*float64"),
        ({"q_T_H_C": torch.zeros(3, 4, 9)}, ValueError, "k_pages_P_G_R_C: C=8, but C=9"),
        ({"k_pages_P_G_R_C": torch.zeros(5, 2, 4, 8).int()}, TypeError, "k_pages.*int32"),
        ({"v_pages_P_G_R_C": torch.zeros(5, 2, 4, 8).half()}, TypeError, "v_pages.*float16"),
        ({"v_pages_P_G_R_C": torch.zeros(4, 2, 4, 8)}, ValueError, "v_pages_P_G_R_C: P=4, but P=5"),
        ({"plan": torch.zeros(2)}, TypeError, "plan: expected a PagePlan, got Tensor"),
        (changed(page_S_M=torch.zeros(2, 3).long()), TypeError, "plan.page_S_M.*int64"),
        (changed(page_S_M=torch.full((2, 3), 5).int()), ValueError, "page_S_M.*below 5, got 5"),
        (changed(base_S_M=torch.zeros(2, 3).int()), TypeError, "plan.base_S_M.*int32"),
        (changed(base_S_M=torch.zeros(2, 4).long()), ValueError, "base_S_M: M=4, but M=3"),
        (changed(rows_S_M=torch.zeros(2, 3).long()), TypeError, "plan.rows_S_M.*int64"),
        (changed(count_S=torch.zeros(3).int()), ValueError, "plan.count_S: S=3, but S=2"),
        ({"span": 9}, ValueError, "row_position_P_R, span: .*both or neither, got span=9"),
        ({"row_position_P_R": POSITION}, ValueError, "row_position_P_R, span: .*both"),
        ({"row_position_P_R": POSITION.int(), "span": 9}, TypeError, "row_position_P_R.*int32"),
        ({"row_position_P_R": POSITION[1:], "span": 9}, ValueError, "row_position_P_R: P=4"),
        ({"row_position_P_R": POSITION, "span": 0}, ValueError, "span: .*at least 1, got 0"),
        (
            {"row_position_P_R": POSITION, "span": 9, "window": 4},
            ValueError,
            "row_position_P_R: not together with a window, got window=4",
        ),
        (
            {"row_position_P_R": POSITION, "span": 5},
            ValueError,
            "row_position_P_R: 6 in row 3 of page 0 does not ascend from base 0 to below 5",
        ),
        (
            {"start_S1": torch.tensor([0, 2, 4]).int()},
            ValueError,
            r"start_S1: .*at most 3, got \[0, 2, 4",
        ),
        ({"start_S1": torch.tensor([0, 3]).int()}, ValueError, "start_S1: S1=2, but S1=3"),
        ({"length_S": torch.zeros(2).int()}, TypeError, "length_S.*int32"),
        ({"window": 0}, ValueError, "window.*got 0"),
        ({"scale": float("nan")}, ValueError, "scale.*nan"),
        ({"tau_floor": 0.0}, ValueError, "tau_floor.*got 0.0"),
        ({"tau_alpha": float("inf")}, ValueError, "tau_alpha.*inf"),
        ({"softcap": -1.0}, ValueError, "softcap.*got -1.0"),
        ({"rel_T_H_B": torch.zeros(3, 4, 2)}, ValueError, "rel_T_H_B, rel_table_B_X.*both"),
        (
            {"rel_T_H_B": torch.zeros(3, 4, 2), "rel_table_B_X": torch.zeros(3, 6)},
            ValueError,
            "rel_table_B_X: B=3, but B=2",
        ),
        (
            {"rel_T_H_B": torch.zeros(3, 4, 2), "rel_table_B_X": torch.zeros(2, 0)},
            ValueError,
            "rel_table_B_X: .*got 0",
        ),
        ({"k_scale_P_G_R": torch.ones(5, 2, 4)}, ValueError, "k_scale_P_G_R.*None.*got a tensor"),
        ({"k_pages_P_G_R_C": FP8, "v_pages_P_G_R_C": FP8}, ValueError, "k_scale.*a tensor.*None"),
        (
            {
                "k_pages_P_G_R_C": FP8,
                "v_pages_P_G_R_C": FP8,
                "k_scale_P_G_R": torch.ones(5, 2, 4),
                "v_scale_P_G_R": torch.ones(5, 2, 3),
            },
            ValueError,
            "v_scale_P_G_R: R=3, but R=4",
        ),
        ({"scratch_B": torch.zeros(8)}, TypeError, "scratch_B.*float32"),
        ({"scratch_B": torch.zeros(9, dtype=torch.uint8)[1:]}, ValueError, "scratch_B.*256"),
        ({"out_T_H_C": torch.zeros(3, 4, 8).bfloat16()}, TypeError, "out_T_H_C.*bfloat16"),
        ({"q_T_H_C": torch.zeros(3, 4, 8, requires_grad=True)}, RuntimeError, "no backward"),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    out = torch.full((3, 4, 8), 7.0)
    inputs = {
        "q_T_H_C": torch.zeros(3, 4, 8),
        "k_pages_P_G_R_C": torch.zeros(5, 2, 4, 8),
        "v_pages_P_G_R_C": torch.zeros(5, 2, 4, 8),
        **changed(),
        "start_S1": torch.tensor([0, 1, 3], dtype=torch.int32),
        "length_S": torch.tensor([1, 2]),
        "scale": 0.5,
        "out_T_H_C": out,
    } | change
    with pytest.raises(error, match=words):
        paged_attention(**inputs)
    assert (out == 7.0).all()
