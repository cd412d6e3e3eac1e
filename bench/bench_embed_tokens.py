"""embed_tokens: the input of a tick or a step in one launch; torch needs one or more per source."""

# Dimension key: T tokens, D model width, V rows of the text table, B bands, Y = B * levels rows of
# the dMel table, A frames heard, P embedded tokens, N rows of steps, F frames of a step.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tml_kernels.ops.embed_tokens import TokenKind, cases, embed_tokens
from tml_kernels.ops.embed_tokens.reference import embed_tokens_ref
from tml_kernels.testing import assert_matches

from .harness import OpBench, Variant


def check(case: cases.Case, device: str) -> None:
    inputs = case.make_inputs(device)
    assert_matches(embed_tokens(**inputs), embed_tokens_ref(**inputs), dtype=case.dtype)


def by_source(inputs: dict[str, Any]) -> dict[str, Any]:
    """Rows of each source, and where they go in the output, worked out before."""
    kind_T, index_T = inputs["kind_T"], inputs["index_T"].long()
    places = {kind: (kind_T == kind).nonzero()[:, 0] for kind in TokenKind}
    dtype = inputs["embed_V_D"].dtype
    return {
        "tables": {name: inputs[name].to(dtype) for name in inputs if name.endswith("_D")},
        "ids": index_T[places[TokenKind.TEXT]],
        "heard": inputs["levels_A_B"][index_T[places[TokenKind.LEVELS]]],
        "embedded": index_T[places[TokenKind.EMBEDDED]],
        "said": inputs["token_N"][index_T[places[TokenKind.STEP]]],
        "speech": inputs["levels_N_F_B"][index_T[places[TokenKind.STEP]]],
        "order": torch.cat([places[kind] for kind in SOURCES]).argsort(),
        "padding": len(places[TokenKind.NOTHING]),
        "num_levels": inputs["num_levels"],
    }


SOURCES = (
    TokenKind.TEXT,
    TokenKind.LEVELS,
    TokenKind.EMBEDDED,
    TokenKind.STEP,
    TokenKind.NOTHING,
)


def torch_embed_tokens(
    tables: dict[str, Tensor],
    ids: Tensor,
    heard: Tensor,
    embedded: Tensor,
    said: Tensor,
    speech: Tensor,
    order: Tensor,
    padding: int,
    num_levels: int,
) -> Tensor:
    """As models write it: a gather, a bag and a norm per source, then a gather of their rows."""
    table_Y_D, x_P_D = tables["table_Y_D"], tables["x_P_D"]
    width = x_P_D.shape[1]
    offset_B = num_levels * torch.arange(heard.shape[1], device=heard.device)

    def text(ids_T: Tensor) -> Tensor:
        return F.rms_norm(tables["embed_V_D"][ids_T], (width,), tables["embed_norm_D"], 1e-6)

    def sound(levels_T_B: Tensor) -> Tensor:
        if len(levels_T_B) == 0:
            return x_P_D[:0]
        sum_T_D = F.embedding_bag(levels_T_B.long() + offset_B, table_Y_D, mode="sum")
        return F.rms_norm(sum_T_D, (width,), tables["table_norm_D"], 1e-6)

    step_S_D = text(said)
    for f in range(speech.shape[1]):
        step_S_D = step_S_D + sound(speech[:, f])
    sources = (text(ids), sound(heard), x_P_D[embedded], step_S_D, x_P_D.new_zeros(padding, width))
    return torch.cat(sources)[order]


OP = OpBench(
    name="embed_tokens",
    edge=cases.EDGE,
    model=cases.MODEL,
    bench=cases.BENCH,
    check=check,
    variants={"ours": Variant(embed_tokens), "torch": Variant(torch_embed_tokens, by_source)},
)
