"""TmlCache and attn_implementation="tml": eager's logits while nothing was dropped, and those of
StreamingLLM's rule afterwards."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec, module_from_spec
from typing import Any

import pytest
import torch
import transformers
from small_models import SIZES, SMALL, randomise
from streaming_reference import LIKE_LLAMA, MODELS, Streaming, make_model
from torch import Tensor

from tml_kernels.integrations.transformers import attention, attention_forward, register
from tml_kernels.integrations.transformers.cache import TmlCache
from tml_kernels.integrations.transformers.layers import cache_argument, rope_phase
from tml_kernels.integrations.transformers.sinks import Sinks
from tml_kernels.kv_cache import WindowPassed
from tml_kernels.testing import assert_bitwise, assert_matches, relative_l2


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register()
    with torch.no_grad():
        yield


def tml(model: Any) -> Any:
    model.set_attn_implementation("tml")
    return model


def logits(model: Any, ids: Tensor, cache: Any = None, **given: Any) -> Tensor:
    if cache is not None:
        given[cache_argument(model)] = cache
    return model(ids, use_cache=cache is not None, **given).logits


def eager_logits(model: Any, ids: Tensor) -> Tensor:
    used = model.config._attn_implementation
    model.set_attn_implementation("eager")
    result = logits(model, ids)
    model.set_attn_implementation(used)
    return result


def in_pieces(model: Any, ids: Tensor, cache: Any, sizes: Sequence[int]) -> Tensor:
    """The logits of all ids: pieces of these sizes, then one token at a time."""
    pieces = ids.split([*sizes, *[1] * (ids.shape[1] - sum(sizes))], 1)
    return torch.cat([logits(model, piece, cache) for piece in pieces], 1)


def generate(model: Any, ids: Tensor, cache: Any = None, **given: Any) -> Tensor:
    if cache is not None:
        given[cache_argument(model)] = cache
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **given,
    )


def random_ids(*shape: int) -> Tensor:
    return torch.randint(0, 97, shape)


# While nothing is dropped


@pytest.mark.parametrize("page_rows", [16, 64])
@pytest.mark.parametrize("num_sinks", [0, 4])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_eager_model_s(name: str, num_sinks: int, page_rows: int) -> None:
    """A prompt in pieces and then token by token; in float32 the sums run in another order."""
    model, ids = tml(make_model(name)), random_ids(2, 90)
    sinks = 0 if name == "mistral" else num_sinks  # has windows alone
    cache = TmlCache(model, max_batch=3, window_tokens=128, num_sinks=sinks, page_rows=page_rows)
    ours = in_pieces(model, ids, cache, [33, 1, 40])
    assert_matches(ours, eager_logits(model, ids), limit=2e-6)
    assert cache.get_seq_length() == 90 and cache.num_dropped == 0
    cache.rolling.check_invariants()


@pytest.mark.parametrize("name", ["llama", "qwen3_sliding", "gemma2"])
def test_generation_is_the_eager_model_s(name: str) -> None:
    """At once, in chunks, and with guesses that are taken back."""
    model, ids = make_model(name), random_ids(1, 5).repeat(2, 8)
    model.set_attn_implementation("eager")
    eager = generate(model, ids, max_new_tokens=12)
    tml(model)
    cache = TmlCache(model, max_batch=2, window_tokens=64, num_sinks=4, page_rows=16)
    for given in ({}, {"prefill_chunk_size": 9}):
        assert_bitwise(generate(model, ids, cache, max_new_tokens=12, **given), eager)
        assert cache.get_seq_length() == 40 + 11
        cache.reset()
    guessed = generate(model, ids[:1], cache, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert_bitwise(guessed, eager[:1])


def test_generation_goes_on_from_the_cache() -> None:
    model, ids = tml(make_model("llama")), random_ids(1, 30)
    cache = TmlCache(model, max_batch=1, window_tokens=64)
    longer = torch.cat([generate(model, ids, cache, max_new_tokens=5), random_ids(1, 7)], 1)
    seen = []
    hook = model.model.embed_tokens.register_forward_hook(lambda *a: seen.append(a[1][0].shape[1]))
    ours = generate(model, longer, cache, max_new_tokens=5)
    hook.remove()
    assert seen == [8, 1, 1, 1, 1], "what the cache holds was computed again"
    model.set_attn_implementation("eager")
    assert_bitwise(ours, generate(model, longer, max_new_tokens=5))


# Without a TmlCache

MOE = {"intermediate_size": 48, "num_experts_per_tok": 2}
QWEN2_MOE = {
    **MOE, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
}  # fmt: skip
SLIDING = {
    "PhimoeForCausalLM": {**MOE, "num_local_experts": 4, "sliding_window": 6},
    "Qwen2MoeForCausalLM": {
        **QWEN2_MOE, "use_sliding_window": True, "sliding_window": 6,
        "layer_types": ["sliding_attention"] * 2,
    },
}  # fmt: skip
STRIDED = {
    "GlmForCausalLM": {"intermediate_size": 48, "head_dim": 16, "pad_token_id": 0},
    "PhiForCausalLM": {"intermediate_size": 48},
    "GPTNeoXForCausalLM": {"intermediate_size": 48},
}


def make_other(name: str, given: dict[str, Any]) -> Any:
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))(**{**SIZES, **given})
    return randomise(getattr(transformers, name)(config).eval())


@pytest.mark.parametrize("name", SLIDING)
def test_windows_that_a_model_does_not_give_its_attention_are_kept(name: str) -> None:
    """Some know theirs by the mask alone."""
    model, ids = make_other(name, SLIDING[name]), random_ids(2, 24)
    expected = eager_logits(model, ids)
    assert_matches(logits(tml(model), ids), expected, limit=1e-5)
    assert_matches(in_pieces(model, ids, transformers.DynamicCache(), [9]), expected, limit=1e-5)


def test_a_window_of_0_that_no_layer_has_hides_nothing() -> None:
    """Qwen2-MoE as it is published makes a mask for such layers all the same."""
    model, ids = make_other("Qwen2MoeForCausalLM", QWEN2_MOE), random_ids(2, 24)
    assert model.config.sliding_window == 0
    expected = eager_logits(model, ids)
    assert_matches(logits(tml(model), ids), expected, limit=2e-6)
    for cache in (transformers.DynamicCache(), small_cache(model, num_sinks=4)):
        assert_matches(in_pieces(model, ids, cache, [9]), expected, limit=2e-6)


def test_a_layer_with_a_window_of_0_is_refused() -> None:
    given = {**QWEN2_MOE, "layer_types": ["full_attention", "sliding_attention"]}
    model = tml(make_other("Qwen2MoeForCausalLM", given))
    with pytest.raises(NotImplementedError, match="a sliding window of 0 keys"):
        logits(model, random_ids(1, 4))


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("batch", [1, 2])
def test_queries_that_lie_in_memory_as_the_model_left_them(name: str, batch: int) -> None:
    model, ids = make_other(name, STRIDED[name]), random_ids(batch, 24)
    assert_matches(logits(tml(model), ids), eager_logits(model, ids), limit=1e-5)


def test_chunks_are_refused_once_there_are_two() -> None:
    given = {
        **MOE, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1,
        "attention_chunk_size": 8, "no_rope_layers": [1, 1], "head_dim": 16,
        "interleave_moe_layer_step": 2,
    }  # fmt: skip
    config = transformers.Llama4TextConfig(**{**SIZES, **given})
    model, ids = randomise(transformers.Llama4ForCausalLM(config).eval()), random_ids(2, 9)
    expected = eager_logits(model, ids)
    assert_matches(logits(tml(model), ids[:, :8]), expected[:, :8], limit=1e-5)
    with pytest.raises(NotImplementedError, match="9 keys in chunks of 8"):
        logits(model, ids)


# After it has rolled


def stream(model: Any, cache: TmlCache, reference: Streaming, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of both for all ids, in pieces of many sizes."""
    sizes, ours, theirs = [23, 1, 1, 40, 7, 1, 16], [], []
    begin = n = 0
    while begin < ids.shape[1]:
        piece = ids[:, begin : begin + sizes[n % len(sizes)]]
        ours.append(logits(model, piece.to(model.device), cache).cpu())
        theirs.append(reference.forward(piece))
        assert cache.num_dropped == reference.num_dropped
        begin, n = begin + piece.shape[1], n + 1
    assert cache.get_seq_length() == reference.length == ids.shape[1]
    return torch.cat(ours, 1), torch.cat(theirs, 1)


@pytest.mark.parametrize(
    ("name", "num_sinks", "page_rows"),
    [
        ("llama", 4, 16),
        ("llama", 0, 16),
        ("llama", 20, 16),  # over two pages
        ("llama", 4, 64),
        ("llama_yarn", 4, 16),  # other frequencies, and cosines times a factor
        ("qwen3", 4, 16),
        ("qwen3", 0, 64),
        ("qwen3_sliding", 4, 16),  # one layer of full attention, two with windows
    ],
)
def test_rolled_logits_are_streaming_llm_s(name: str, num_sinks: int, page_rows: int) -> None:
    model, ids = tml(make_model(name)), random_ids(2, 400)
    cache = TmlCache(
        model, max_batch=2, window_tokens=64, num_sinks=num_sinks, max_append=40, history=0,
        page_rows=page_rows,
    )  # fmt: skip
    num_pages = -(-63 // page_rows) + 1
    reference = Streaming(model, num_sinks=num_sinks, num_pages=num_pages, page_rows=page_rows)
    ours, theirs = stream(model, cache, reference, ids)
    assert cache.num_dropped > 200
    cache.rolling.check_invariants()
    # transformers rotates by float32 angles, off by up to 2^-24 of 400 rad: 2e-5.
    assert_matches(ours, theirs, limit=1e-5)
    assert relative_l2(eager_logits(model, ids)[:, -100:], theirs[:, -100:]) > 1e-2


def test_sinks_that_stay_behind_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above tells sinks that are not moved from those that are."""
    monkeypatch.setattr(Sinks, "move", lambda self, distance: None)
    model, ids = tml(make_model("llama")), random_ids(1, 300)
    cache = TmlCache(
        model, max_batch=1, window_tokens=64, num_sinks=4, max_append=40, history=0, page_rows=16
    )
    reference = Streaming(model, num_sinks=4, num_pages=5, page_rows=16)
    ours, theirs = stream(model, cache, reference, ids)
    assert relative_l2(ours, theirs) > 1e-3


def test_rows_do_not_depend_on_each_other() -> None:
    model, ids = tml(make_model("qwen3_sliding")), random_ids(3, 200)
    together, alone = (
        TmlCache(model, max_batch=n, window_tokens=48, num_sinks=4, max_append=32, page_rows=16)
        for n in (3, 1)
    )
    sizes = [32] * 6
    both = in_pieces(model, ids, together, sizes)
    assert_matches(in_pieces(model, ids[1:2], alone, sizes), both[1:2], limit=1e-6)


def test_generation_rolls_in_the_same_memory() -> None:
    model = tml(make_model("qwen3_sliding"))
    cache = TmlCache(model, max_batch=2, window_tokens=32, num_sinks=4, max_append=16, page_rows=16)
    tensors = [
        tensor for group in cache.rolling.groups for tensor in vars(group).values()
        if isinstance(tensor, Tensor)
    ]  # fmt: skip
    before = [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]
    ids, held = random_ids(2, 16), []
    for _ in range(5):
        ids = generate(model, ids, cache, max_new_tokens=30)
        held.append([group.held for group in cache.rolling.stats().groups])
    assert cache.get_seq_length() == 16 + 5 * 30 - 1 and cache.num_dropped > 50
    # Of both rows: sinks, and pages of text; a window, and a page begun; their history in both.
    assert all(full <= 2 * (1 + 7) and windows <= 2 * (6 + 1) for full, windows in held)
    assert held[-1][0] == 2 * (1 + 7)
    assert [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors] == before
    cache.reset()
    assert [group.held for group in cache.rolling.stats().groups] == [0, 0]


# Back, and again


@pytest.mark.parametrize("name", ["llama", "qwen3_sliding"])
def test_crop_is_as_if_never_seen(name: str) -> None:
    model, ids = tml(make_model(name)), random_ids(2, 200)
    make: dict[str, Any] = {
        "max_batch": 2,
        "window_tokens": 48,
        "num_sinks": 4,
        "max_append": 32,
        "page_rows": 16,
    }
    straight, back = TmlCache(model, **make), TmlCache(model, **make)
    sizes = [32, 32, 32, 32, 32]
    expected = in_pieces(model, ids, straight, sizes)
    in_pieces(model, ids[:, :160], back, sizes)
    dropped = back.num_dropped
    assert dropped > 0
    logits(model, random_ids(2, 4), back)  # fills the open page: nothing more is dropped
    assert back.num_dropped == dropped
    back.crop(-4)
    back.crop(0)
    assert back.get_seq_length() == 160
    assert_matches(in_pieces(model, ids[:, 160:], back, []), expected[:, 160:], limit=1e-6)


def test_a_window_is_whole_after_a_crop() -> None:
    """As assisted generation crops what it had guessed, and must be as if it had not."""
    model, ids = tml(make_model("llama")), random_ids(1, 150)
    make: dict[str, Any] = {"window_tokens": 65, "max_append": 64, "history": 64}
    cache = TmlCache(model, max_batch=1, **make)
    in_pieces(model, ids[:, :108], cache, [54, 54])
    for guessed in (21, 40):
        logits(model, random_ids(1, guessed), cache)
        cache.crop(-guessed)
        assert cache.get_seq_length() == 108 and 108 - cache.num_dropped >= 65


def test_crop_into_the_sinks_and_to_nothing() -> None:
    model, ids = tml(make_model("llama")), random_ids(2, 40)
    cache = TmlCache(model, max_batch=2, window_tokens=48, num_sinks=4, page_rows=16)
    expected = eager_logits(model, ids)
    logits(model, torch.cat([ids[:, :3], random_ids(2, 20)], 1), cache)
    cache.crop(-20)
    assert_matches(in_pieces(model, ids[:, 3:], cache, [11]), expected[:, 3:], limit=2e-6)
    cache.crop(-40)
    assert_matches(in_pieces(model, ids, cache, [20]), expected, limit=2e-6)


def test_crop_that_cannot_be_is_refused() -> None:
    model, ids = tml(make_model("qwen3_sliding")), random_ids(1, 160)
    cache = TmlCache(
        model, max_batch=1, window_tokens=64, num_sinks=4, max_append=32, history=0, page_rows=16
    )
    in_pieces(model, ids[:, :64], cache, [32, 32])
    with pytest.raises(ValueError, match=r"crop: expected -64\.\.0, .* got 1"):
        cache.crop(1)
    with pytest.raises(ValueError, match=r"crop: expected -64\.\.0, .* got -65"):
        cache.crop(-65)
    with pytest.raises(WindowPassed):
        cache.crop(-40)
    in_pieces(model, ids[:, 64:], cache, [32, 32, 32])
    oldest = 4 + cache.num_dropped
    assert oldest > 4
    with pytest.raises(ValueError, match=rf"before {oldest} have been dropped: {oldest - 160} is"):
        cache.crop(oldest - 160 - 1)
    assert cache.get_seq_length() == 160
    cache.rolling.check_invariants()


def test_reset_begins_anew_with_another_batch() -> None:
    model, ids = tml(make_model("llama")), random_ids(3, 96)
    make: dict[str, Any] = {"window_tokens": 16, "num_sinks": 4, "max_append": 16, "page_rows": 16}
    make["history"] = 0
    cache, sizes = TmlCache(model, max_batch=3, **make), [16] * 6
    in_pieces(model, random_ids(3, 96), cache, sizes)
    for batch in (1, 2, 3):
        cache.reset()
        assert (cache.get_seq_length(), cache.num_dropped) == (0, 0)
        ours = in_pieces(model, ids[:batch], cache, sizes)
        assert cache.num_dropped > 0
        fresh = TmlCache(model, max_batch=batch, **make)
        assert_bitwise(ours, in_pieces(model, ids[:batch], fresh, sizes))


def test_failed_forward_leaves_no_trace() -> None:
    model, ids = tml(make_model("qwen3_sliding")), random_ids(2, 60)
    make: dict[str, Any] = {"max_batch": 2, "window_tokens": 64, "num_sinks": 4, "page_rows": 16}
    undisturbed, cache = TmlCache(model, **make), TmlCache(model, **make)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    expected = in_pieces(model, ids, undisturbed, [2, 30])
    ours = []
    for piece in ids.split([2, 30, *[1] * 28], 1):
        for layer in (0, 2):
            hook = model.model.layers[layer].mlp.register_forward_hook(fail)
            if layer == 2:  # attention of the last layer ends a forward
                hook.remove()
                hook = model.model.layers[2].self_attn.q_proj.register_forward_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                logits(model, random_ids(*piece.shape), cache)
            hook.remove()
        ours.append(logits(model, piece, cache))
    assert_bitwise(torch.cat(ours, 1), expected)


def test_attention_refused_in_the_last_layer_leaves_no_trace() -> None:
    model, ids = tml(make_model("llama")), random_ids(2, 24)
    undisturbed, cache = small_cache(model), small_cache(model)
    expected = in_pieces(model, ids, undisturbed, [20])
    logits(model, ids[:, :20], cache)
    last = model.model.layers[-1].self_attn
    last.is_causal = False
    with pytest.raises(NotImplementedError, match="is_causal: only True"):
        logits(model, random_ids(2, 3), cache)
    last.is_causal = True
    assert_bitwise(in_pieces(model, ids[:, 20:], cache, []), expected[:, 20:])


# Other dtypes


@pytest.mark.parametrize(
    ("page_dtype", "limit"),
    # bfloat16 rounds by 2^-9 some 20 times on the way; e4m3 by 2^-4, at random over 16 columns.
    [(None, 3e-2), (torch.float32, 3e-2), (torch.float8_e4m3fn, 8e-2)],
)
def test_bfloat16_is_close(page_dtype: torch.dtype | None, limit: float) -> None:
    model, ids = tml(make_model("qwen3")), random_ids(2, 260)
    reference = Streaming(model, num_sinks=4, num_pages=5, page_rows=16)
    half = tml(copy.deepcopy(model).to(torch.bfloat16))
    cache = TmlCache(
        half, max_batch=2, window_tokens=64, num_sinks=4, max_append=40, history=0, page_rows=16,
        page_dtype=page_dtype,
    )  # fmt: skip
    assert cache.rolling.page_dtype == (page_dtype or torch.bfloat16)
    ours, theirs = stream(half, cache, reference, ids)
    assert relative_l2(ours.float(), theirs) < limit


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("page_dtype", "limit"), [(None, 3e-2), (torch.float16, 3e-2), (torch.float8_e4m3fn, 8e-2)]
)
def test_gpu_bfloat16_is_close(page_dtype: torch.dtype | None, limit: float) -> None:
    """As on the CPU, with heads as wide as kernels want them, and a layer of each kind."""
    model, ids = make_model("qwen3_sliding", head_dim=64), random_ids(2, 400)
    reference = Streaming(model, num_sinks=4, num_pages=3, page_rows=64)
    half = tml(model.to("cuda", torch.bfloat16))
    cache = TmlCache(
        half, max_batch=2, window_tokens=128, num_sinks=4, max_append=40, history=0,
        page_dtype=page_dtype,
    )  # fmt: skip
    ours, theirs = stream(half, cache, reference, ids)
    assert cache.num_dropped > 0
    cache.rolling.check_invariants()
    assert relative_l2(ours.float(), theirs) < limit


# Without TmlCache


@pytest.mark.parametrize("name", MODELS)
def test_attention_without_tml_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache at all, and transformers' own."""
    calls = []
    spied = attention.paged_attention
    monkeypatch.setattr(
        attention, "paged_attention", lambda *a, **k: calls.append(0) or spied(*a, **k)
    )
    model, ids = tml(make_model(name)), random_ids(2, 70)
    eager = eager_logits(model, ids)
    assert calls == []
    assert_matches(logits(model, ids), eager, limit=2e-6)
    assert calls == [0, 0, 0]
    ours = in_pieces(model, ids, transformers.DynamicCache(config=model.config), [30, 35])
    assert_matches(ours, eager, limit=2e-6)


def test_register_names_the_attention() -> None:
    assert transformers.AttentionInterface()["tml"] is attention_forward
    loaded = transformers.LlamaForCausalLM._from_config(
        transformers.LlamaConfig(**LIKE_LLAMA), attn_implementation="tml"
    )
    assert loaded.config._attn_implementation == "tml"


# Refusals


def small_cache(model: Any, **given: Any) -> TmlCache:
    return TmlCache(model, **{"max_batch": 2, "window_tokens": 32, "page_rows": 16, **given})


def test_batch_that_does_not_fit_is_refused() -> None:
    model = tml(make_model("llama"))
    cache = small_cache(model)
    with pytest.raises(ValueError, match=r"a batch of 3 is over max_batch=2"):
        logits(model, random_ids(3, 4), cache)
    logits(model, random_ids(1, 4), cache)
    with pytest.raises(ValueError, match=r"holds a batch of 1, got one of 2; reset\(\)"):
        logits(model, random_ids(2, 4), cache)
    assert cache.get_seq_length() == 4


def test_forward_that_is_too_long_is_refused() -> None:
    model, ids = tml(make_model("llama")), random_ids(1, 200)
    cache = small_cache(model, max_append=16)
    logits(model, ids[:, :64], cache)  # pages of the window are empty
    with pytest.raises(ValueError, match=r"forward of 80 tokens after 64 .*prefill_chunk_size=16"):
        logits(model, ids[:, 64:144], cache)
    cache.rolling.check_invariants()
    other = small_cache(model, max_append=16)
    logits(model, ids[:, :64], other)
    assert_bitwise(*(logits(model, ids[:, 64:80], each) for each in (cache, other)))


def test_padding_is_refused() -> None:
    model, ids = tml(make_model("qwen3_sliding")), random_ids(2, 6)
    mask = torch.ones_like(ids)
    cache = small_cache(model)
    logits(model, ids, cache, attention_mask=mask)
    with pytest.raises(ValueError, match=r"attention_mask: expected \[batch, 12\].*\(2, 6\)"):
        logits(model, ids, cache, attention_mask=mask)
    mask[1, 0] = 0
    for given in (cache, None):
        if given is not None:
            given.reset()
        with pytest.raises(ValueError, match="attention_mask: row 1 is padded"):
            logits(model, ids, given, attention_mask=mask)
    with pytest.raises(NotImplementedError, match="attention_mask: only None"):
        logits(model, ids, attention_mask=torch.zeros(2, 1, 6, 6))
    with pytest.raises(NotImplementedError, match="packed sequences"):
        logits(model, ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]] * 2))


def test_static_cache_is_refused() -> None:
    model = tml(make_model("llama"))
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    for ids in (random_ids(1, 4), random_ids(1, 1)):
        with pytest.raises(NotImplementedError, match=r"a cache that is not filled|static cache"):
            logits(model, ids, cache)


def test_other_attention_is_refused() -> None:
    model = tml(make_model("llama"))
    cache = small_cache(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(
        RuntimeError, match=r"attends by 'sdpa'.*set_attn_implementation\(\"tml\"\)"
    ):
        logits(model, random_ids(1, 4), cache)
    tml(model)
    states = torch.zeros(1, 2, 4, 16)
    cache.update(states, states, 0)
    with pytest.raises(RuntimeError, match="layer 1 gives keys before layer 0 has read"):
        cache.update(states, states, 1)
    logits(model, random_ids(1, 4), cache)
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize("again", ["forward", "crop"])
def test_a_last_layer_that_attends_elsewhere_is_said(again: str) -> None:
    """Once, whatever is asked first of the cache; then it is as it was before that forward."""
    model, ids = tml(make_model("llama")), random_ids(2, 24)
    cache, last = small_cache(model), model.model.layers[-1].self_attn
    logits(model, ids[:, :4], cache)
    config = last.config
    last.config = copy.deepcopy(config)
    last.config._attn_implementation = "sdpa"
    logits(model, random_ids(2, 3), cache)
    last.config = config
    with pytest.raises(RuntimeError, match=r"before layer 2 has read its own here: attn_impl"):
        if again == "crop":
            cache.crop(-1)
        else:
            logits(model, ids[:, 4:], cache)
    assert cache.get_seq_length() == 4
    ours = in_pieces(model, ids[:, 4:], cache, [7])
    assert_matches(ours, eager_logits(model, ids)[:, 4:], limit=2e-6)


JET_MOE = {**MOE, "num_local_experts": 4, "kv_channels": 16}


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_model_that_copies_its_keys_is_refused(num_layers: int) -> None:
    model = tml(make_other("JetMoeForCausalLM", JET_MOE | {"num_hidden_layers": num_layers}))
    layers = list(range(num_layers))
    match = rf"JetMoeForCausalLM .*layers {re.escape(str(layers))} give attention other keys"
    with pytest.raises(NotImplementedError, match=match):
        small_cache(model)


def test_one_layer_that_copies_its_keys_is_refused_once_it_attends_here() -> None:
    """The cache was made while the model attended elsewhere."""
    model, ids = (
        make_other("JetMoeForCausalLM", JET_MOE | {"num_hidden_layers": 1}),
        random_ids(1, 8),
    )
    model.set_attn_implementation("sdpa")
    cache = small_cache(model)
    tml(model)
    logits(model, ids[:, :4], cache)  # attends to its own tokens, all that there are
    with pytest.raises(RuntimeError, match="layer 0 gives keys before layer 0 has read its own"):
        logits(model, ids[:, 4:], cache)


@pytest.mark.parametrize(
    ("mode", "num_loops"), [("last_loop", 1), ("last_loop", 2), ("per_loop", 1), ("per_loop", 2)]
)
@pytest.mark.parametrize("attention", ["sdpa", "tml"])
@pytest.mark.skipif(not hasattr(transformers, "DoryConfig"), reason="transformers has no Dory yet")
def test_a_model_of_loops_is_refused(mode: str, num_loops: int, attention: str) -> None:
    config = transformers.DoryConfig(
        **LIKE_LLAMA, n_input_layers=1, n_output_layers=1, n_recurrent_loops=num_loops,
        recurrent_kv_cache_mode=mode,
    )  # fmt: skip
    model = randomise(transformers.DoryForCausalLM(config).eval())
    model.set_attn_implementation(attention)
    with pytest.raises(NotImplementedError, match="the model reads the cache's layers itself"):
        small_cache(model)


def test_a_model_that_reads_the_cache_s_layers_is_refused() -> None:
    model = tml(make_model("llama"))
    cache = small_cache(model)

    def read(*_: Any) -> None:
        for kept in cache.layers:
            assert kept.keys is None

    hook = model.model.register_forward_pre_hook(read)
    with pytest.raises(NotImplementedError, match="the model reads the cache's layers itself"):
        logits(model, random_ids(1, 4), cache)
    hook.remove()
    with pytest.raises(NotImplementedError, match="the model reads the cache's layers itself"):
        cache.layers = [transformers.cache_utils.DynamicLayer()]
    logits(model, random_ids(1, 4), cache)


def test_what_transformers_asks_of_a_cache() -> None:
    model = tml(make_model("llama"))
    cache = small_cache(model)
    assert not cache.is_initialized and cache.batch_size == -1
    logits(model, random_ids(2, 4), cache)
    assert cache.is_initialized and cache.batch_size == 2
    assert cache.is_croppable and not cache.is_compileable
    cache.activate_past_recording()
    cache.reset()
    assert not cache.is_initialized and cache.batch_size == -1


def test_other_dtypes_and_shapes_are_refused() -> None:
    model = tml(make_model("llama"))
    cache = small_cache(model)
    with pytest.raises(TypeError, match=r"key_states: expected torch\.float32.*torch\.bfloat16"):
        logits(model.bfloat16(), random_ids(1, 4), cache)
    with pytest.raises(ValueError, match=r"expected shape \(1, 2, 4, 16\), got \(1, 4, 4, 16\)"):
        cache.update(torch.zeros(1, 4, 4, 16), torch.zeros(1, 4, 4, 16), 0)


def test_moving_rows_is_refused() -> None:
    model, ids = tml(make_model("llama")), random_ids(1, 4)
    cache = small_cache(model)
    with pytest.raises(NotImplementedError, match="no beam search"):
        generate(model, ids, cache, max_new_tokens=4, num_beams=2)
    cache.reset()
    with pytest.raises(NotImplementedError, match="TmlCache: its rows are not repeated"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(NotImplementedError, match="TmlCache: its rows stay"):
        cache.batch_select_indices(torch.tensor([0]))
    with pytest.raises(NotImplementedError, match="TmlCache: is not copied"):
        copy.deepcopy(cache)


def test_training_is_refused() -> None:
    model = tml(make_model("llama"))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="have no backward"):
        logits(model, random_ids(1, 4), small_cache(model))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="have no backward"):
        logits(model, random_ids(1, 4))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"max_batch": 0}, "max_batch: expected at least 1, got 0"),
        ({"window_tokens": 0}, "window_tokens: expected at least 1, got 0"),
        ({"num_sinks": -1}, "num_sinks: expected at least 0, got -1"),
        ({"max_append": 0}, "max_append: expected at least 1, got 0"),
    ],
)
def test_bad_figures_are_refused(given: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        small_cache(make_model("llama"), **given)


def test_sinks_in_windows_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="num_sinks=4: all layers have sliding windows"):
        small_cache(make_model("mistral"), num_sinks=4)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("family", "given", "match"),
    [
        ("Llama", {"rope_parameters": DYNAMIC}, "rope_type='dynamic' changes"),
        # Pairs of neighbouring columns, and half of them.
        ("Glm", {"partial_rotary_factor": 0.5, "pad_token_id": 0}, "not rotated as rotary halves"),
        ("Cohere", {}, "not rotated as rotary halves"),
        # Two layers of three.
        ("SmolLM3", {"no_rope_layers": [1, 1, 0], "pad_token_id": 0}, "not rotated as rotary"),
    ],
)
def test_sinks_that_cannot_be_moved_are_refused(
    family: str, given: dict[str, Any], match: str
) -> None:
    config = getattr(transformers, f"{family}Config")(**{**LIKE_LLAMA, **given})
    model = tml(randomise(getattr(transformers, f"{family}ForCausalLM")(config).eval()))
    with pytest.raises(NotImplementedError, match=match):
        small_cache(model, num_sinks=4)
    ids = random_ids(1, 20)
    ours = in_pieces(model, ids, small_cache(model), [7])
    assert_matches(ours, eager_logits(model, ids), limit=2e-6)


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32768,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kinds", [(PLAIN, LLAMA3), (LLAMA3, PLAIN)], ids=["plain", "llama3"])
def test_each_layer_s_own_frequencies_are_found(
    kinds: tuple[dict[str, Any], dict[str, Any]], dtype: torch.dtype
) -> None:
    """Of two that turn a key to within 1 % of each other where the model is asked."""
    types = ["full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(
        **{**LIKE_LLAMA, "num_hidden_layers": 2, "sliding_window": 8, "layer_types": types},
        rope_parameters=dict(zip(types, kinds, strict=True)),
    )
    model = randomise(transformers.Gemma3ForCausalLM(config).eval()).to(dtype)
    for layer, name in enumerate(types):
        turns_B = getattr(model.model.rotary_emb, f"{name}_inv_freq").double() / (2.0 * torch.pi)
        phase_B = rope_phase(model, [layer]).double() / 2.0**64
        assert_matches(phase_B % 1.0, turns_B, limit=1e-9)


def test_values_of_another_width_are_refused() -> None:
    small = SMALL["deepseek_v3"]
    model = tml(replace(small, given={**small.given, "v_head_dim": 8}).make())
    with pytest.raises(NotImplementedError, match="keys of 16 columns and values of 8"):
        logits(model, random_ids(1, 4))
    with pytest.raises(NotImplementedError, match="keys of 16 columns and values of 8"):
        small_cache(model)


def test_layers_that_are_not_served_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"DeepseekV3.* heads and columns"):
        small_cache(SMALL["deepseek_v3"].make())
    config = transformers.Qwen3NextConfig(
        **{**SIZES, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 16,
           "layer_types": ["linear_attention", "full_attention"]}
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="layer 0 is 'linear_attention'"):
        small_cache(transformers.Qwen3NextForCausalLM(config))
    model = tml(SMALL["gpt_oss"].make())
    with pytest.raises(NotImplementedError, match="s_aux: only None is served"):
        small_cache(model)


@pytest.mark.parametrize("name", ["layerless", "layers"])
def test_missing_transformers_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = find_spec(f"tml_kernels.integrations.transformers.{name}")
    assert spec is not None and spec.loader is not None
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"TmlCache needs transformers' .*: pip install"):
        spec.loader.exec_module(module_from_spec(spec))
