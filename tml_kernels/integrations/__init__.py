"""Adapters to other libraries' surfaces. None imports its library before it is asked to.

tml_kernels.integrations.transformers.register()    experts_implementation="tml"
tml_kernels.integrations.vllm.fused_experts         vLLM's arguments
tml_kernels.integrations.flashinfer.cutlass_fused_moe   FlashInfer's arguments
"""
