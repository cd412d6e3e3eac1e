"""The memory plan against the tensors that there are."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import small_config
from test_packed import leaves
from torch import Tensor

from tml_kernels.quant import PackedExperts
from tml_runtime import InteractionModel, ModelConfig
from tml_runtime.budget import budget_for, tokens_per_tick
from tml_runtime.errors import InputTypeError, InputValueError
from tml_runtime.graph import TickGraphs, buckets_of
from tml_runtime.model import KvBudget, ModelState
from tml_runtime.model.config import MTP_LAYERS
from tml_runtime.model.packing import EXPERTS, REST, Packing
from tml_runtime.model.parts import cache_groups
from tml_runtime.model.scratch import Scratch
from tml_runtime.model.weights import DenseWeights
from tml_runtime.plan import FP8, Plan, nearest, parse_bytes, plan
from tml_runtime.sizes import allowance_bytes, scratch_bytes, total, weight_bytes

META = torch.device("meta")
MIB = 1 << 20
H200 = 143_771 * MIB
INKLING = ModelConfig.preset("inkling-small")
TINY = ModelConfig.preset("tiny")
SMALL = small_config()  # no width of it fills a packed block
DRAFTS = small_config(name="drafts", mtp_layers=("local", "global", "local"))
BUDGET = KvBudget(anchor=10, text=100, audio=64, video=65, reply=200, rewind=70)

# A leaf's part, by the beginning of its path; the first that fits.
PARTS = (
    ("mtp.", "mtp_layers"),
    ("layers.mlp.experts.shared.", "shared_experts"),
    ("layers.mlp.experts.", "routed_experts"),
    ("layers.mlp.w", "dense_layers"),
    ("layers.attention.qkvr", "attention"),
    ("layers.attention.out", "attention"),
    ("layers.attention.rel", "attention"),
    ("embed_V_D", "embeddings"),
    ("unembed_V_D", "unembedding"),
    ("audio_", "front_ends"),
    ("patch.", "front_ends"),
    ("flow.", "flow_head"),
    ("", "norms_convs_router"),
)


def wanted(config: ModelConfig = INKLING, **changes: Any) -> Plan:
    asked: dict[str, Any] = {
        "experts": "int4",
        "rest": "fp8",
        "sessions": 32,
        "budget": KvBudget(),
        "page_dtype": torch.bfloat16,
        "gpu_bytes": H200,
    }
    return plan(config, **(asked | changes))


@pytest.mark.parametrize(
    ("config", "experts", "rest"),
    [
        *[(SMALL, experts, rest) for experts in (None, *EXPERTS) for rest in (None, *REST)],
        (DRAFTS, None, None),
        (DRAFTS, "int4", "fp8"),  # which leaves the layers that draft as they are
        *[(TINY, experts, None) for experts in (None, *EXPERTS)],
        *[(TINY, None, rest) for rest in REST],
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_weights_are_the_bytes_that_a_model_has(
    config: ModelConfig, experts: str | None, rest: str | None
) -> None:
    """Exactly, part by part, padding of widths that fill no block included."""
    model = InteractionModel.random(config, dtype=torch.bfloat16, experts=experts, rest=rest)
    found = dict.fromkeys((part for _, part in PARTS), 0)
    for name, leaf in leaves(model.weights):
        found[next(part for prefix, part in PARTS if name.startswith(prefix))] += leaf.nbytes
    assert vars(weight_bytes(config, Packing(experts, rest))) == found


@pytest.mark.parametrize("config", [SMALL, TINY, DRAFTS], ids=lambda config: config.name)
@pytest.mark.parametrize("page_dtype", [torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("sessions", [1, 5])
def test_state_is_the_bytes_that_sessions_have(
    config: ModelConfig, page_dtype: torch.dtype, sessions: int
) -> None:
    options: dict[str, Any] = {"budget": BUDGET, "page_dtype": page_dtype}
    options["drafts"] = config is DRAFTS
    model = InteractionModel.random(config, dtype=torch.bfloat16)
    state = model.new_state(sessions, **options)
    planned = wanted(config, sessions=sessions, frame=None, **options).state
    pages = {True: 0, False: 0}
    lists = 0
    for group in state.groups:
        contents = group.pages.contents().values()
        pages[group.window is not None] += sum(x.nbytes for x in contents)
        tables = (group.pages.page_N_M, group.pages.base_N_M, group.pages.rows_N_M)
        lists += sum(x.nbytes for x in tables)
    held = [x.nbytes for x in vars(state).values() if isinstance(x, Tensor)]
    held += [group.conv_L_N_2_3_W.nbytes for group in state.groups]
    past = state.cache._state._past
    assert (planned.local_rings, planned.global_pages) == (pages[True], pages[False])
    assert planned.page_lists == lists
    assert planned.taps == sum(held)
    assert planned.snapshots == sum(x.nbytes for kept in past for x in kept)
    assert planned.buffers == state.buffers.num_bytes


def test_a_tick_that_drafts_copies_the_taps_that_sessions_have() -> None:
    model = InteractionModel.random(DRAFTS, dtype=torch.bfloat16)
    stacks = [x.nbytes for x in model.new_state(5, budget=BUDGET, drafts=True).taps()]
    drafting, alone = (
        allowance_bytes(DRAFTS, 5, drafts=drafts).activations for drafts in (True, False)
    )
    logits = DRAFTS.num_drafts * 5 * 4 * 2 * DRAFTS.vocab.size
    assert drafting - alone == sum(stacks) + 2 * max(stacks) + logits


def takes_scratch(model: InteractionModel, state: ModelState, scratch: Scratch) -> None:
    """All calls of `Backbone` and `Speaker` that take some, in every bucket."""
    config = model.config
    for bucket in reversed(buckets_of(config.layout, state.num_slots)):
        for tokens in (bucket.tokens, bucket.rows):
            for layer, w in enumerate(model.weights.layers):
                attention, mlp, heads = w.attention, w.mlp, config.heads(layer)
                for weight in (attention.qkvr_J_D, attention.out_D_I):
                    scratch.linear(meta(tokens, columns(weight)), weight)
                if isinstance(mlp, DenseWeights):
                    for weight in (mlp.w13_J_D, mlp.w2_D_F):
                        scratch.linear(meta(tokens, columns(weight)), weight)
                elif tokens == bucket.rows:
                    x = meta(tokens, config.width)
                    scratch.routing(x, mlp.experts, config.experts.top_k)
                group = next(g for g in state.groups if g.window == heads.window)
                lists = SimpleNamespace(page_S_M=meta(bucket.rows, group.pages.spec.columns))
                q = meta(tokens, heads.num_heads, heads.head_width)
                rel = meta(tokens, heads.num_heads, config.d_rel)
                k_pages = group.pages.k_pages_L_P_G_R_C[0]
                scratch.attention(q, k_pages, cast(Any, lists), heads.window, rel)
        logits = meta(bucket.rows, config.vocab.size)
        scratch.linear(meta(bucket.rows, config.width), model.weights.unembed_V_D)
        scratch.sample(logits)


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=META)


def columns(weight: Tensor | PackedExperts) -> int:
    return weight.shape[1] if isinstance(weight, Tensor) else weight.num_columns


@pytest.mark.parametrize(("experts", "rest"), [("int4", "fp8"), (None, None), (None, "int4")])
def test_scratch_is_what_the_buckets_calls_take(experts: str | None, rest: str | None) -> None:
    """Of products, attention and draws; a routing's is compared on a GPU."""
    config = replace(TINY, width=2048)  # its products are split
    model = InteractionModel.random(config, dtype=torch.bfloat16, experts=experts, rest=rest)
    state, scratch = model.new_state(3, budget=BUDGET), Scratch(META)
    takes_scratch(model, state, scratch)
    specs = [group.pages.spec for group in state.groups]
    packing = Packing(experts, rest)
    planned = scratch_bytes(config, packing, specs, 3, torch.bfloat16)
    dense = replace(config, dense_layers=tuple(config.layers))  # nothing is routed
    routed = planned - scratch_bytes(dense, packing, specs, 3, torch.bfloat16)
    assert {"linear", "paged_attention", "sample of 1", "sample of 2", "sample of 3"} == set(
        scratch._buffers
    )
    assert planned - routed == sum(buffer.nbytes for buffer in scratch.buffers())
    assert 0 < sum(map(routing_bytes, scratch._routings.values())) < routed


def routing_bytes(routing: Any) -> int:
    schedule = routing.schedule
    tensors = [*vars(routing).values(), None if schedule is None else schedule.buffer]
    return sum(x.nbytes for x in tensors if isinstance(x, Tensor))


@pytest.mark.gpu
@pytest.mark.parametrize("drafts", [0, 2])
def test_gpu_scratch_is_as_large_as_planned(drafts: int) -> None:
    config, packing = replace(TINY, mtp_layers=MTP_LAYERS[:drafts]), Packing("int4", "fp8")
    model = InteractionModel.random(
        config, device="cuda", dtype=torch.bfloat16, experts="int4", rest="fp8"
    )
    state = model.new_state(6, budget=BUDGET, drafts=drafts > 0)
    TickGraphs(model, state)
    longest = config.layout.max_tokens_per_tick
    specs = cache_groups(config.with_drafts(drafts), 6, BUDGET, longest)
    found = sum(buffer.nbytes for buffer in state.scratch.buffers())
    found += sum(map(routing_bytes, state.scratch._routings.values()))
    planned = scratch_bytes(config, packing, specs, 6, torch.bfloat16, num_drafts=drafts)
    assert found == planned


@pytest.mark.parametrize(
    ("experts", "rest", "mib"),
    [
        (None, None, 502_875),
        ("fp8", "fp8", 252_284),
        ("nvfp4", None, 149_595),
        ("mxfp4", None, 141_915),
        ("int4", "fp8", 133_500),
        ("mxfp4", "fp8", 137_355),
    ],
)
def test_weights_of_the_published_shape(experts: str | None, rest: str | None, mib: int) -> None:
    """The first four were counted by hand from the published widths: bits per weight, of layers,
    embedding and unembedding. The plan has more, in all of them alike: front ends (132 MiB) and a
    speech head (148), which the count leaves out, and convolutions in float32."""
    weights = weight_bytes(INKLING, Packing(experts, rest))
    assert total(weights) / MIB == pytest.approx(mib, rel=0.01)
    assert weights.front_ends // MIB == 132 and weights.flow_head // MIB == 148


def test_a_session_of_the_published_shape() -> None:
    """A ring of 512 tokens is 70 MiB (73 MB), a token of the global layers 28 KiB: by the pages."""
    one, two = wanted(sessions=1).state, wanted(sessions=2).state
    pages = 12 + 6 + 2  # window and rewind, the longest tick, both ends
    assert two.local_rings - one.local_rings == pages * 64 * 70 * MIB // 512
    more = wanted(sessions=1, budget=replace(KvBudget(), audio=1536 + 640)).state
    position = 8  # bytes
    assert more.global_pages - one.global_pages == 640 * (28 * 1024 + position)
    in_fp8 = wanted(sessions=1, page_dtype=FP8).state
    assert in_fp8.local_rings / one.local_rings == pytest.approx(0.5 + 4 / 256)  # and a scale


def test_a_plan_that_fits_adds_up() -> None:
    made = wanted(sessions=8, page_dtype=FP8)
    assert made.fits and made.free_bytes == H200 - made.total_bytes
    assert made.total_bytes == sum(
        sum(vars(part).values()) for part in (made.weights, made.state, made.allowance)
    )
    exact = replace(made, gpu_bytes=made.total_bytes)
    assert exact.fits and not replace(exact, gpu_bytes=exact.gpu_bytes - 1).fits


def test_seconds_are_those_of_the_tokens() -> None:
    found = wanted(budget=KvBudget(audio=200, video=480, reply=100)).context()
    assert found["audio"] == (200, pytest.approx(10.0))  # 4 in 200 ms
    assert found["reply"] == (100, pytest.approx(5.0))
    assert found["video"] == (480, pytest.approx(2.0))  # 48 of a pair of 320x240
    assert found["anchor"][1] is None and found["text"][1] is None
    assert wanted(frame=None).context()["video"] == (1024, None)


@given(seconds=st.integers(1, 5000).map(lambda ticks: ticks / 5))
@settings(deadline=None, max_examples=100)
def test_whole_ticks_of_seconds_are_whole_ticks_of_tokens(seconds: float) -> None:
    budget = budget_for(INKLING, {"audio": seconds, "video": seconds}, (240, 320))
    ticks = round(seconds * 5)
    assert (budget.audio, budget.video, budget.reply) == (4 * ticks, 48 * ticks, 1536)


@given(
    sessions=st.integers(1, 80),
    keep=st.integers(1, 200),
    gpu_gib=st.integers(8, 300),
    experts=st.sampled_from([None, *EXPERTS]),
    rest=st.sampled_from([None, *REST]),
    page_dtype=st.sampled_from([torch.bfloat16, FP8]),
)
@settings(deadline=None, max_examples=15)
def test_the_nearest_plans_fit_and_ask_for_no_more(
    sessions: int,
    keep: int,
    gpu_gib: int,
    experts: str | None,
    rest: str | None,
    page_dtype: torch.dtype,
) -> None:
    made = wanted(
        sessions=sessions,
        budget=budget_for(INKLING, dict.fromkeys(("audio", "video", "reply"), keep), (240, 320)),
        gpu_bytes=gpu_gib << 30,
        experts=experts,
        rest=rest,
        page_dtype=page_dtype,
    )
    if made.fits:
        return
    found = nearest(made)
    assert len(set(found)) == len(found)
    for other in found:
        assert other.fits and other.gpu_bytes == made.gpu_bytes
        assert other.sessions <= made.sessions
        assert all(getattr(other.budget, name) <= n for name, n in vars(made.budget).items())
        assert other.page_dtype in (made.page_dtype, FP8)
        for part, size in vars(other.weights).items():
            assert size <= vars(made.weights)[part]
        more = replace(other, sessions=other.sessions + 1)
        assert other.sessions == made.sessions or not more.fits


def test_one_change_is_enough_where_it_keeps_the_sessions() -> None:
    only_bits = wanted(sessions=4, experts="nvfp4", rest=None)
    found = nearest(only_bits)
    assert {other.packing for other in found} == {Packing("int4", None)}  # the most bits that fit
    assert [other.page_dtype for other in found] == [torch.bfloat16]


def test_where_nothing_fits_nothing_is_named() -> None:
    assert nearest(wanted(gpu_bytes=80 << 30, sessions=1)) == []


def test_a_smaller_budget_keeps_a_tick_of_everything() -> None:
    budget = budget_for(INKLING, {"audio": 900.0, "video": 900.0, "reply": 900.0}, (240, 320))
    found = nearest(wanted(sessions=1, budget=budget))
    smaller = next(other for other in found if other.budget != budget)
    rates = tokens_per_tick(INKLING, (240, 320))
    for name, rate in rates.items():
        tokens = getattr(smaller.budget, name)
        assert rate <= tokens < getattr(budget, name) and tokens % rate == 0
    assert (smaller.budget.text, smaller.budget.anchor) == (budget.text, budget.anchor)


def test_a_smaller_budget_keeps_nothing_of_what_does_not_come() -> None:
    """So that it is the one that its seconds stand for, and what is free is used."""
    base = wanted(sessions=200, gpu_bytes=192 * 10**9, rest=None, frame=None, page_dtype=FP8)
    budgets = [other.budget for other in nearest(base) if other.budget != base.budget]
    assert budgets
    for budget in budgets:
        seconds = {name: getattr(budget, name) / 20 for name in ("audio", "reply")}
        assert budget == budget_for(INKLING, {**seconds, "video": 10.0}, None)
        assert not replace(base, budget=replace(budget, video=base.budget.video)).fits


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("141GB", 141 * 10**9),
        ("131GiB", 131 << 30),
        ("143771MiB", H200),
        (" 1.5 TB ", 1_500_000_000_000),
        ("7B", 7),
        ("64kB", 64_000),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "141", "GB", "-1GB", "141gb", "1e3GB", "nanGB", "0GB", "٣GB", "9" * 400 + "GB"]
)
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(InputValueError, match="is no"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sessions": 0}, "sessions=0 is less than 1"),
        ({"sessions": 2.0}, "sessions=2.0: expected an int"),
        ({"gpu_bytes": -5}, "gpu_bytes=-5"),
        ({"experts": "int3"}, "experts: 'int3' is not None or one of fp8"),
        ({"rest": "mxfp4"}, "rest: 'mxfp4' is not None or one of fp8"),
        ({"drafts": True}, "drafts: model 'inkling-small' has 0 multi-token-prediction layers"),
        ({"page_dtype": torch.float16}, "page_dtype=torch.float16: expected torch.bfloat16 or"),
        ({"budget": 5}, "budget=5: expected a KvBudget"),
        ({"frame": (240, 321)}, "frame width 321 is not a multiple of 40"),
        ({"frame": (4000, 4000)}, "a pair is 10000 tokens, and a tick takes 256"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((InputValueError, InputTypeError), match=message):
        wanted(**changes)
