"""What kernels keep from call to call."""

# Dimension key: T tokens, D input width, F rows of a weight, H heads, C head width, P pages,
# G KV heads, R rows in a page, B features, S session rows, V vocabulary.

from __future__ import annotations

import torch
from torch import Tensor

from tml_kernels._page_plan import PagePlan
from tml_kernels._routing import Routing
from tml_kernels.moe_weights import MoEWeights
from tml_kernels.ops.linear import configs as linear_configs
from tml_kernels.ops.paged_attention import configs as attention_configs
from tml_kernels.ops.sample import configs as sample_configs
from tml_kernels.quant import PackedExperts


class Scratch:
    """One buffer for each op, which its calls share in stream order: counters, which they leave at
    zero, and room for partial sums. Without it every call allocates and clears its own.

    A buffer grows to the largest call so far; a captured graph uses the one it was captured with,
    so the largest call comes first, and who captures keeps `buffers`. For one stream at a time.
    None on a CPU: ops need none there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cpu = device.type == "cpu"  # asked first: sizes cost a tick on a CPU time
        self._buffers: dict[str, Tensor] = {}
        self._routings: dict[tuple[int, ...], Routing] = {}

    def linear(
        self, x_T_D: Tensor, weight_F_D: Tensor | PackedExperts, parts: int = 1
    ) -> Tensor | None:
        """uint8, for `linear`."""
        if self._is_cpu:
            return None
        problem = linear_configs.problem_of(x_T_D, weight_F_D, parts)
        return self._at_least("linear", linear_configs.scratch_bytes(problem), torch.uint8)

    def attention(
        self,
        q_T_H_C: Tensor,
        k_pages_P_G_R_C: Tensor,
        plan: PagePlan,
        window: int | None,
        rel_T_H_B: Tensor | None,
    ) -> Tensor | None:
        """uint8, for `paged_attention`."""
        if self._is_cpu:
            return None
        problem = attention_configs.problem_of(
            q_T_H_C, k_pages_P_G_R_C, plan.page_S_M, window, rel_T_H_B
        )
        size = attention_configs.scratch_bytes(problem)
        return self._at_least("paged_attention", size, torch.uint8)

    def routing(self, x_T_D: Tensor, experts: MoEWeights, top_k: int) -> Routing | None:
        """For `moe_layer`, with `inv_rms_T`: one for each number of tokens, which says where its
        counters lie."""
        if self._is_cpu:
            return None
        num_tokens, width = x_T_D.shape
        sizes = (num_tokens, top_k, experts.num_shared, experts.num_experts)
        if sizes not in self._routings:
            self._routings[sizes] = Routing.empty(*sizes, self._device, width=width, late_norm=True)
        return self._routings[sizes]

    def sample(self, logits_S_V: Tensor) -> Tensor | None:
        """int32, for `sample`: where its counters lie depends on S, so each S has its own."""
        if self._is_cpu:
            return None
        num_rows, vocabulary = logits_S_V.shape
        size = sample_configs.scratch_words(num_rows, vocabulary)
        return self._at_least(f"sample of {num_rows}", size, torch.int32)

    def buffers(self) -> list[Tensor]:
        return list(self._buffers.values())

    def _at_least(self, name: str, size: int, dtype: torch.dtype) -> Tensor | None:
        if size == 0:
            return None
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = torch.zeros(size, dtype=dtype, device=self._device)
        return buffer
