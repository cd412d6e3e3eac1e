"""What rounding loses: of single matrices, and of a model layer by layer. Errors, no times.

Weights are drawn from three statistics with the same mean square. Everything is deterministic for
a seed, and computed on the CPU in float32 from the packed matrices' exact values.
"""

# Dimension key: T tokens, D model width, R rows, K columns, V vocabulary, J gate and up rows.

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tml_kernels.quant import PackedExperts, dequantize, pack_matrix
from tml_kernels.testing import relative_l2
from tml_runtime.model import InteractionModel, ModelConfig
from tml_runtime.model.full import expert_scores, full_attention, full_forward, full_mlp
from tml_runtime.model.packing import Packing, pack_weights
from tml_runtime.model.weights import DenseWeights, ModelWeights, MoeWeights, plain

STATISTICS = ("gaussian", "heavy", "outliers")
FREEDOM = 4  # degrees of freedom of Student's t in "heavy"
OUTLIER_SHARE, OUTLIER_FACTOR = 0.01, 20.0  # of input columns, in "outliers"
SEARCH = "+search"  # behind the name of a precision: with a search over scales


@dataclass(frozen=True)
class Plan:
    """What a model's matrices are rounded to; None: not at all."""

    experts: str | None
    rest: str | None

    def __str__(self) -> str:
        return f"{self.experts or '-'} / {self.rest or '-'}"


def draw(statistic: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """float32 with mean square 1; the last axis has input columns. Raises ValueError for a name
    that is not one of STATISTICS."""
    if statistic not in STATISTICS:
        raise ValueError(f"statistic: {statistic!r} is not one of {', '.join(STATISTICS)}")
    x = torch.randn(shape, generator=generator)
    if statistic == "heavy":
        squares = torch.zeros(shape)
        for _ in range(FREEDOM):
            squares += torch.randn(shape, generator=generator).square()
        return x / (squares / FREEDOM).sqrt() * math.sqrt((FREEDOM - 2) / FREEDOM)
    if statistic == "outliers":
        num_columns = shape[-1]
        num_outliers = max(1, round(OUTLIER_SHARE * num_columns))
        chosen = torch.randperm(num_columns, generator=generator)[:num_outliers]
        x[..., chosen] *= OUTLIER_FACTOR
        share = num_outliers / num_columns
        x /= math.sqrt(1 + share * (OUTLIER_FACTOR**2 - 1))
    return x


def pack(weight_R_K: Tensor, precision: str) -> PackedExperts:
    """precision: of FORMATS, int4 also with SEARCH behind it."""
    search = precision.endswith(SEARCH)
    return pack_matrix(weight_R_K, precision.removesuffix(SEARCH), search=search)


def matrix_errors(
    precision: str, statistic: str, shape: tuple[int, int], *, num_tokens: int, seed: int
) -> dict[str, Any]:
    """Relative L2 error of a matrix [R, K], and of its product with rows that have outlier columns
    of their own."""
    generator = torch.Generator().manual_seed(seed)
    weight_R_K = draw(statistic, shape, generator)
    x_T_K = draw("outliers", (num_tokens, shape[1]), generator)
    stored_R_K = dequantize(pack(weight_R_K, precision), 0)
    return {
        "precision": precision,
        "statistic": statistic,
        "shape": list(shape),
        "weights": relative_l2(stored_R_K, weight_R_K),
        "product": relative_l2(x_T_K @ stored_R_K.T, x_T_K @ weight_R_K.T),
    }


def kl_divergence(logits_T_V: Tensor, reference_T_V: Tensor) -> float:
    """KL(reference | logits) in nats, the mean over tokens. Columns that are -inf in the reference
    count nothing."""
    log_q_T_V = logits_T_V.double().log_softmax(-1)
    log_p_T_V = reference_T_V.double().log_softmax(-1)
    p_T_V = log_p_T_V.exp()
    terms_T_V = torch.where(p_T_V > 0, p_T_V * (log_p_T_V - log_q_T_V), 0.0)
    return terms_T_V.sum(-1).mean().item()


def top1_agreement(logits_T_V: Tensor, reference_T_V: Tensor) -> float:
    """The share of tokens whose likeliest next one is the same."""
    return (logits_T_V.argmax(-1) == reference_T_V.argmax(-1)).double().mean().item()


def matrices(weights: ModelWeights) -> Iterator[Tensor]:
    """Every tensor that a plan may round, to be written in place."""
    for layer, w in enumerate(weights.layers):
        yield plain(f"layer {layer}", w.attention.qkvr_J_D)
        yield plain(f"layer {layer}", w.attention.out_D_I)
        if isinstance(w.mlp, DenseWeights):
            yield plain(f"layer {layer}", w.mlp.w13_J_D)
            yield plain(f"layer {layer}", w.mlp.w2_D_F)
            continue
        shared = w.mlp.experts.shared
        assert shared is not None
        for experts in (w.mlp.experts, shared):
            yield experts.w13.data
            yield experts.w2.data
    yield plain("unembedding", weights.unembed_V_D)


def make_model(config: ModelConfig, statistic: str, seed: int) -> InteractionModel:
    """A random model whose matrices have the statistic, each with the spread it had before."""
    model = InteractionModel.random(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for matrix in matrices(model.weights):
        matrix.copy_(draw(statistic, tuple(matrix.shape), generator) * matrix.std())
    return model


def packed_weights(weights: ModelWeights, plan: Plan) -> ModelWeights:
    """A search is over the scales of every int4 matrix of the plan."""
    experts = plan.experts and plan.experts.removesuffix(SEARCH)
    return pack_weights(weights, Packing(experts, plan.rest, search=experts != plan.experts))


@dataclass(frozen=True)
class Trace:
    """What a model made of a sequence."""

    stream: list[Tensor]  # the residual stream [T, D] after each layer
    chosen: list[Tensor]  # experts of each token, bool [T, E], of each sparse layer
    logits_T_V: Tensor


def run(config: ModelConfig, weights: ModelWeights, x_T_D: Tensor) -> Trace:
    """`InteractionModel.forward`, with what is between the layers."""
    stream, chosen = [], []
    for layer, w in enumerate(weights.layers):
        x_T_D = full_attention(config, layer, w, x_T_D)
        if isinstance(w.mlp, MoeWeights):
            score_T_E = expert_scores(config, w, x_T_D)
            top_T_K = score_T_E.topk(config.experts.top_k).indices
            chosen.append(torch.zeros_like(score_T_E, dtype=torch.bool).scatter_(1, top_T_K, True))
        x_T_D = full_mlp(config, w, x_T_D)
        stream.append(x_T_D)
    return Trace(stream, chosen, full_forward(config, replace(weights, layers=()), x_T_D))


def token_error(found_T_D: Tensor, reference_T_D: Tensor) -> float:
    """The mean over tokens of |found - reference| / |reference|, so that a few long rows of the
    residual stream do not decide. A row of zeros that stays so has error 0."""
    lost_T = (found_T_D.double() - reference_T_D.double()).norm(dim=-1)
    whole_T = reference_T_D.double().norm(dim=-1)
    return torch.where(lost_T == 0, 0.0, lost_T / whole_T).mean().item()


def model_errors(found: Trace, reference: Trace) -> dict[str, Any]:
    same = [
        (a & b).sum().item() / b.sum().item()
        for a, b in zip(found.chosen, reference.chosen, strict=True)
    ]
    return {
        "layers": [token_error(a, b) for a, b in zip(found.stream, reference.stream, strict=True)],
        "same_experts": same,
        "kl": kl_divergence(found.logits_T_V, reference.logits_T_V),
        "top1": top1_agreement(found.logits_T_V, reference.logits_T_V),
    }


@torch.no_grad()
def compare_plans(
    config: ModelConfig, statistic: str, plans: list[Plan], *, num_tokens: int, seed: int
) -> Iterator[dict[str, Any]]:
    """A row for each plan, of one model on one sequence of random tokens."""
    model = make_model(config, statistic, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(0, config.vocab.num_valid, (num_tokens,), generator=generator)
    x_T_D = model.embed_text(ids.tolist())
    reference = run(config, model.weights, x_T_D)
    for plan in plans:
        found = run(config, packed_weights(model.weights, plan), x_T_D)
        about = {"experts": plan.experts, "rest": plan.rest, "statistic": statistic}
        yield {**about, **model_errors(found, reference)}
