"""Check first, then time: an op's cases against the float64 oracle, its variants side by side.

An op's bench_<op>.py fills an `OpBench`; `gate` and `time_case` do the rest. A red gate means that
no time is taken, and a variant whose result is not ours' is not timed either.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from tml_kernels.testing import Cost, relative_l2

from .ceilings import Ceilings
from .report import clip
from .stats import Summary, noise
from .timing import GRAPH_CALLS, Call, Samples, Timer

AGAIN = "ours again"  # timed beside "ours": what two times of the same code differ by
# How far a variant may be from ours and still be the same function: two bf16 roundings of the
# output and of intermediate results, which peers do not all keep in float32.
SAME_FUNCTION = 3e-2


class Case(Protocol):
    """What an op's cases.py lists; str(case) is its name in results."""

    def make_inputs(self, device: str) -> dict[str, Any]: ...
    def cost(self) -> Cost: ...


@dataclass(frozen=True)
class Variant:
    """Something that computes the op: takes a case's inputs by keyword, returns what ours returns.

    prepare: makes the keywords of `run` from a case's inputs once, untimed: a peer's weight layout
    or dtype. check=False: the result has another layout or draws other numbers; not compared.
    limit: relative L2 difference from ours that is still the same function. cost: what it moves,
    where that is not what the case says: a peer's weights have more bits.
    """

    run: Callable[..., Any]
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict
    check: bool = True
    limit: float = SAME_FUNCTION
    cost: Callable[[Any], Cost] | None = None


CaseT = TypeVar("CaseT", bound=Case)


@dataclass(frozen=True)
class OpBench(Generic[CaseT]):
    """One op: how it is checked, and what is timed.

    check(case, device) raises where ours is not the oracle's function. variants: by name, "ours"
    among them. peers: by name, a function that imports the peer and returns its variant.

    quick: what is timed where time is short, of cases that are slow to make or to compile; the
    edge cases are then left to the tests. sets: how many input sets to rotate among even where one
    alone exceeds the L2, memory allowing: layers of a model have weights of their own. graph_calls:
    how many calls one graph has. launches: counts the kernels that a call of ours launches, of a
    block of several ops.
    """

    name: str
    edge: Sequence[CaseT]
    model: Sequence[CaseT]
    bench: Sequence[CaseT]
    check: Callable[[CaseT, str], None]
    variants: Mapping[str, Variant]
    peers: Mapping[str, Callable[[], Variant]] = field(default_factory=dict)
    quick: Sequence[CaseT] = ()
    sets: int = 1
    graph_calls: int = GRAPH_CALLS
    launches: Callable[[Call], int] | None = None

    def timed(self, *, quick: bool) -> Sequence[CaseT]:
        return self.quick if quick and self.quick else self.bench


def load(op: str) -> OpBench:
    """`OP` of bench_<op>.py."""
    return importlib.import_module(f"bench.bench_{op}").OP


@dataclass(frozen=True)
class Gate:
    """checked: how many cases ran. failures: case name -> what was wrong."""

    checked: int
    failures: dict[str, str]

    @property
    def green(self) -> bool:
        return self.checked > 0 and not self.failures


def gate(op: OpBench, device: str, *, smoke: bool = False, quick: bool = False) -> Gate:
    """Run the op's cases, and on a GPU its smallest timed case, against the oracle.

    smoke: the edge cases alone. quick: not the edge cases, of an op with quick cases, but for
    smoke.
    """
    cases = list(op.edge) if smoke or not (quick and op.quick) else []
    cases += [] if smoke else op.model
    timed = op.timed(quick=quick)
    if device == "cuda" and timed:  # in the dtype that is timed
        cases.append(min(timed, key=lambda case: case.cost().bytes))
    failures = {}
    for index, case in enumerate(cases):
        torch.manual_seed(0)
        try:
            op.check(case, device)
        except Exception as error:
            trace = "" if isinstance(error, AssertionError) else clip(traceback.format_exc())
            name = str(case) if str(case) not in failures else f"{case}, case {index}"
            failures[name] = f"{type(error).__name__}: {error}\n{trace}".strip()
    return Gate(len(cases), failures)


def named(op: OpBench, cases: Sequence[CaseT], texts: Sequence[str] | None) -> list[CaseT]:
    """The cases whose name has one of the texts; all without. SystemExit for a text of none."""
    for text in texts or ():
        if not any(text in str(case) for case in cases):
            names = ", ".join(map(str, cases))
            raise SystemExit(f"--case {text}: no case of {op.name} has it; there are {names}")
    return [case for case in cases if not texts or any(text in str(case) for text in texts)]


def check_variants(op: OpBench, names: Sequence[str] | None) -> None:
    """SystemExit for the name of no variant, whether it can run here or not."""
    known = [*op.variants, *op.peers, *(["torch.compile"] if "torch" in op.variants else [])]
    for name in names or ():
        if name not in known:
            raise SystemExit(f"--variant {name}: {op.name} has {', '.join(known)}")


def resolve(
    op: OpBench, device: str, *, only: Sequence[str] | None = None, compile: bool = True
) -> tuple[dict[str, Variant], dict[str, str]]:
    """The variants that can run here, and why the others cannot. only: ours and those of a name.
    compile: also what `torch.compile` makes of torch's, which takes longer than all the rest."""
    variants, missing = dict(op.variants), {}
    if "torch" in variants and device == "cuda":
        if compile:
            eager = variants["torch"]
            compiled = torch.compile(eager.run, dynamic=False)
            variants["torch.compile"] = dataclasses.replace(eager, run=compiled)
        else:
            missing["torch.compile"] = "left out where time is short"
    for name, build in op.peers.items():
        if only is not None and name not in only:
            continue
        try:
            variants[name] = build()
        except Exception as error:  # peers are other people's code: not installed, or changed
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if only is not None:
        variants = {name: v for name, v in variants.items() if name in ("ours", *only)}
    return variants, missing


@dataclass
class CaseResult:
    """Times of one case by variant, in microseconds, and what could not be timed and why."""

    case: str
    bytes: int
    flops: int
    floor_us: float
    cold_us: dict[str, Summary] = field(default_factory=dict)
    graph_us: dict[str, Summary] = field(default_factory=dict)
    graph_l2: str = "warm"
    graph_sets: int = 0
    graph_calls: int = 0
    launches: int | None = None
    noise: float | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)  # bytes, of variants for which it is others

    def fraction(self, variant: str) -> float | None:
        """Floor over the cold time: 1 is the measured ceiling. None if it was not timed."""
        time = self.cold_us.get(variant)
        return None if time is None else self.floor_us / time.median

    def to_json(self) -> dict[str, Any]:
        result = asdict(self)
        result["variants"] = {
            name: {
                "cold_us": asdict(time),
                "graph_us": asdict(self.graph_us[name]) if name in self.graph_us else None,
                "bytes_per_s": self.moved.get(name, self.bytes) / time.median * 1e6,
                "flops_per_s": self.flops / time.median * 1e6,
                "fraction": self.fraction(name),
            }
            for name, time in self.cold_us.items()
        }
        del result["cold_us"], result["graph_us"], result["moved"]
        return result


def time_case(
    op_variants: Mapping[str, Variant],
    case: Case,
    timer: Timer,
    ceilings: Ceilings,
    *,
    l2_bytes: int,
    repeats: int = 60,
    device: str = "cuda",
    sets: int = 1,
    graph_calls: int = GRAPH_CALLS,
    launches: Callable[[Call], int] | None = None,
) -> CaseResult:
    """Time every variant of one case; a variant that fails or differs from ours is left out.

    sets, graph_calls, launches: see `OpBench`.
    """
    cost = case.cost()
    result = CaseResult(
        str(case), cost.bytes, cost.flops, ceilings.floor_us(cost.bytes, cost.flops)
    )
    torch.manual_seed(0)
    inputs = case.make_inputs(device)
    variants = runnable_here(op_variants, inputs, result)
    if "ours" not in variants:
        return result
    result.moved = {name: v.cost(case).bytes for name, v in variants.items() if v.cost is not None}
    # Side by side: a variant in between may wait for the GPU, and only the later one would pay.
    ours = variants["ours"]
    variants = {"ours": ours, AGAIN: ours, **variants}

    # A call may read only a part of its inputs, say some experts of many.
    touched = min(tensor_bytes(inputs), cost.bytes)
    num_sets = count_sets(touched, l2_bytes, least=sets)
    calls = _bind_all(variants, inputs, num_sets, result, large=3 * l2_bytes, device=device)
    _fill(result, "cold_us", timer.events(calls, repeats))
    _fill(result, "graph_us", timer.graph(calls, repeats, at_least=graph_calls))
    if launches is not None:
        result.launches = launches(calls["ours"][0])
    result.graph_sets = len(calls["ours"])
    result.graph_calls = -(-graph_calls // result.graph_sets) * result.graph_sets
    result.graph_l2 = "cold" if result.graph_sets * touched > 2 * l2_bytes else "warm"
    again = result.cold_us.pop(AGAIN, None)
    result.graph_us.pop(AGAIN, None)
    if again is not None:
        result.noise = noise(result.cold_us["ours"], again)
    return result


def _bind_all(
    variants: Mapping[str, Variant],
    inputs: dict[str, Any],
    num_sets: int,
    result: CaseResult,
    *,
    large: int,
    device: str,
) -> dict[str, Sequence[Call]]:
    """A call for each variant and input set. Ops with state write into their inputs: each variant
    has its own, unless they are `large`; of those there are as many as fit."""
    num_bytes = tensor_bytes(inputs)
    common = None
    if num_bytes >= large:
        # Half of the memory is for what variants make of their inputs.
        num_sets = max(1, min(num_sets, free_bytes(device) // 2 // num_bytes))
        common = [inputs, *(clone(inputs) for _ in range(num_sets - 1))]
    calls: dict[str, Sequence[Call]] = {}
    for name, variant in variants.items():
        own = common or [clone(inputs) for _ in range(num_sets)]
        try:
            calls[name] = [_bind(variant, given) for given in own]
        except Exception as error:  # a peer's own form of the weights did not fit
            if name == "ours":
                raise
            result.skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return calls


def free_bytes(device: str) -> int:
    """That can be allocated there; without a limit on the CPU."""
    if device != "cuda":
        return sys.maxsize
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + unused


def _bind(variant: Variant, inputs: dict[str, Any]) -> Call:
    prepared = variant.prepare(inputs)
    return lambda: variant.run(**prepared)


def _fill(result: CaseResult, where: str, samples: Samples) -> None:
    getattr(result, where).update({k: Summary.of(v) for k, v in samples.us.items() if v})
    for name, why in samples.flaws.items():
        if name != AGAIN:
            result.skipped[f"{name} ({where.removesuffix('_us')})"] = why


def runnable_here(
    variants: Mapping[str, Variant], inputs: dict[str, Any], result: CaseResult
) -> dict[str, Variant]:
    """Those that run on copies of the inputs and agree with ours; the others go to `skipped`."""
    good: dict[str, Variant] = {}
    ours: list[Tensor] = []
    order = sorted(variants, key=lambda name: name != "ours")
    for name in order:
        variant = variants[name]
        try:
            actual = tensors(variant.run(**variant.prepare(clone(inputs))))
            if name == "ours":
                ours = actual
            elif variant.check and (error := difference(actual, ours)) > variant.limit:
                result.skipped[name] = f"differs from ours: relative L2 {error:.1e}"
                continue
        except Exception as error:
            lines = f"{type(error).__name__}: {error}".splitlines()
            result.skipped[name] = " ".join(lines)[:300]
            continue
        good[name] = variant
    return good


def difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest relative L2 error over the tensors both have, where ours is finite (columns that are
    masked to -inf must be so in both); infinite if a shape differs."""
    pairs = list(zip(actual, expected, strict=False))
    if not pairs or any(a.shape != e.shape for a, e in pairs):
        return float("inf")
    errors = []
    for a, e in pairs:
        finite = torch.isfinite(e)
        if not torch.equal(a[~finite], e[~finite]):
            return float("inf")
        errors.append(relative_l2(a[finite], e[finite]))
    return max(errors)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, f.name) for f in dataclasses.fields(value)]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def clone(value: Any) -> Any:
    """A deep copy of the tensors in nested containers; everything else is shared."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: clone(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(clone(item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(clone(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        changed = {name: clone(getattr(value, name)) for name in names}
        return dataclasses.replace(value, **changed) if tensors(value) else value
    return value


def tensor_bytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors(value))


def count_sets(num_bytes: int, l2_bytes: int, *, least: int = 1) -> int:
    """Input sets to rotate among: together over three times the L2, 2 to 16 of them; `least` where
    a single set is that large, since it cannot stay in the cache between two calls."""
    if num_bytes >= 3 * l2_bytes:
        return least
    return min(16, max(2, least, -(-3 * l2_bytes // max(1, num_bytes))))
