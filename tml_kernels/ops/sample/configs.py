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
    that do not matter, and takes the others `look_v` columns at a time."""

    run_v: int
    block_v: int = 4096
    look_v: int = 1024
    num_warps: int = 8
    maxnreg: int = 80

    def registers(self, *, edited: bool) -> int:
        """That a thread may take. What finishes a row, one program of many, would like more than
        what all do; with edits of logits in every look it has to."""
        return 255 if edited else self.maxnreg

    def why_not(self, p: Problem) -> str | None:
        """The one statement of what is legal; used by the chooser and the tests."""
        if self.run_v < p.min_run:
            return f"{p.vocabulary=} has over {MAX_RUNS} runs of {self.run_v=}"
        if self.block_v % self.run_v or self.look_v % self.run_v:
            return f"{self.block_v=} or {self.look_v=} is not a multiple of {self.run_v=}"
        return None


SHIPPED = (Config(run_v=128), Config(run_v=512))


@chooser
def choose_config(p: Problem) -> Config:
    """Pure: same problem, same config; no device, no clock. Never by the number of rows."""
    for config in SHIPPED:
        if config.why_not(p) is None:
            return config
    raise ValueError(f"sample: V={p.vocabulary} is over {MAX_RUNS * SHIPPED[-1].run_v}")


RUN_FLOATS = 3  # of a run: largest logit, bound of its best draw, sum of exponentials


def scratch_sizes(num_rows: int, vocabulary: int, config: Config) -> tuple[int, int, int]:
    """Words of the scratch's parts: arrival counters, zero between calls; floats of runs; the runs
    that matter."""
    runs = -(-vocabulary // config.block_v) * config.block_v // config.run_v
    return num_rows, num_rows * RUN_FLOATS * runs, num_rows * runs


def scratch_words(num_rows: int, vocabulary: int) -> int:
    """int32 words that `sample` needs on CUDA for S rows over V columns; zeros at first."""
    return sum(scratch_sizes(num_rows, vocabulary, choose_config(Problem(vocabulary))))
