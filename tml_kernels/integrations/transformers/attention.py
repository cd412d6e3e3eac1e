"""transformers' attention on `paged_attention`: attn_implementation="tml"."""

# Dimension key: B batch rows, T queries of one row, L keys of one row, H query heads, G KV heads,
# C head width, P pages, R rows in a page.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._page_plan import PagePlan
from ...ops.paged_attention import paged_attention
from .._arguments import refuse

PAGES = "_tml_pages"  # attribute of keys: the layer of a TmlCache that takes them
_PAGE_ROWS = 64
# What some models give their attention function and this one would have to obey.
_NOT_SERVED = (
    "s_aux", "sinks", "position_bias", "indices", "block_indices",
    "cu_seq_lens_q", "cu_seq_lens_k", "block_table",
)  # fmt: skip


@torch.compiler.disable  # keys carry an attribute, which a trace would lose
def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention: ([B, T, H, C], no weights).

    query: [B, H, T, C]; key, value: [B, G, L, C], the queries being the last T of L tokens. Keys
    that `TmlCache.update` returned are the T new ones; they go into its pages, and all of its keys
    are read there. Other keys are laid out as pages for the one call, a copy of all of them: fit
    for a prefill, not for long texts token by token, which is what TmlCache is for.

    Accuracy, determinism and dtypes are those of `paged_attention`. Raises NotImplementedError for
    masks, dropout and what else is not served, RuntimeError in training. torch.compile breaks its
    graph here.
    """
    pages = getattr(key, PAGES, None)
    if pages is not None:
        pages.arrive()
    if attention_mask is not None and attention_mask.device.type == "meta":
        window = _masked_window(attention_mask)
        refuse(sliding_window=(sliding_window, sliding_window and window))
        attention_mask, sliding_window = None, window
    refuse(attention_mask=(attention_mask, None), dropout=(dropout, 0.0))
    refuse(**{name: (kwargs.get(name), None) for name in _NOT_SERVED})
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    refuse(is_causal=(is_causal, True))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if pages is None:
        return attend_alone(query, key, value, scale, sliding_window, softcap), None
    return pages.attend(query, key, value, scale, sliding_window, softcap), None


def causal_mask(
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    mask_function: Callable[..., Tensor] | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of `attention_forward`: none is made, for it knows what is causal. Where a sliding
    window hides keys, [1, 1, 1, window] on device "meta": not every model tells its layers. A
    window below 1 is 0: models without windows make such a mask for layers that they do not have.

    Waits for the device where there is an attention_mask. Raises ValueError for one with padding,
    NotImplementedError for what is more than causal and for caches of a fixed size.
    """
    if not allow_is_causal_skip:
        raise NotImplementedError(
            'attn_implementation="tml" serves causal attention, with or without a sliding window, '
            "and got a mask with more to it (packed sequences, blocks or one of the caller's own) "
            'or a static cache: use attn_implementation="sdpa"'
        )
    end = kv_offset + kv_length
    if q_offset + q_length != end:
        raise NotImplementedError(
            f'attn_implementation="tml": {end} keys for {int(q_offset + q_length)} tokens, as in '
            "a cache that is not filled: use TmlCache or DynamicCache"
        )
    _check_unpadded(attention_mask, end)
    if local_size is None or end <= local_size:
        return None
    window = max(0, local_size)
    if window > 0 and mask_function is not None and not _slides(mask_function, window):
        raise NotImplementedError(
            f'attn_implementation="tml": {end} keys in chunks of {local_size}, which it does not '
            'serve: use attn_implementation="sdpa"'
        )
    return torch.empty(1, 1, 1, window, device="meta")


def _masked_window(mask: Tensor) -> int:
    """Of a mask that `causal_mask` made for a layer."""
    if mask.shape[-1] == 0:
        raise NotImplementedError(
            'attn_implementation="tml": a layer has a sliding window of 0 keys, and would see '
            "nothing: give the model's configuration another sliding_window, or other layer_types"
        )
    return mask.shape[-1]


def _slides(mask_function: Callable[..., Tensor], size: int) -> bool:
    """Whether token `size` sees token 1, as in a sliding window; it would begin a chunk."""
    zero, query, key = (torch.tensor(n) for n in (0, size, 1))
    return bool(mask_function(zero, zero, query, key))


def _check_unpadded(attention_mask: Tensor | None, end: int) -> None:
    if attention_mask is None:
        return
    if attention_mask.ndim != 2 or attention_mask.shape[1] < end:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask: expected [batch, {end}], as there are keys, got {shape}")
    if not attention_mask.all():
        raise ValueError(
            f"attention_mask: row {int((~attention_mask.bool()).any(1).nonzero()[0, 0])} is "
            'padded, which attn_implementation="tml" does not serve: put texts of one length into '
            "a batch; if none is padded, give generate() an attention_mask of ones, or it takes "
            "pad tokens in a text for padding"
        )


def attend_alone(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """out [B, T, H, C]; keys and values as pages of their own, in the order of the batch."""
    (batch, num_heads, num_queries, width), length = query.shape, key.shape[2]
    if value.shape[-1] != width:
        raise NotImplementedError(
            f'attn_implementation="tml": keys of {width} columns and values of '
            f'{value.shape[-1]}, which it does not serve: use attn_implementation="sdpa"'
        )
    k_pages_P_G_R_C, v_pages_P_G_R_C = as_pages(key), as_pages(value)
    device, columns = query.device, -(-length // _PAGE_ROWS)
    base_M = _PAGE_ROWS * torch.arange(columns, device=device)
    plan = PagePlan(
        page_S_M=torch.arange(batch * columns, dtype=torch.int32, device=device).view(batch, -1),
        base_S_M=base_M.expand(batch, -1).contiguous(),
        rows_S_M=(length - base_M).clamp(max=_PAGE_ROWS).int().expand(batch, -1).contiguous(),
        count_S=torch.full((batch,), columns, dtype=torch.int32, device=device),
    )
    start_S1 = torch.arange(batch + 1, dtype=torch.int32, device=device) * num_queries
    out_T_H_C = paged_attention(
        query.transpose(1, 2).reshape(-1, num_heads, width).contiguous(),
        k_pages_P_G_R_C,
        v_pages_P_G_R_C,
        plan,
        start_S1,
        torch.full((batch,), length, device=device),
        scale=scale,
        window=window,
        softcap=softcap,
    )
    return out_T_H_C.view(batch, num_queries, num_heads, width)


def as_pages(x_B_G_L_C: Tensor) -> Tensor:
    """A copy [P, G, R, C], the pages of a batch row one after the other, zeros behind its end."""
    batch, num_heads, length, width = x_B_G_L_C.shape
    padded = F.pad(x_B_G_L_C, (0, 0, 0, -length % _PAGE_ROWS))
    split = padded.view(batch, num_heads, -1, _PAGE_ROWS, width)
    return split.transpose(1, 2).flatten(0, 1).contiguous()
