"""Adapters to other libraries' surfaces. None imports its library before it is asked to.

transformers.register()                 experts_implementation="tml", attn_implementation="tml"
transformers.cache.TmlCache             past_key_values=TmlCache(model, ...)
vllm.fused_experts                      vLLM's arguments
flashinfer.cutlass_fused_moe            FlashInfer's arguments
"""
