"""Small random models of transformers whose experts take every form there is, and the maths of one
experts block written out in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from tml_kernels.testing import randn

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# DeepSeek's and GLM's first layer is dense here, as in the real ones.
_DEEPSEEK_ROUTER = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1, "n_group": 4,
    "topk_group": 2, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1,
    "moe_intermediate_size": 40, "intermediate_size": 48,
}  # fmt: skip


@dataclass(frozen=True)
class Small:
    """A model class, its configuration class and what the configuration is given."""

    model: str
    config: str
    given: dict[str, Any]

    def make(self, device: str = "cpu") -> Any:
        """In float32, evaluation mode and eager, with random weights that all matter."""
        config = getattr(transformers, self.config)(**{**SIZES, **self.given})
        model = getattr(transformers, self.model)(config).eval()
        model.set_experts_implementation("eager")
        return randomise(model).to(device)


SMALL = {
    "mixtral": Small(
        "MixtralForCausalLM", "MixtralConfig",
        {"intermediate_size": 48, "num_local_experts": 6, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": Small(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {"moe_intermediate_size": 24, "num_experts": 10, "num_experts_per_tok": 4,
         "norm_topk_prob": True, "head_dim": 16, "intermediate_size": 48},
    ),
    "glm4_moe": Small("Glm4MoeForCausalLM", "Glm4MoeConfig", _DEEPSEEK_ROUTER),
    "deepseek_v3": Small(
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        {**_DEEPSEEK_ROUTER, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16,
         "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    ),
    "gpt_oss": Small(
        "GptOssForCausalLM", "GptOssConfig",
        {"intermediate_size": 48, "num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 16,
         "sliding_window": 8},
    ),
    "inkling": Small(
        "InklingForCausalLM", "InklingTextConfig",
        {"unpadded_vocab_size": 97, "head_dim": 16, "swa_num_attention_heads": 4,
         "swa_num_key_value_heads": 2, "swa_head_dim": 16, "sliding_window_size": 8, "d_rel": 4,
         "rel_extent": 16, "local_layer_ids": [0], "mlp_layer_types": ["dense", "sparse"],
         "intermediate_size": 48, "moe_intermediate_size": 32, "n_routed_experts": 8,
         "num_experts_per_tok": 3, "n_shared_experts": 2},
    ),
}  # fmt: skip


@torch.no_grad()
def randomise(module: Any) -> Any:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if "norm" in name or name.endswith("global_scale"):
            tensor.copy_(1.0 + 0.1 * torch.randn_like(tensor))
        elif "inv_freq" not in name and tensor.is_floating_point() and tensor.ndim > 0:
            tensor.copy_(randn(*tensor.shape, scale=tensor.shape[-1] ** -0.5))
    return module


def experts_modules(model: Any) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith(".experts")]


@contextmanager
def implementation(module: Any, name: str) -> Iterator[None]:
    """Of an experts module by itself, which reads its configuration in every call."""
    before = module.config._experts_implementation
    module.config._experts_implementation = name
    try:
        yield
    finally:
        module.config._experts_implementation = before


def swiglu_oai(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1.0)


def experts_f64(
    x_T_D: Tensor,
    gate_up: Callable[[int], Sequence[Tensor]],
    down: Callable[[int], Tensor],
    expert_T_K: Tensor,
    weight_T_K: Tensor,
    act: Callable[[Tensor, Tensor], Tensor],
    bias: Callable[[int], Sequence[Tensor]] | None = None,
) -> Tensor:
    """Token by token, in float64; expert -1 is skipped. gate_up: (gate, up) [F, D] of an expert,
    down: [D, F], bias: of gate, up [F] and down [D]."""
    out_T_D = torch.zeros(x_T_D.shape, dtype=torch.float64)
    for t, k in torch.cartesian_prod(*(torch.arange(n) for n in expert_T_K.shape)).tolist():
        expert = int(expert_T_K[t, k])
        if expert < 0:
            continue
        x_D = x_T_D[t].double()
        parts = [matrix.double() @ x_D for matrix in gate_up(expert)]
        biases = None if bias is None else [b.double() for b in bias(expert)]
        if biases is not None:
            parts = [part + b for part, b in zip(parts, biases, strict=False)]
        y_D = down(expert).double() @ act(*parts)
        y_D = y_D if biases is None else y_D + biases[2]
        out_T_D[t] += weight_T_K[t, k].double() * y_D
    return out_T_D
