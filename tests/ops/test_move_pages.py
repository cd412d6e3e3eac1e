from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tml_kernels.ops.move_pages import api, move_pages
from tml_kernels.ops.move_pages.cases import BENCH, EDGE, MODEL, Case
from tml_kernels.ops.move_pages.reference import move_pages_ref
from tml_kernels.testing import assert_bitwise


def check(inputs: dict[str, Tensor]) -> None:
    expected, source = move_pages_ref(**inputs), inputs["source_L_P_B"]
    is_same = source.data_ptr() == inputs["target_L_N_B"].data_ptr()
    before = expected if is_same else source.clone()
    move_pages(**inputs)
    assert_bitwise(inputs["target_L_N_B"], expected)
    assert_bitwise(source, before)


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_public(case: Case) -> None:
    check(case.make_inputs("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("case", EDGE + MODEL + BENCH[:4], ids=str)
def test_gpu(case: Case) -> None:
    check(case.make_inputs("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", ["source", "target"])
@pytest.mark.parametrize("case", [c for c in EDGE + MODEL if not c.same], ids=str)
def test_gpu_pinned(case: Case, pinned: str) -> None:
    inputs = replace(case, pinned=pinned).make_inputs("cuda")
    expected = move_pages_ref(**inputs)
    move_pages(**inputs)
    torch.cuda.synchronize()  # before the host reads
    assert_bitwise(inputs["target_L_N_B"], expected)


@pytest.mark.gpu
def test_gpu_suspends_and_resumes() -> None:
    """Out to pinned memory and back to other pages, of keys and of their scales, in order."""
    pool = torch.randn(5, 9, 256, device="cuda")
    host = torch.empty(5, 3, 256, pin_memory=True)
    there, back = torch.tensor([7, 0, 4]).cuda(), torch.tensor([1, 8, 2]).cuda()
    packed = torch.arange(3).cuda()
    kept = pool[:, there].clone()
    move_pages(pool, host, there, packed)
    pool[:, there] = float("nan")
    move_pages(host, pool, packed, back)
    assert_bitwise(pool[:, back], kept)
    torch.cuda.synchronize()
    assert_bitwise(host, kept)


@pytest.mark.gpu
def test_gpu_equals_plain_and_skips_what_is_beyond() -> None:
    inputs = Case(3, 5, 6, 5, 40, torch.bfloat16, padding=1).make_inputs("cuda")
    inputs["from_I"][0], inputs["to_I"][1] = 5, 6
    inputs["from_I"][2], inputs["to_I"][3] = -(2**63), 2**63 - 1
    source, target, from_I, to_I = inputs.values()
    plain = target.clone()
    api._plain(from_I, to_I, source, plain)
    move_pages(**inputs)
    assert_bitwise(target, plain)


@pytest.mark.gpu
def test_gpu_captured_call_replays_with_other_pages() -> None:
    case = Case(4, 9, 8, 6, 520, torch.bfloat16, padding=2)
    inputs = case.make_inputs("cuda")
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    move_pages(**inputs)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        move_pages(**inputs)
    for _ in range(3):
        for name, given in case.make_inputs("cuda").items():
            inputs[name].copy_(given)
        expected = move_pages_ref(**inputs)
        graph.replay()
        assert_bitwise(inputs["target_L_N_B"], expected)


@pytest.mark.gpu
def test_gpu_beyond_two_to_the_31_bytes() -> None:
    """The last page of the last layer, at byte 2^32 and further."""
    pool = torch.zeros(2, 2**15 + 2, 2**16, dtype=torch.uint8, device="cuda")
    last = pool.shape[1] - 1
    pool[:, last] = torch.arange(2**16, device="cuda").to(torch.uint8)
    move_pages(pool, pool, torch.tensor([last]).cuda(), torch.tensor([last - 1]).cuda())
    assert_bitwise(pool[:, last - 1], pool[:, last])
    assert not pool[:, last - 2].any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["source_L_P_B", "target_L_N_B"])
def test_gpu_refuses_memory_that_is_not_pinned(name: str) -> None:
    inputs = Case(1, 2, 2, 1, 8).make_inputs("cuda")
    inputs[name] = inputs[name].cpu()
    with pytest.raises(ValueError, match=f"{name}: .*pin_memory=True"):
        move_pages(**inputs)


def test_gather_and_scatter_undo_each_other() -> None:
    pool = torch.randn(3, 8, 5)
    pages, packed = torch.tensor([6, 1, 3]), torch.arange(3)
    staging, other = torch.empty(3, 3, 5), torch.zeros(3, 8, 5)
    move_pages(pool, staging, pages, packed)
    assert_bitwise(staging, pool[:, pages])
    move_pages(staging, other, packed, pages)
    assert_bitwise(other[:, pages], pool[:, pages])
    assert not other[:, [0, 2, 4, 5, 7]].any()


def test_nan_bits_are_kept() -> None:
    source = torch.tensor([0x7F800001, -1]).int().view(torch.float32).view(1, 2, 1)
    target = torch.zeros(1, 2, 1)
    move_pages(source, target, torch.tensor([1, 0]), torch.tensor([0, 1]))
    assert_bitwise(target, source.flip(1))


@pytest.mark.parametrize("same", [False, True])
def test_opcheck(same: bool) -> None:
    source, target, from_I, to_I = Case(2, 6, 6, 3, 5, padding=1).make_inputs("cpu").values()
    if same:  # of disjoint pages, in a copy: opcheck forbids an argument that aliases another
        target = source.clone()
    args = (from_I, to_I, source, target)
    torch.library.opcheck(torch.ops.tml_kernels.move_pages.default, args)


def test_cost_counts_no_padding_as_moved() -> None:
    case = Case(3, 9, 9, 5, 7, torch.bfloat16, padding=2)
    assert case.cost().bytes == 2 * 3 * 3 * 14 + 16 * 5


POOL = torch.arange(40.0).view(2, 4, 5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"from_I": torch.tensor([0, 1]).int()}, TypeError, "from_I.*int32"),
        ({"to_I": torch.tensor([0, 1, 2])}, ValueError, "to_I: I=3, but I=2"),
        ({"target_L_N_B": torch.zeros(2, 6, 5).half()}, TypeError, "target_L_N_B.*float16"),
        ({"target_L_N_B": torch.zeros(3, 6, 5)}, ValueError, "target_L_N_B: L=3, but L=2"),
        ({"target_L_N_B": torch.zeros(2, 6, 4)}, ValueError, "target_L_N_B: B=4, but B=5"),
        ({"source_L_P_B": POOL[:, :, :5].mT.contiguous().mT}, ValueError, "source.*contiguous"),
        ({"source_L_P_B": POOL.clone().requires_grad_()}, RuntimeError, "no backward"),
        ({"source_L_P_B": POOL.to("meta")}, ValueError, "source_L_P_B: .*got meta"),
        (
            {"from_I": torch.tensor([0, 1], device="meta"), "to_I": torch.zeros(2).long()},
            ValueError,
            "to_I: expected device meta",
        ),
        (
            dict.fromkeys(("from_I", "to_I"), torch.tensor([0, 1], device="meta")),
            ValueError,
            "from_I: on meta, but the pools are on cpu and cpu",
        ),
        ({"from_I": torch.tensor([0, 4])}, ValueError, "from_I: .*below 4, got 4"),
        ({"to_I": torch.tensor([6, 0])}, ValueError, "to_I: .*below 6, got 6"),
        ({"to_I": torch.tensor([3, 3])}, ValueError, "to_I: 3 is named twice"),
    ],
)
def test_bad_input_changes_nothing(change: dict, error: type, words: str) -> None:
    inputs = {
        "source_L_P_B": POOL,
        "target_L_N_B": torch.zeros(2, 6, 5),
        "from_I": torch.tensor([0, 1]),
        "to_I": torch.tensor([5, 0]),
    } | change
    with pytest.raises(error, match=words):
        move_pages(**inputs)
    assert not inputs["target_L_N_B"].any()


def test_a_page_that_is_read_and_written_changes_nothing() -> None:
    pool = POOL.clone()
    with pytest.raises(ValueError, match="from_I: page 1 of the one pool is also in to_I"):
        move_pages(pool, pool, torch.tensor([0, 1, 3]), torch.tensor([1, 2, -1]))
    assert_bitwise(pool, POOL)
    move_pages(pool, pool, torch.tensor([0, 1]), torch.tensor([-1, 2]))  # 0 is padding
    assert_bitwise(pool, POOL[:, [0, 1, 1, 3]])


def test_pools_that_overlap_change_nothing() -> None:
    memory = torch.arange(60.0)
    pools = memory[:40].view(2, 4, 5), memory[20:].view(2, 4, 5)
    with pytest.raises(ValueError, match=r"target_L_N_B: shares memory .*\(2, 4, 5\)"):
        move_pages(*pools, torch.tensor([0]), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"target_L_N_B: shares .*\(1, 3, 5\) and \(1, 4, 5\)"):
        move_pages(memory[:20].view(1, 4, 5), memory[:15].view(1, 3, 5),
                   torch.tensor([0]), torch.tensor([1]))  # fmt: skip
    assert_bitwise(memory, torch.arange(60.0))


def test_a_place_may_be_named_again_by_padding() -> None:
    target = torch.zeros(2, 6, 5)
    move_pages(POOL, target, torch.tensor([2, -1]), torch.tensor([3, 3]))
    assert_bitwise(target[:, 3], POOL[:, 2])
