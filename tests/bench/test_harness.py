from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import bench_rms_norm, ceilings, harness
from bench.ceilings import Ceilings
from bench.harness import OpBench, Variant
from bench.op import show_case
from bench.stats import Summary, noise, percentile
from bench.timing import Call, CudaTimer, Samples
from tml_kernels.testing import Cost

CEILINGS = Ceilings(
    copy=4e12, read=4.5e12, matmul_bf16=8e14, launch_event_us=2.0, launch_graph_us=1.0
)
L2 = 50 << 20


@dataclass(frozen=True)
class AddCase:
    size: int
    offset: float = 1.0

    def __str__(self) -> str:
        return f"add-{self.size}"

    def make_inputs(self, device: str) -> dict[str, Any]:
        return {"x": torch.randn(self.size, device=device), "offset": self.offset}

    def cost(self) -> Cost:
        return Cost(bytes=8 * self.size, flops=self.size)


class FakeTimer:
    """Calls everything once, and says that call k of a variant took base + k microseconds."""

    def __init__(self, **base_us: float) -> None:
        self.base_us = base_us
        self.order: list[str] = []
        self.graph_calls = 0

    def events(self, calls: Mapping[str, Sequence[Call]], repeats: int) -> Samples:
        samples = Samples(us={name: [] for name in calls})
        for k in range(repeats):
            for name, runs in calls.items():
                runs[k % len(runs)]()
                self.order.append(name)
                samples.us[name].append(self.base_us[name.replace(" ", "_")] + k)
        return samples

    def graph(
        self, calls: Mapping[str, Sequence[Call]], repeats: int, *, at_least: int = 24
    ) -> Samples:
        self.graph_calls = at_least
        us = {name: [self.base_us[name.replace(" ", "_")] / 2] * repeats for name in calls}
        us.pop("slow", None)
        return Samples(us, {"slow": "not captured"} if "slow" in calls else {})


def add(x: Tensor, offset: float) -> Tensor:
    return x + offset


def timed(variants: dict[str, Variant], timer: FakeTimer, case: AddCase = AddCase(1000)):
    return harness.time_case(variants, case, timer, CEILINGS, l2_bytes=L2, repeats=5, device="cpu")


def test_percentile_is_numpys() -> None:
    samples = sorted(random.Random(0).random() for _ in range(37))
    for q in (0, 10, 50, 90, 99, 100):
        assert percentile(samples, q) == pytest.approx(np.percentile(samples, q))
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)


def test_summary_sorts() -> None:
    assert Summary.of([5, 1, 4, 2, 3]) == Summary(5, 3, 1.4, 4.6)


def test_noise_is_symmetric() -> None:
    a, b = Summary(3, 10.0, 9.0, 11.0), Summary(3, 11.0, 9.0, 12.0)
    assert noise(a, b) == noise(b, a) == pytest.approx(0.1)


def test_times_rates_and_fraction() -> None:
    case = AddCase(1_000_000)
    timer = FakeTimer(ours=8.0, other=38.0, ours_again=8.1)
    result = timed({"other": Variant(add), "ours": Variant(add)}, timer, case)
    row = result.to_json()["variants"]["ours"]
    assert row["cold_us"]["median"] == 10.0  # 8 + 0..4
    assert row["graph_us"]["median"] == 4.0
    assert row["bytes_per_s"] == pytest.approx(8e6 / 10e-6)
    assert row["fraction"] == pytest.approx((8e6 / 4.5e12 * 1e6) / 10.0)
    assert result.noise == pytest.approx(0.01)
    assert set(result.to_json()["variants"]) == {"ours", "other"}
    assert timer.order[:3] == ["ours", "ours again", "other"]  # interleaved call by call
    assert timer.order[3:6] == timer.order[:3]
    assert "ours" in show_case(result.to_json())


def test_the_rate_of_a_variant_that_moves_more_is_of_what_it_moves() -> None:
    timer = FakeTimer(ours=8.0, other=8.0, ours_again=8.0)
    wide = Variant(add, cost=lambda case: replace(case.cost(), bytes=3 * case.cost().bytes))
    rows = timed({"other": wide, "ours": Variant(add)}, timer).to_json()["variants"]
    assert rows["other"]["bytes_per_s"] == pytest.approx(3 * rows["ours"]["bytes_per_s"])
    assert rows["other"]["fraction"] == rows["ours"]["fraction"]  # of what has to be moved


def test_floor_is_the_larger_of_bytes_and_flops() -> None:
    assert CEILINGS.floor_us(4_500_000, 0) == pytest.approx(1.0)
    assert CEILINGS.floor_us(4_500_000, 16 * 10**8) == pytest.approx(2.0)
    assert replace(CEILINGS, read=None).bandwidth == 4e12


def test_variant_with_another_result_is_not_timed() -> None:
    def wrong(x: Tensor, offset: float) -> Tensor:
        return x - offset

    def raising(x: Tensor, offset: float) -> Tensor:
        raise RuntimeError("unsupported\nwidth")

    variants = {
        "ours": Variant(add),
        "wrong": Variant(wrong),
        "unchecked": Variant(wrong, check=False),
        "raising": Variant(raising),
    }
    result = timed(variants, FakeTimer(ours=1.0, unchecked=1.0, ours_again=1.0))
    assert set(result.cold_us) == {"ours", "unchecked"}
    assert "differs from ours" in result.skipped["wrong"]
    assert result.skipped["raising"] == "RuntimeError: unsupported width"


def test_limit_of_a_variant_is_its_own() -> None:
    near = Variant(lambda x, offset: 1.05 * (x + offset))
    timer = FakeTimer(ours=1.0, rounded=1.0, ours_again=1.0)
    variants = {"ours": Variant(add), "near": near, "rounded": replace(near, limit=8e-2)}
    result = timed(variants, timer)
    assert set(result.cold_us) == {"ours", "rounded"}
    assert "5.0e-02" in result.skipped["near"]


def test_nothing_is_timed_when_ours_fails() -> None:
    def raising(**_: Any) -> Tensor:
        raise RuntimeError("illegal address")

    result = timed({"ours": Variant(raising), "other": Variant(add)}, FakeTimer())
    assert result.cold_us == {}
    assert "illegal address" in result.skipped["ours"]


def test_flaw_of_a_timing_is_kept() -> None:
    timer = FakeTimer(ours=1.0, slow=1.0, ours_again=1.0)
    result = timed({"ours": Variant(add), "slow": Variant(add)}, timer)
    assert result.skipped == {"slow (graph)": "not captured"}
    assert result.to_json()["variants"]["slow"]["graph_us"] is None


def test_state_of_one_variant_is_not_anothers() -> None:
    seen: dict[str, list[Tensor]] = {"ours": [], "other": []}  # held: no address is used twice

    def variant(name: str) -> Variant:
        def run(x: Tensor, offset: float) -> Tensor:
            seen[name].append(x)
            return x.add_(offset)

        return Variant(run)

    held = {name: variant(name) for name in seen}
    timed(held, FakeTimer(ours=1.0, other=1.0, ours_again=1.0))
    ours, other = ({x.data_ptr() for x in tensors} for tensors in seen.values())
    assert ours
    assert not ours & other


def test_preparation_is_not_timed() -> None:
    prepared = []

    def prepare(inputs: dict[str, Any]) -> dict[str, Any]:
        prepared.append(1)
        return inputs | {"offset": 1.0}

    variants = {"ours": Variant(add), "peer": Variant(add, prepare)}
    timer = FakeTimer(ours=1.0, peer=1.0, ours_again=1.0)
    result = timed(variants, timer, AddCase(10, offset=1.0))
    assert "peer" in result.cold_us
    assert len(prepared) == 1 + 16  # the comparison, and once for each input set


@pytest.mark.parametrize(
    ("num_bytes", "sets"), [(1, 16), (20 << 20, 8), (75 << 20, 2), (150 << 20, 1), (1 << 40, 1)]
)
def test_number_of_input_sets(num_bytes: int, sets: int) -> None:
    assert harness.count_sets(num_bytes, L2) == sets


@pytest.mark.parametrize(
    ("num_bytes", "sets"), [(1, 16), (60 << 20, 4), (150 << 20, 4), (1 << 40, 4)]
)
def test_layers_have_weights_of_their_own(num_bytes: int, sets: int) -> None:
    assert harness.count_sets(num_bytes, L2, least=4) == sets


def test_large_inputs_are_shared_and_as_many_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 numbers, 40 kB, of an L2 of 1 kB: four sets, or half of what is free."""
    seen: dict[str, set[int]] = {"ours": set(), "other": set()}
    held: list[Tensor] = []  # no address is used twice

    def variant(name: str) -> Variant:
        def run(x: Tensor, offset: float) -> Tensor:
            held.append(x)
            seen[name].add(x.data_ptr())
            return x + offset

        return Variant(run)

    def run(free: int) -> harness.CaseResult:
        monkeypatch.setattr(harness, "free_bytes", lambda device: free)
        timer = FakeTimer(ours=1.0, other=1.0, ours_again=1.0)
        variants = {name: variant(name) for name in seen}
        for addresses in seen.values():
            addresses.clear()
        return harness.time_case(
            variants, AddCase(10_000), timer, CEILINGS, l2_bytes=1000, repeats=8, device="cpu",
            sets=4, graph_calls=40,
        )  # fmt: skip

    result = run(1 << 30)
    assert (result.graph_sets, result.graph_calls, result.graph_l2) == (4, 40, "cold")
    assert len(seen["ours"] & seen["other"]) == 4  # beside the copies of the comparison
    assert run(260_000).graph_sets == 3
    assert run(0).graph_sets == 1


def test_peer_whose_weights_do_not_fit_is_named() -> None:
    calls = []

    def prepare(inputs: dict[str, Any]) -> dict[str, Any]:
        calls.append(1)
        if len(calls) > 3:
            raise MemoryError("no room")
        return inputs

    timer = FakeTimer(ours=1.0, ours_again=1.0)
    result = timed({"ours": Variant(add), "peer": Variant(add, prepare)}, timer)
    assert result.skipped["peer"] == "MemoryError: no room"
    assert set(result.cold_us) == {"ours"}


def test_part_that_a_call_reads_decides_the_cache() -> None:
    """A tenth of a large input is read: two sets of it would stay in the L2."""

    @dataclass(frozen=True)
    class Sparse(AddCase):
        def cost(self) -> Cost:
            return Cost(bytes=4 * self.size // 10, flops=1)

    timer = FakeTimer(ours=1.0, ours_again=1.0)
    result = harness.time_case(
        {"ours": Variant(add)}, Sparse(10_000), timer, CEILINGS, l2_bytes=10_000, device="cpu"
    )
    assert result.graph_sets == 8  # of 4,000 bytes each: over three times the L2
    assert timer.graph_calls == 24


class Pair(NamedTuple):
    a: Tensor
    b: int


@dataclass(frozen=True)
class Holder:
    pair: Pair
    rest: list


def test_clone_copies_tensors_and_nothing_else() -> None:
    shared = object()
    value = {"h": Holder(Pair(torch.ones(2), 3), [torch.zeros(1), shared]), "n": None}
    copy = harness.clone(value)
    copy["h"].pair.a.add_(1)
    copy["h"].rest[0].add_(1)
    assert value["h"].pair.a.tolist() == [1, 1]
    assert value["h"].rest[0].tolist() == [0]
    assert copy["h"].rest[1] is shared
    assert [t.tolist() for t in harness.tensors(copy)] == [[2, 2], [1]]
    assert harness.tensor_bytes(value) == 12


def test_difference_knows_masked_columns() -> None:
    inf = float("-inf")
    ours = torch.tensor([1.0, 2.0, inf])
    assert harness.difference([torch.tensor([1.0, 2.0, inf])], [ours]) == 0.0
    assert harness.difference([torch.tensor([1.0, 2.0, 3.0])], [ours]) == float("inf")
    assert harness.difference([torch.tensor([1.0, float("nan"), inf])], [ours]) == float("inf")
    assert harness.difference([torch.zeros(2)], [ours]) == float("inf")
    assert harness.difference([], [ours]) == float("inf")


def test_gate_is_green_on_the_real_op() -> None:
    checked = harness.gate(bench_rms_norm.OP, "cpu")
    assert checked.green
    assert checked.checked == len(bench_rms_norm.OP.edge) + len(bench_rms_norm.OP.model)


def test_gate_refuses_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_rms_norm.rms_norm

    def off_in_one_column(**inputs: Any) -> Tensor:
        out = right(**inputs)
        out[..., -1:] *= 1.01
        return out

    monkeypatch.setattr(bench_rms_norm, "rms_norm", off_in_one_column)
    checked = harness.gate(bench_rms_norm.OP, "cpu")
    assert not checked.green
    assert all("relative L2 error" in text for text in checked.failures.values())


def test_gate_keeps_the_error_of_a_crashing_case() -> None:
    def crash(case: AddCase, device: str) -> None:
        raise RuntimeError(f"launch failed on {device}")

    op = OpBench("add", [AddCase(1)], [AddCase(2)], [], crash, {"ours": Variant(add)})
    checked = harness.gate(op, "cpu")
    assert set(checked.failures) == {"add-1", "add-2"}
    assert "RuntimeError: launch failed on cpu" in checked.failures["add-1"]
    assert "Traceback" in checked.failures["add-1"]
    assert harness.gate(op, "cpu", smoke=True).checked == 1


def test_quick_gate_leaves_out_edge_cases_of_slow_ops() -> None:
    seen: list[str] = []

    def record(case: AddCase, device: str) -> None:
        seen.append(str(case))

    lists = ([AddCase(1)], [AddCase(2)], [AddCase(3), AddCase(4)])
    op = OpBench("add", *lists, record, {"ours": Variant(add)})
    assert harness.gate(op, "cpu", quick=True).checked == 2
    assert op.timed(quick=True) == op.bench
    slow = replace(op, quick=[AddCase(4)])
    seen.clear()
    assert harness.gate(slow, "cuda", quick=True).green
    assert seen == ["add-2", "add-4"]
    assert slow.timed(quick=True) == [AddCase(4)]
    assert harness.gate(slow, "cuda").checked == 3
    assert slow.timed(quick=False) == op.bench
    assert harness.gate(slow, "cpu", quick=True, smoke=True).checked == 1  # never nothing


def test_gate_without_cases_is_red() -> None:
    empty = OpBench("add", [], [], [], lambda *_: None, {"ours": Variant(add)})
    assert not harness.gate(empty, "cpu").green


def test_missing_peer_is_named_and_not_fatal() -> None:
    variants, missing = harness.resolve(bench_rms_norm.OP, "cpu")
    assert set(variants) | set(missing) == {"ours", "torch", "flashinfer", "liger"}
    for why in missing.values():
        assert "Error" in why


def test_ceilings_come_from_medians() -> None:
    timer = FakeTimer(copy=1000.0, matmul=100.0, empty=2.0, read=900.0)
    result = ceilings.measure(timer, repeats=3, device="cpu", scale=64)
    half = ceilings.STREAM_BYTES // 64 // 2
    assert result.copy == pytest.approx(2 * half / 1001e-6)
    assert result.matmul_bf16 == pytest.approx(2 * (ceilings.MATRIX // 64) ** 3 / 101e-6)
    assert result.launch_graph_us == 1.0
    assert (result.read is None) == bool(result.read_why_not)
    assert "device copy" in ceilings.show(result)


@pytest.mark.gpu
def test_timer_measures_a_copy_within_what_the_chip_can() -> None:
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    calls: dict[str, list[Call]] = {
        "once": [lambda: target.copy_(source)],
        "twice": [lambda: (target.copy_(source), target.copy_(source))],
    }
    timer = CudaTimer()
    for samples in (timer.events(calls, 10), timer.graph(calls, 5)):
        assert samples.flaws == {}
        once, twice = (Summary.of(samples.us[name]).median for name in calls)
        assert 8 * 2**28 / once * 1e6 < 10e12  # bytes/s: no GPU reads and writes faster
        assert twice > once  # how much more is the other processes' business too


@pytest.mark.gpu
def test_variant_that_waits_for_the_gpu_is_flagged() -> None:
    x = torch.ones(8, device="cuda")
    timer = CudaTimer()
    assert "launch gaps" in timer.events({"waits": [lambda: x.sum().item()]}, 4).flaws["waits"]
    assert "not captured" in timer.graph({"waits": [lambda: x.sum().item()]}, 4).flaws["waits"]
