"""Inputs of patch_embed for tests and benchmarks, and what each must move at least."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ...testing import Cost, randn
from .reference import NUM_CHANNELS, PATCH_40, PatchSpec, PatchWeights


@dataclass(frozen=True)
class Case:
    num_groups: int
    height: int
    width: int
    model_width: int
    spec: PatchSpec
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        folds = "x".join(map(str, self.spec.folds))
        return (
            f"N{self.num_groups}-{self.height}x{self.width}-D{self.model_width}-{folds}"
            f"-{max(self.spec.widths)}{'-extra' * self.spec.extra_column}"
            f"-{str(self.dtype).removeprefix('torch.')}"
        )

    @property
    def num_tokens(self) -> int:
        return self.num_groups * math.prod(self.spec.grid(self.height, self.width))

    def make_inputs(self, device: str) -> dict:
        shape = (self.num_groups, self.spec.frames, self.height, self.width, NUM_CHANNELS)
        return {
            "frames_N_L_H_W_3": torch.randint(0, 256, shape, dtype=torch.uint8).to(device),
            "weights": make_weights(self.spec, self.model_width, device, self.dtype),
            "spec": self.spec,
        }

    def cost(self) -> Cost:
        shapes = self.spec.linear_shapes(self.model_width)
        size, frame = self.dtype.itemsize, self.height * self.width * NUM_CHANNELS
        # Rows of layer i: one per block of the folds up to i, in every frame.
        side, rows, flops = self.spec.patch, [], 0
        for fold in self.spec.folds:
            side //= fold
            rows.append(side * side * self.spec.frames)
        for count, (size_out, size_in) in zip([*rows, 1], shapes, strict=True):
            flops += 2 * self.num_tokens * count * size_out * size_in
        return Cost(
            bytes=sum(math.prod(shape) for shape in shapes) * size
            + self.num_groups * self.spec.frames * frame
            + self.num_tokens * self.model_width * size,
            flops=flops,
        )


def make_weights(
    spec: PatchSpec, width: int, device: str, dtype: torch.dtype = torch.float32
) -> PatchWeights:
    """Linears that keep their input's scale, norms near one in float32."""
    return PatchWeights(
        tuple(
            randn(*shape, device=device, dtype=dtype, scale=shape[1] ** -0.5)
            for shape in spec.linear_shapes(width)
        ),
        tuple(1 + 0.1 * randn(size, device=device) for size in spec.widths),
        1 + 0.1 * randn(width, device=device),
    )


TINY = replace(PATCH_40, widths=(16, 32, 64))

# Sizes the interpreter takes in about a second each.
EDGE = [
    Case(0, 80, 80, 128, TINY),  # no frames
    Case(1, 0, 80, 128, TINY),  # no pixels
    Case(1, 40, 40, 128, TINY),  # one patch
    Case(1, 40, 120, 128, TINY),  # not square, an odd number of tokens
    Case(3, 8, 8, 100, PatchSpec(8, 2, (2, 4), (64, 192))),  # two folds; two tiles under one norm
    Case(1, 8, 16, 192, PatchSpec(8, 2, (2, 2, 2), (16, 32, 192))),  # three slots of four
    Case(1, 36, 18, 33, PatchSpec(18, 3, (3, 2, 3), (24, 40, 72))),  # three frames, odd widths
    Case(2, 24, 24, 96, PatchSpec(24, 1, (2, 3, 2, 2), (16, 40, 72, 80), mean=(0.5, 0.4, 0.3))),
    Case(
        2, 13, 16, 64, PatchSpec(8, 2, (2, 2, 2), (16, 16, 32), extra_column=True)
    ),  # a rest below
    Case(1, 3, 5, 64, PatchSpec(8, 2, (4, 2), (16, 48), extra_column=True)),  # less than a patch
    Case(1, 96, 192, 64, PatchSpec(8, 2, (4, 1, 2), (16, 16, 64))),  # 576 and 288 rows: tall tiles
]
MODEL = [
    Case(1, 80, 80, 128, TINY),  # tiny preset
    Case(5, 80, 80, 128, TINY),  # five groups in one call
    Case(1, 40, 80, 64, replace(PATCH_40, widths=(128, 320, 64))),  # the public model's stem
]
BENCH = [
    Case(n, height, width, 4096, PATCH_40, torch.bfloat16)
    for n, height, width in (
        (1, 40, 40),
        (1, 80, 80),
        (4, 80, 80),
        (1, 240, 320),
        (1, 480, 640),
        (32, 80, 80),
        (5, 480, 640),
    )
]
