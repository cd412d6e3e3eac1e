"""How sample is cut: a row into blocks, one program each, and a block into runs of columns."""

from __future__ import annotations

from dataclasses import dataclass

from ..._configs import chooser

MAX_RUNS = 2048  # of a row: their maxima lie in the registers of the program that finishes it


@dataclass(frozen=True)
class Problem:
    vocabulary: int

    @property
    def min_run(self) -> int:
        """The least power of two that cuts a row into MAX_RUNS runs."""
        return 1 << (-(-self.vocabulary // MAX_RUNS) - 1).bit_length()


@dataclass(frozen=True)
class Config:
    """A program takes `block_v` columns of a row. What finishes a row skips runs of `run_v` columns
    whose largest logit says that they do not matter, and takes the others `block_v` at a time."""

    run_v: int
    block_v: int = 2048
    num_warps: int = 16

    def why_not(self, p: Problem) -> str | None:
        """The one statement of what is legal; used by the chooser and the tests."""
        if self.run_v < p.min_run:
            return f"{p.vocabulary=} has over {MAX_RUNS} runs of {self.run_v=}"
        if self.block_v % self.run_v:
            return f"{self.block_v=} is not a multiple of {self.run_v=}"
        return None


SHIPPED = (Config(run_v=128), Config(run_v=512))


@chooser
def choose_config(p: Problem) -> Config:
    """Pure: same problem, same config; no device, no clock. Never by the number of rows."""
    for config in SHIPPED:
        if config.why_not(p) is None:
            return config
    raise ValueError(f"sample: V={p.vocabulary} is over {MAX_RUNS * SHIPPED[-1].run_v}")


# Of a block: largest logit, NaN if it has one; sum of exponentials from that; logit and noise of
# the best draw. Columns of the largest and of the best draw.
BLOCK_FLOATS, BLOCK_IDS = 4, 2


def scratch_sizes(num_rows: int, vocabulary: int, config: Config) -> tuple[int, int, int, int, int]:
    """Words of the scratch's parts: arrival counters, zero between calls; floats and ids of blocks;
    maxima of runs; the runs that matter."""
    blocks = -(-vocabulary // config.block_v)
    runs = blocks * config.block_v // config.run_v
    per_row = (1, BLOCK_FLOATS * blocks, BLOCK_IDS * blocks, runs, runs)
    counters, floats, ids, maxima, listed = (num_rows * words for words in per_row)
    return counters, floats, ids, maxima, listed


def scratch_words(num_rows: int, vocabulary: int) -> int:
    """int32 words that `sample` needs on CUDA for S rows over V columns; zeros at first."""
    return sum(scratch_sizes(num_rows, vocabulary, choose_config(Problem(vocabulary))))
