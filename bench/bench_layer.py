"""layer: one decoder layer as the model runs it, from its first norm to the next layer's.

Kinds are those of the preset inkling-small, local and global sparse layers and local dense ones,
with random weights of the true widths, over S sessions with a context of L tokens each. I new
tokens of each are an output step (1) or a tick's input (16). A local layer's context is one window,
however long the session is, so it is timed at a single length.

A call begins with a copy of the residual stream, to which the layer adds in place: a launch that is
timed, but not counted.
"""

# Dimension key: S sessions, I new tokens of each, T = S * I, L tokens of context, D model width,
# G KV heads, C head width, W = G * C, E routed experts.

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tml_kernels.kv_cache import PageClass
from tml_kernels.ops.patch_embed.cases import TINY
from tml_kernels.ops.rms_norm import rms_norm
from tml_kernels.testing import Cost, assert_matches, count_launches, log_ops
from tml_runtime.model.backbone import Backbone
from tml_runtime.model.config import CONV_TAPS, FlowSpec, ModelConfig, Vocabulary
from tml_runtime.model.full import expert_scores, full_attention, full_mlp
from tml_runtime.model.load import random_weights
from tml_runtime.model.parts import KvBudget
from tml_runtime.model.passes import Pass, plan_pass
from tml_runtime.model.state import ModelState
from tml_runtime.model.weights import CONV_WIDTH, DenseWeights, LayerWeights, ModelWeights

from . import layer_peers
from .bench_expert_mlp import LAYERS, SETS
from .harness import OpBench, Variant
from .timing import Call

CHUNK = 256  # tokens of context that a session takes in one pass
CHECKED_CONTEXT = 1100  # past the window and both extents of the preset
CHECKED_TOKENS = 16  # of every session at least, after the context
# Scores that are closer may be ordered otherwise in another precision: other experts, both right.
NEAR_TIE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
# The layer's update alone, without the stream it is added to and whose rounding it carries.
UPDATE_LIMIT = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    config: ModelConfig
    layer: int
    sessions: int  # S
    tokens: int  # I
    context: int  # L
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        reach = "global" if self.layer in self.config.global_layers else "local"
        mlp = "dense" if self.config.is_dense(self.layer) else "sparse"
        return (
            f"{reach}-{mlp}-S{self.sessions}-I{self.tokens}-L{self.context}-D{self.config.width}"
            f"-{str(self.dtype).removeprefix('torch.')}"
        )

    @property
    def alone(self) -> ModelConfig:
        """A model of this layer, with everything around it as small as it goes."""
        return replace(
            self.config,
            num_layers=1,
            global_layers=(0,) if self.layer in self.config.global_layers else (),
            dense_layers=(0,) if self.config.is_dense(self.layer) else (),
            vocab=Vocabulary(4, 4, 0, 1, 2, 3),
            patch=TINY,
            flow=FlowSpec(width=2, depth=1, num_steps=1),
        )

    def make_inputs(self, device: str) -> dict[str, Any]:
        """A context of random keys, values and taps: what it says changes no time."""
        heads, s = self.config.heads(self.layer), self.sessions
        keys = (s, heads.num_kv_heads, self.context, heads.head_width)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=self.dtype)

        return {
            "config": self.alone,
            "weights": balanced(draw_weights(self.alone, self.dtype, device)),
            "x_S_I_D": draw(s, self.tokens, self.config.width),
            "k_S_G_L_C": draw(*keys),
            "v_S_G_L_C": draw(*keys),
            "kv_taps_S_2_3_W": draw(s, 2, CONV_TAPS, heads.kv_width),
            "attn_taps_S_3_D": draw(s, CONV_TAPS, self.config.width),
            "mlp_taps_S_3_D": draw(s, CONV_TAPS, self.config.width),
        }

    def cost(self) -> Cost:
        """Weights once, of the experts as many as tokens are expected to choose; keys and values of
        the context, and new ones; taps in and out; residual and normed stream in and out."""
        size, num_tokens = self.dtype.itemsize, self.sessions * self.tokens
        heads, width = self.config.heads(self.layer), self.config.width
        matrices = width * (
            heads.qkvr_width(self.config.d_rel) + heads.num_heads * heads.head_width
        )
        vectors = 2 * CONV_WIDTH * (heads.kv_width + width) + 2 * heads.head_width + 2 * width
        if not self.config.is_dense(self.layer):
            vectors += self.config.experts.num_experts + 1
        mlp, active = self._mlp_weights(num_tokens)
        weights = size * (matrices + mlp + self.config.d_rel * heads.extent) + 4 * vectors

        reach = self.context if heads.window is None else min(self.context, heads.window - 1)
        keys = self.sessions * (reach + self.tokens)
        taps = 2 * self.sessions * CONV_TAPS * 2 * (heads.kv_width + width)
        moved = 2 * keys * heads.kv_width + taps + 4 * num_tokens * width
        window = heads.window or self.context + self.tokens
        pairs = sum(min(self.context + i + 1, window) for i in range(self.tokens))
        return Cost(
            bytes=weights + size * moved,
            flops=2 * num_tokens * (matrices + active)
            + 4 * heads.num_heads * heads.head_width * self.sessions * pairs,
        )

    def _mlp_weights(self, num_tokens: int) -> tuple[int, int]:
        """(that are read, that a token is multiplied by)"""
        config, spec = self.config, self.config.experts
        if config.is_dense(self.layer):
            dense = 3 * config.width * config.dense_width
            return dense, dense
        expert = 3 * config.width * spec.width
        missed = (1 - spec.top_k / spec.num_experts) ** num_tokens  # by all tokens, if even
        touched = round(spec.num_experts * (1 - missed))
        gate = config.width * (spec.num_experts + spec.num_shared)
        return (
            gate + expert * (touched + spec.num_shared),
            gate + expert * (spec.top_k + spec.num_shared),
        )


@functools.lru_cache(maxsize=1)
def draw_weights(config: ModelConfig, dtype: torch.dtype, device: str) -> ModelWeights:
    """Shared by the cases of a kind, which follow one another: 13 GB of a sparse layer."""
    return random_weights(config, seed=0, device=device, dtype=dtype)[0]


def balanced(weights: ModelWeights) -> ModelWeights:
    """With a router that chooses all experts alike, as a trained bias sees to: the random gate does
    so without one."""
    (w,) = weights.layers
    if isinstance(w.mlp, DenseWeights):
        return weights
    mlp = replace(w.mlp, bias_E=torch.zeros_like(w.mlp.bias_E))
    return replace(weights, layers=(replace(w, mlp=mlp),))


def new_state(
    config: ModelConfig, like_S_I_D: Tensor, *, context: int, max_append: int = CHUNK
) -> ModelState:
    """Room for `context` tokens and one longest pass of each session."""
    return ModelState.new(
        config,
        like_S_I_D.shape[0],
        budget=KvBudget(anchor=1, text=context + max_append, audio=1, video=1, reply=1, rewind=1),
        max_append=max_append,
        device=like_S_I_D.device,
        dtype=like_S_I_D.dtype,
        page_dtype=like_S_I_D.dtype,
    )


def begin(state: ModelState, tokens: int) -> Pass:
    """Reserve and plan `tokens` more of every session: what a tick does before its graph."""
    slots = list(range(state.num_slots))
    runs = [[(PageClass.TEXT, tokens)]] * len(slots)
    for slot in slots:
        state.reserve(slot, runs[slot])
    return plan_pass(state, slots, runs)


def fill(state: ModelState, inputs: dict[str, Any]) -> None:
    """Give every session the context of the inputs."""
    (group,) = state.groups
    pages, page_rows = group.pages, group.pages.k_pages_L_P_G_R_C.shape[3]
    length = inputs["k_S_G_L_C"].shape[2]
    for first in range(0, length, CHUNK):
        part = slice(first, min(first + CHUNK, length))
        row_T = begin(state, part.stop - first).row_K_T[0]
        for to, name in (
            (pages.k_pages_L_P_G_R_C, "k_S_G_L_C"),
            (pages.v_pages_L_P_G_R_C, "v_S_G_L_C"),
        ):
            new_T_G_C = inputs[name][:, :, part].transpose(1, 2).flatten(0, 1)
            to[0][row_T // page_rows, :, row_T % page_rows] = new_T_G_C
        state.commit(range(state.num_slots))
    group.conv_L_N_2_3_W[0] = inputs["kv_taps_S_2_3_W"]
    state.attn_conv_L_N_3_D[0] = inputs["attn_taps_S_3_D"]
    state.mlp_conv_L_N_3_D[0] = inputs["mlp_taps_S_3_D"]


def prepare(inputs: dict[str, Any]) -> dict[str, Any]:
    """Everything that allocates, waits for the device or is planned on the host."""
    config, x_S_I_D = inputs["config"], inputs["x_S_I_D"]
    num_new, length = x_S_I_D.shape[1], inputs["k_S_G_L_C"].shape[2]
    state = new_state(config, x_S_I_D, context=length, max_append=max(CHUNK, num_new))
    fill(state, inputs)
    return {
        "backbone": Backbone(config, inputs["weights"]),
        "state": state,
        "step": begin(state, num_new),
        **streams(config, inputs["weights"], x_S_I_D),
    }


def streams(config: ModelConfig, weights: ModelWeights, x_S_I_D: Tensor) -> dict[str, Tensor]:
    """The residual stream as the layer before leaves it, and its normed form."""
    x_T_D = x_S_I_D.flatten(0, 1).contiguous()
    h_T_D = rms_norm(x_T_D, weights.layers[0].attn_norm_D, eps=config.norm_eps)
    return {"x_T_D": x_T_D, "h_T_D": h_T_D, "residual_T_D": torch.empty_like(x_T_D)}


def run(
    backbone: Backbone,
    state: ModelState,
    step: Pass,
    x_T_D: Tensor,
    h_T_D: Tensor,
    residual_T_D: Tensor,
) -> Tensor:
    """The residual stream after the layer. Called again, it writes the same rows of the pages."""
    residual_T_D.copy_(x_T_D)
    backbone.layer(state, 0, step, h_T_D, residual_T_D)
    return residual_T_D


def launches(call: Call) -> int:
    """Of the layer: the copy that begins a call is not its own."""
    return count_launches(log_ops(call)) - 1


def check(case: Case, device: str) -> None:
    """A context and then several passes of the case's, all computed here, against whole sequences
    in plain torch: float64, or float32 where the weights are bfloat16."""
    config, weights = case.alone, draw_weights(case.alone, case.dtype, device)
    context = min(case.context, CHECKED_CONTEXT)
    sizes = [min(CHUNK, context - first) for first in range(0, context, CHUNK)]
    sizes += [case.tokens] * max(2, -(-CHECKED_TOKENS // case.tokens))
    x_S_L_D = torch.randn(case.sessions, sum(sizes), config.width, device=device, dtype=case.dtype)
    state = new_state(config, x_S_L_D, context=sum(sizes), max_append=max(sizes))
    backbone = Backbone(config, weights)
    parts = []
    for x_S_I_D in x_S_L_D.split(sizes, dim=1):
        step = begin(state, x_S_I_D.shape[1])
        y_T_D = run(backbone, state, step, **streams(config, weights, x_S_I_D))
        state.commit(range(case.sessions))
        parts.append(y_T_D.view_as(x_S_I_D))
    y_S_L_D = torch.cat(parts, dim=1)
    compared = 0
    for x_L_D, y_L_D in zip(x_S_L_D, y_S_L_D, strict=True):
        compared += _compare(config, weights.layers[0], x_L_D, y_L_D, num_context=context)
    assert compared > 0, "every new token's choice of experts is a near tie"


def _compare(
    config: ModelConfig, w: LayerWeights, x_L_D: Tensor, y_L_D: Tensor, *, num_context: int
) -> int:
    """Of one sequence; how many of the tokens after the context were compared."""
    wide = torch.float64 if x_L_D.dtype == torch.float32 else torch.float32
    x_wide_L_D = x_L_D.to(wide)
    half_L_D = full_attention(config, 0, w, x_wide_L_D)
    update_L_D = full_mlp(config, w, half_L_D) - x_wide_L_D
    clear_L = torch.ones(len(x_L_D), dtype=torch.bool, device=x_L_D.device)
    if not config.is_dense(0):
        clear_L = _clear(config, w, half_L_D, NEAR_TIE[x_L_D.dtype])
    new_L = clear_L.clone()
    new_L[:num_context] = False
    for mask_L in (clear_L, new_L):  # many old tokens must not hide a wrong new one
        actual = y_L_D[mask_L].to(wide) - x_wide_L_D[mask_L]
        assert_matches(actual, update_L_D[mask_L], limit=UPDATE_LIMIT[x_L_D.dtype])
    return int(new_L.sum())


def _clear(config: ModelConfig, w: LayerWeights, half_L_D: Tensor, near: float) -> Tensor:
    """bool [L]: tokens whose experts, and those of the three before that reach them through the
    convolution, were chosen by more than `near`."""
    top_k, num_experts = config.experts.top_k, config.experts.num_experts
    if top_k == num_experts:
        return torch.ones(len(half_L_D), dtype=torch.bool, device=half_L_D.device)
    best_L_K = expert_scores(config, w, half_L_D).topk(top_k + 1, dim=1).values
    tie_L = best_L_K[:, top_k - 1] - best_L_K[:, top_k] < near
    touched_L = tie_L.clone()
    for back in range(1, CONV_TAPS + 1):
        touched_L[back:] |= tie_L[:-back]
    return ~touched_L


FULL = ModelConfig.preset("inkling-small")
DENSE, LOCAL, GLOBAL = 0, 2, 5  # of FULL: local dense, local sparse, global sparse
BENCH = [
    *(Case(FULL, DENSE, s, i, 4096) for s, i in ((1, 1), (8, 1), (32, 1), (1, 16), (8, 16))),
    *(Case(FULL, LOCAL, s, i, 4096) for s, i in ((1, 1), (8, 1), (32, 1), (1, 16), (8, 16))),
    *(
        Case(FULL, GLOBAL, s, i, length)
        for length in (1024, 4096)
        for s, i in ((1, 1), (8, 1), (32, 1), (1, 16), (8, 16))
    ),
]
TIMED_QUICK = {(DENSE, 1, 1), (LOCAL, 1, 1), (LOCAL, 32, 1), (LOCAL, 8, 16), (GLOBAL, 32, 1)}
QUICK = [
    case
    for case in BENCH
    if (case.layer, case.sessions, case.tokens) in TIMED_QUICK and case.context == 4096
]

TINY_MODEL = ModelConfig.preset("tiny")
# All four kinds, with a window, extents and a scaling that a short context passes.
SHORT = replace(
    TINY_MODEL,
    local_heads=replace(TINY_MODEL.local_heads, extent=40, window=40),
    global_heads=replace(TINY_MODEL.global_heads, extent=50),
    global_layers=(1, 3),
    dense_layers=(0, 1),
    tau_floor=16,
)
F32, BF16 = torch.float32, torch.bfloat16
EDGE = [
    *(Case(SHORT, layer, 1, 1, 0, F32) for layer in SHORT.layers),  # a session's first tokens
    *(Case(SHORT, layer, 2, 3, 70, F32) for layer in SHORT.layers),  # past window and page
]
MODEL = [
    *(Case(TINY_MODEL, layer, 2, 1, 140, F32) for layer in (0, 1, 2)),
    *(Case(TINY_MODEL, layer, 3, 4, 60, BF16) for layer in (0, 1, 2)),  # in the timed dtype
]

OP = OpBench(
    name="layer",
    edge=EDGE,
    model=MODEL,
    bench=BENCH,
    check=check,
    variants={"ours": Variant(run, prepare)},
    peers={
        "transformers Inkling": lambda: layer_peers.transformers_inkling("eager"),
        "transformers Inkling, sdpa": lambda: layer_peers.transformers_inkling("sdpa"),
    },
    quick=QUICK,
    sets=SETS,
    graph_calls=LAYERS,
    launches=launches,
)
