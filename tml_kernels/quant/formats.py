"""The precisions expert weights are stored in: what a kernel reads for one matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """One storage precision.

    A sub-block is `words * per_word` consecutive columns of one row; value i of word j is column
    i * words + j of the sub-block (a half or a quarter block apart), so that one shift and mask of
    a whole vector of words gives consecutive columns.
    """

    name: str
    bits: int  # of one stored value
    group: int | None  # columns that share one scale; None: fp8's own rules, or no scale
    block_k: int  # columns of one packed block; K is padded to a multiple of it. 1: not packed
    words: int  # int16 words of one row in a sub-block; 0: not packed
    per_word: int  # values in a word; 0: not packed
    scale_bits: int = 0  # of one stored scale
    dtype: torch.dtype = torch.int16  # of `PackedExperts.data`

    @property
    def packed(self) -> bool:
        """Whether values are packed in words; otherwise they are numbers of `dtype`."""
        return self.words > 0

    @property
    def sub_block(self) -> int:
        """Columns of one sub-block."""
        return self.words * self.per_word

    @property
    def bytes_per_weight(self) -> float:
        """Of a large matrix, scales included, zero points and padding not."""
        per_scale = 128 * 128 if self.name == "fp8" else self.group
        return (self.bits + (self.scale_bits / per_scale if per_scale else 0)) / 8


def _plain(name: str, dtype: torch.dtype) -> Format:
    return Format(name, 8 * dtype.itemsize, None, 1, 0, 0, dtype=dtype)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        _plain("fp32", torch.float32),
        _plain("bf16", torch.bfloat16),
        _plain("fp16", torch.float16),
        Format("fp8", 8, None, 128, 64, 2, 32),  # e4m3, float32 scale of 128 x 128 values
        Format("fp8_channel", 8, None, 128, 64, 2),  # e4m3, float32 scale of a row
        Format("int4", 4, 128, 256, 32, 4, 16),  # bfloat16 scale
        Format("int4_f16", 4, 128, 256, 32, 4, 16),  # float16 scale, as AWQ and GPTQ have it
        Format("mxfp4", 4, 32, 128, 32, 4, 8),  # e2m1, e8m0 scale
        Format("nvfp4", 4, 16, 64, 16, 4, 8),  # e2m1, e4m3 scale, one float32 scale per expert
    )
}
