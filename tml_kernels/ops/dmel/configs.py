"""How dmel is cut: tiles of the DFT product, then one program per frame."""

from __future__ import annotations

from dataclasses import dataclass

from ..._configs import chooser

MAX_WIDTH = 16384  # a token in the registers of one program


@dataclass(frozen=True)
class SpectrumConfig:
    """A tile is block_r frames x block_q bins, block_k samples at a time."""

    block_r: int
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


# One tile for every number of frames: a frame's bits cannot depend on how many there are.
SPECTRUM = SpectrumConfig(block_r=16, block_q=32, block_k=32, num_warps=4, num_stages=3)


# Bands summed at a time, the same for every width: a band's bits do not depend on the width.
BLOCK_B = 32


@dataclass(frozen=True)
class EmbedConfig:
    """unroll: table rows in flight per program; they are what hides the latency of the gather."""

    block_d: int
    num_warps: int
    unroll: int

    def why_not(self, width: int) -> str | None:
        """The one statement of what is legal; used by the chooser and the tests."""
        if width > self.block_d:
            return f"{width=} does not fit one block of {self.block_d=}"
        return None


SHIPPED = (
    EmbedConfig(block_d=128, num_warps=4, unroll=8),
    EmbedConfig(block_d=512, num_warps=4, unroll=8),
    EmbedConfig(block_d=1024, num_warps=4, unroll=8),
    EmbedConfig(block_d=2048, num_warps=8, unroll=8),
    EmbedConfig(block_d=4096, num_warps=16, unroll=8),
    EmbedConfig(block_d=8192, num_warps=16, unroll=8),
    EmbedConfig(block_d=16384, num_warps=16, unroll=4),
)


LEVELS = EmbedConfig(block_d=1, num_warps=4, unroll=1)  # no embedding at all


@chooser
def choose_embed(width: int) -> EmbedConfig:
    """Pure: the width alone decides, so that a token's bits do not depend on its neighbours."""
    for config in SHIPPED:
        if config.why_not(width) is None:
            return config
    raise ValueError(f"dmel: width {width} is over {MAX_WIDTH}, the widest token it makes")
