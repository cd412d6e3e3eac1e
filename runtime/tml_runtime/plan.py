"""The memory plan: whether a model and its sessions fit a GPU, told before anything is allocated,
and what would fit where they do not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from .budget import TIMED, tokens_per_tick
from .errors import InputTypeError, InputValueError
from .model import KvBudget, ModelConfig
from .model.packing import Packing
from .options import check_int
from .sizes import (
    AllowanceBytes,
    StateBytes,
    WeightBytes,
    allowance_bytes,
    state_bytes,
    total,
    weight_bytes,
)

FP8 = torch.float8_e4m3fn
PAGE_DTYPES = {"bf16": torch.bfloat16, "fp8": FP8}
FRAME = (240, 320)  # height and width of what sessions see, unless told

# From most bits to fewest; None: as the model has them, in bfloat16.
EXPERT_STEPS = (None, "fp8", "nvfp4", "mxfp4", "int4")
REST_STEPS = (None, "fp8", "int4")

_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?([KMGT]i?B|B)", re.ASCII)


@dataclass(frozen=True)
class Plan:
    """What is asked of a GPU of `gpu_bytes`, and what it takes. sessions: slots, spare ones that a
    hand-off forks into among them. frame: height and width of what sessions see, or None."""

    config: ModelConfig
    packing: Packing
    sessions: int
    budget: KvBudget
    page_dtype: torch.dtype
    gpu_bytes: int
    frame: tuple[int, int] | None
    drafts: bool = False  # ticks draft, see `InteractionModel.new_state`

    @cached_property
    def weights(self) -> WeightBytes:
        return weight_bytes(self.config, self.packing)

    @cached_property
    def state(self) -> StateBytes:
        return state_bytes(
            self.config, self.packing, self.sessions, self.budget, self.page_dtype,
            drafts=self.drafts,
        )  # fmt: skip

    @cached_property
    def allowance(self) -> AllowanceBytes:
        return allowance_bytes(self.config, self.sessions, drafts=self.drafts)

    @property
    def total_bytes(self) -> int:
        return total(self.weights) + total(self.state) + total(self.allowance)

    @property
    def free_bytes(self) -> int:
        """Below zero: that is how much is missing."""
        return self.gpu_bytes - self.total_bytes

    @property
    def fits(self) -> bool:
        return self.free_bytes >= 0

    def context(self) -> dict[str, tuple[int, float | None]]:
        """By class: tokens that a session's global layers keep at least, and the seconds they stand
        for; None for what has no rate. A tick's text and video come as the user likes: video's are
        those of a frame pair in every tick."""
        rates = tokens_per_tick(self.config, self.frame)
        tick_s = self.config.layout.period_ms / 1000
        found: dict[str, tuple[int, float | None]] = {}
        for name in ("anchor", "text", *TIMED):
            tokens, rate = getattr(self.budget, name), rates.get(name)
            found[name] = (tokens, tokens / rate * tick_s if rate else None)
        return found


def plan(
    config: ModelConfig,
    *,
    experts: str | None,
    rest: str | None,
    sessions: int,
    budget: KvBudget,
    page_dtype: torch.dtype,
    gpu_bytes: int,
    frame: tuple[int, int] | None = FRAME,
    drafts: bool = False,
) -> Plan:
    """A plan of one GPU, which may not fit it: `Plan.fits`. experts, rest: what
    `InteractionModel.random` takes, for a model in bfloat16. Pure.

    Raises InputTypeError or InputValueError naming the value.
    """
    check_int("sessions", sessions, at_least=1)
    check_int("gpu_bytes", gpu_bytes, at_least=1)
    if not isinstance(budget, KvBudget):
        raise InputTypeError(f"budget={budget!r}: expected a KvBudget")
    if page_dtype not in PAGE_DTYPES.values():
        wanted = " or ".join(str(dtype) for dtype in PAGE_DTYPES.values())
        raise InputValueError(f"page_dtype={page_dtype}: expected {wanted}")
    try:
        packing = Packing(experts, rest)
        video, most = tokens_per_tick(config, frame)["video"], config.layout.max_video_tokens
    except ValueError as error:
        raise InputValueError(str(error)) from None
    if video > most:
        raise InputValueError(f"frame={frame}: a pair is {video} tokens, and a tick takes {most}")
    if drafts:
        _ = config.num_drafts  # raises where a tick cannot draft
    return Plan(config, packing, sessions, budget, page_dtype, gpu_bytes, frame, drafts)


def nearest(wanted: Plan) -> list[Plan]:
    """Plans that fit the GPU of one that does not, each as near to it as that change allows.

    First those that change one thing: fp8 pages, a smaller budget, fewer bits, fewer sessions.
    While none of them has as many sessions as are wanted, also those that change one thing beside
    fp8 pages, and then beside the fewest bits too. Empty: not even a small session fits alone.
    """
    fewest = Packing(EXPERT_STEPS[-1], REST_STEPS[-1])
    in_fp8 = replace(wanted, page_dtype=FP8)
    smallest = replace(in_fp8, packing=fewest)
    found: dict[Plan, None] = {}
    for base in (wanted, in_fp8, smallest):
        changes = (
            replace(base, page_dtype=FP8),
            *_smaller_budgets(base),
            *_fewer_bits(base),
            *_fewer_sessions(base),
        )
        found |= dict.fromkeys(other for other in changes if other.fits)
        if any(other.sessions == wanted.sessions for other in found):
            break
    return list(found) or list(_smaller_budgets(replace(smallest, sessions=1)))


def _smaller_budgets(base: Plan) -> Iterator[Plan]:
    """In whole ticks of what comes with the clock, and at least one."""
    rates = tokens_per_tick(base.config, base.frame)

    def at(percent: int) -> Plan:
        held = {name: getattr(base.budget, name) for name in rates}
        tokens = {
            name: min(held[name], max(rate, held[name] * percent // 100 // rate * rate))
            if rate
            else 1  # of what does not come, as little as there can be
            for name, rate in rates.items()
        }
        return replace(base, budget=replace(base.budget, **tokens))

    yield from _largest(99, at)


def _fewer_bits(base: Plan) -> Iterator[Plan]:
    """The largest weights that fit, of those that are nowhere larger than they are."""
    held = base.weights

    def is_smaller(other: Plan) -> bool:
        new = other.weights
        return (
            new != held
            and new.routed_experts <= held.routed_experts
            and new.unembedding <= held.unembedding
        )

    steps = (replace(base, packing=Packing(e, r)) for e in EXPERT_STEPS for r in REST_STEPS)
    fitting = [other for other in steps if is_smaller(other) and other.fits]
    if fitting:
        yield max(fitting, key=lambda other: other.total_bytes)


def _fewer_sessions(base: Plan) -> Iterator[Plan]:
    yield from _largest(base.sessions - 1, lambda sessions: replace(base, sessions=sessions))


def _largest(most: int, make: Callable[[int], Plan]) -> Iterator[Plan]:
    """The plan of the largest number of 1..most that fits; the larger, the more it takes."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if make(middle).fits else (low, middle - 1)
    if low:
        yield make(low)


def parse_bytes(text: str) -> int:
    """Bytes of a size with its unit; kB, MB, GB and TB are powers of 1000. Raises InputValueError.

    >>> parse_bytes("141GB"), parse_bytes("131 GiB"), parse_bytes("143771MiB")
    (141000000000, 140660178944, 150754820096)
    """
    match = _SIZE.fullmatch(text.strip().replace("kB", "KB"))
    if match is None:
        raise InputValueError(f"{text!r} is not a size such as 141GB, 131GiB or 143771MiB")
    number, unit = match.groups()
    size = int(float(number) * _UNITS[unit])
    if size < 1:
        raise InputValueError(f"{text!r} is no memory at all")
    return size


def as_dict(made: Plan) -> dict[str, Any]:
    """Plain data, sizes in bytes."""
    page_dtype = next(name for name, dtype in PAGE_DTYPES.items() if dtype == made.page_dtype)
    return {
        "model": made.config.name,
        "experts": made.packing.experts or "bf16",
        "rest": made.packing.rest or "bf16",
        "sessions": made.sessions,
        "page_dtype": page_dtype,
        "gpu_bytes": made.gpu_bytes,
        "weights": vars(made.weights),
        "state": vars(made.state),
        "allowance": vars(made.allowance),
        "total_bytes": made.total_bytes,
        "free_bytes": made.free_bytes,
        "fits": made.fits,
        "context": {
            name: {"tokens": tokens, "seconds": seconds}
            for name, (tokens, seconds) in made.context().items()
        },
    }
