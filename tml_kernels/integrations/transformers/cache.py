"""RollingKVCache as a transformers Cache: a model's memory of a text, of a fixed size."""

# Dimension key: B batch rows, T tokens of one row in a forward, H query heads, G KV heads, C head
# width.

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ...kv_cache import BudgetExceeded, PageClass, RollingKVCache, Session
from .attention import PAGES
from .forward import Forward, attend, begin, roll_back
from .layerless import LayerlessCache
from .layers import layer_shapes, rope_phase, text_config
from .layout import plan_layout
from .names import NAME
from .sinks import Sinks


class TmlCache(LayerlessCache):
    """Keys and values of up to `max_batch` texts in pages, all of them allocated here.

    For `model(..., past_key_values=cache)` and `model.generate(..., past_key_values=cache)`, after
    `register()` and `model.set_attn_implementation("tml")`. It holds one batch of texts of one
    length, until `reset`.

    Layers of full attention see at least the newest `window_tokens` tokens from before a forward,
    at most `history` and a page more, sliding-window layers their window, and both the forward's
    own tokens, also after a `crop` of up to `history` tokens. What
    is older is dropped after a forward, whole pages at a time. The first `num_sinks` tokens stay,
    and their keys are turned as if what was dropped had never been: attention sinks, as in
    StreamingLLM. Other keys stay at their positions in the text, which go on counting; whoever
    gives position_ids gives `get_seq_length()` and up. transformers rotates by float32 angles, off
    by up to 2^-24 of the position: 0.06 rad after 10^6 tokens.

    A forward may always have `max_append` tokens, and more while pages are empty; longer prompts go
    in pieces (`generate(..., prefill_chunk_size=max_append)`). history: how far `crop` can go back
    at least, and windows be whole. page_dtype: float32, bfloat16, float16, or float8_e4m3fn with
    one scale per token and head; that of the model's keys unless given.

    To see what the layers keep, the model runs one token here, and with sinks one token twice more.
    Raises NotImplementedError for layers other than full or sliding-window attention, a model that
    reads the cache's layers or (where it attends by "tml" already) gives attention other keys than
    the cache returned, and with sinks for keys that are not rotated as rotary halves; ValueError
    for figures that do not fit.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_batch: int,
        window_tokens: int,
        num_sinks: int = 0,
        max_append: int = 512,
        history: int = 64,
        page_rows: int = 64,
        page_dtype: torch.dtype | None = None,
    ) -> None:
        self._shapes = layer_shapes(model)
        super().__init__([shape.window for shape in self._shapes])
        self.max_batch, self.max_append, self.num_sinks = max_batch, max_append, num_sinks
        self._config = text_config(model)
        groups, layers, self._budgets = plan_layout(
            self._shapes,
            max_batch=max_batch,
            window_tokens=window_tokens,
            num_sinks=num_sinks,
            max_append=max_append,
            history=history,
            page_rows=page_rows,
        )
        self._place = {layer: (g, i) for g, of in enumerate(layers) for i, layer in enumerate(of)}
        self._full = [g for g, spec in enumerate(groups) if spec.window is None]
        dtype, device = self._shapes[0].dtype, self._shapes[0].device
        phases = {g: rope_phase(model, layers[g]) for g in (self._full if num_sinks else [])}
        self.rolling = RollingKVCache(
            groups, max_sessions=max_batch, page_dtype=page_dtype or dtype, device=device
        )
        self._sinks = {
            g: Sinks(self.rolling.groups[g], max_batch, num_sinks, dtype, phase_B)
            for g, phase_B in phases.items()
        }
        self._sessions: list[Session] = []
        self._forward: Forward | None = None
        self._length = self._dropped = 0

    # What transformers asks

    @property
    def num_dropped(self) -> int:
        """Tokens of each row that layers of full attention no longer see."""
        return self._dropped

    def __repr__(self) -> str:
        return f"TmlCache(tokens={self._length}, dropped={self._dropped})"

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise NotImplementedError("TmlCache: is not copied; crop() goes back, reset() begins anew")

    @property
    def batch_size(self) -> int:
        return len(self._sessions) or -1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def activate_past_recording(self) -> None:
        """Nothing to do: `history` tokens can be cropped at any time."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are, the keys with what attention needs to find the rest.

        The first layer begins a forward of all, and rolls back one that has not come to its end.
        Raises ValueError, TypeError or RuntimeError for what does not fit the cache, RuntimeError
        also where a layer's keys went elsewhere than to attention here; of the last layer that is
        said in the next forward, which can then be tried again.
        """
        self._check(key_states, value_states, layer_idx)
        if layer_idx == 0:
            self._begin(key_states.shape[0], key_states.shape[2])
        forward = self._forward
        if forward is None or not forward.updated == forward.attended == layer_idx - 1:
            raise _unread(f"layer {layer_idx} gives keys", layer_idx - 1)
        forward.updated = layer_idx
        setattr(key_states, PAGES, _LayerPages(self, layer_idx))
        return key_states, value_states

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, -tokens_to_remove of them; 0 changes nothing.

        Raises ValueError for more than full attention still sees, WindowPassed where a sliding
        window has lost keys that it would need.
        """
        self._settle("crop() is called")
        target = self._length + tokens_to_remove
        if tokens_to_remove > 0 or target < 0:
            raise ValueError(
                f"crop: expected {-self._length}..0, minus the tokens to remove, "
                f"got {tokens_to_remove}"
            )
        oldest = self.num_sinks + self._dropped
        if self._dropped and target < oldest:
            raise ValueError(
                f"crop: {tokens_to_remove} would leave {target} tokens, but those before {oldest} "
                f"have been dropped: {oldest - self._length} is the most"
            )
        for session in self._sessions:
            self.rolling.rewind(session, target)
        self._length = target

    def reset(self) -> None:
        """As if nothing had been seen; the next batch may have another size."""
        for session in self._sessions:
            self.rolling.close(session)
        self._sessions, self._forward = [], None
        self._length = self._dropped = 0

    def reorder_cache(self, beam_idx: Tensor) -> NoReturn:
        raise NotImplementedError("TmlCache: its rows keep their order: no beam search")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        raise NotImplementedError("TmlCache: its rows are not repeated: begin with all of them")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        raise NotImplementedError("TmlCache: its rows stay until reset()")

    # A forward

    def _check(self, key: Tensor, value: Tensor, layer: int) -> None:
        shape, (batch, _, tokens, _) = self._shapes[layer], key.shape
        expected = (batch, shape.heads[0], tokens, shape.heads[1])
        for name, states in (("key_states", key), ("value_states", value)):
            if states.dtype != shape.dtype:
                raise TypeError(
                    f"{name}: expected {shape.dtype}, as the model's were when the cache was made, "
                    f"got {states.dtype}"
                )
            if tuple(states.shape) != expected:
                raise ValueError(f"{name}: expected shape {expected}, got {tuple(states.shape)}")
        if self._length and batch != len(self._sessions):
            raise ValueError(
                f"key_states: the cache holds a batch of {len(self._sessions)}, got one of {batch};"
                " reset() it first, or make another cache"
            )
        if batch > self.max_batch:
            raise ValueError(f"key_states: a batch of {batch} is over max_batch={self.max_batch}")

    def _begin(self, batch: int, tokens: int) -> None:
        used = self._config._attn_implementation
        if used != NAME:
            raise RuntimeError(
                f"TmlCache: the model attends by {used!r}, which reads no pages: register() and "
                f'model.set_attn_implementation("{NAME}") first'
            )
        self._settle("layer 0 gives keys")
        if batch != len(self._sessions):
            self.reset()
            self._sessions = [self.rolling.open(self._budgets) for _ in range(batch)]
        anchors = max(0, min(tokens, self.num_sinks - self._length))
        runs = [(PageClass.ANCHOR, anchors), (PageClass.TEXT, tokens - anchors)]
        try:
            self._forward = begin(self.rolling, self._sessions, runs, self._length)
        except BudgetExceeded as error:
            self._roll_back()
            raise ValueError(
                f"TmlCache: a forward of {tokens} tokens after {self._length} needs {error.needed} "
                f"pages per text, of {error.limit}: give at most max_append={self.max_append} at "
                f"once, as generate(..., prefill_chunk_size={self.max_append}) does, or make the "
                "cache with a larger max_append"
            ) from error
        for g, sinks in self._sinks.items():
            sinks.place(self._forward.row_K_N[g].reshape(batch, tokens), self._length)

    def _attend(
        self,
        layer: int,
        qkv: tuple[Tensor, Tensor, Tensor],
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        forward, (g, i) = self._forward, self._place[layer]
        if forward is None or (forward.updated, forward.attended) != (layer, layer - 1):
            raise RuntimeError(f"TmlCache: layer {layer} attends out of turn")
        group = self.rolling.groups[g]
        if window is not None and window != group.spec.window:
            raise ValueError(
                f"sliding_window: layer {layer} attends with {window}, but by the model's "
                f"configuration with {group.spec.window}"
            )
        if g in self._sinks:
            self._sinks[g].keep(i, qkv[1], self._length)
        out_B_T_H_C = attend(forward, g, group, i, qkv, scale, softcap)
        forward.attended = layer
        if layer + 1 == len(self):
            self._commit(forward)
        return out_B_T_H_C

    def _commit(self, forward: Forward) -> None:
        for session in self._sessions:
            self.rolling.commit(session)
        self.rolling.tick()
        self._forward = None
        self._length += forward.tokens
        dropped = self._first_text() - self.num_sinks
        if dropped > self._dropped:
            self._dropped = dropped
            for sinks in self._sinks.values():
                sinks.move(dropped)

    def _first_text(self) -> int:
        """Position of the oldest token after the sinks that layers of full attention keep."""
        # Neither rows nor groups differ in this.
        pages = [p for g in self._full[:1] for p in self.rolling.pages(self._sessions[0], g)]
        text = [page.base for page in pages if page.page_class == PageClass.TEXT]
        return min(text, default=self.num_sinks)

    def _settle(self, what: str) -> None:
        """Roll back a forward that has not come to its end. Raises RuntimeError where nothing but
        the last layer's attention is missing, unless that was begun and failed. An interruption
        right before it looks the same, and is said as well."""
        forward, last = self._forward, len(self) - 1
        self._roll_back()
        if forward is not None and forward.updated == last != forward.arrived:
            raise _unread(what, last)

    def _roll_back(self) -> None:
        roll_back(self.rolling, self._sessions)
        self._forward = None


def _unread(what: str, layer: int) -> RuntimeError:
    return RuntimeError(
        f"TmlCache: {what} before layer {layer} has read its own here: "
        f'attn_implementation="{NAME}" was not what attended'
    )


class _LayerPages(NamedTuple):
    """Goes with the keys of a layer to the attention function, which is given no cache."""

    cache: TmlCache
    layer: int

    def arrive(self) -> None:
        """The keys have come to the attention function, whatever becomes of it."""
        if self.cache._forward is not None:
            self.cache._forward.arrived = self.layer

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        return self.cache._attend(self.layer, (query, key, value), scale, window, softcap)
