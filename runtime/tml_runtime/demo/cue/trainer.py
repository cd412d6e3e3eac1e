"""Trains the `cue` model: teacher forcing on mixed episodes, each drawn from the seed and the step.

A run that was stopped goes on from its folder and ends bitwise as one that was not, on the same
machine, with any number of processes.
"""

# Dimension key: E experts.

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tml_kernels._tensor_file import TensorFile, replacing, write_tensor_file

from ...errors import TmlRuntimeError
from ...model.config import from_data
from ...model.load import random_weights, save_weights
from ...model.weights import ModelWeights, MoeWeights
from .loss import Loss
from .optimiser import Optimiser, leaves
from .share import SHARES, Share, Workers
from .speech import Footage, Speech
from .tasks import TASKS
from .words import CONFIG, SILENT_LEVEL

STATE, WEIGHTS = "training.safetensors", "model.safetensors"
NEWEST = 0.05  # what an episode's loss counts in the mean of its task
STEPS = 5000  # of a run: half an hour of two cores
BALANCE = 2e-3  # by which the bias of an expert moves in a step towards an even load


class TrainingError(TmlRuntimeError):
    """A folder whose state another run has left, or that is damaged; says what to do."""


@dataclass(frozen=True)
class About:
    """What a saved state says of itself, in JSON."""

    step: int
    num_steps: int
    cpu_seconds: float
    losses: dict[str, float]
    seed: int
    speech: dict[str, str]  # hashes of the recordings
    footage: dict[str, str]


def _damaged(path: Path, tensor: str, reason: str) -> TrainingError:
    return TrainingError(f"{path}: {tensor + ': ' if tensor else ''}{reason}")


def _spelled(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


class Trainer:
    """Weights and the optimiser's state after `step` steps. For one thread."""

    def __init__(self, seed: int, speech: Speech, footage: Footage) -> None:
        self.seed, self.speech, self.footage = seed, speech, footage
        self.step, self.num_steps = 0, STEPS
        self.cpu_seconds = 0.0  # of all steps so far, of all processes
        self.losses = dict.fromkeys(TASKS, 1.0)  # running means, as of `Loss.tasks`
        self.weights = new_weights(seed)
        self.leaves = dict(leaves(self.weights))
        for tensor in self.leaves.values():
            tensor.requires_grad_()
        self.optimiser = Optimiser.new(self.leaves)

    def workers(self, num: int) -> Workers:
        """For `run_step`, a context manager."""
        return Workers(num, self.weights, self.optimiser, self.speech, self.footage)

    def run_step(self, workers: Workers) -> list[Loss]:
        """One step towards `num_steps`; the loss of each share."""
        done, losses = self.step / self.num_steps, dict(self.losses)
        shares = [Share(self.seed, self.step, n, done, losses) for n in range(SHARES)]
        taken, cpu_seconds = workers.run_step(shares, self.num_steps)
        self._balance([share.loads for share in taken])
        for share in taken:
            for task, value in share.loss.tasks.items():
                self.losses[task] += NEWEST * (value - self.losses[task])
        self.step += 1
        self.cpu_seconds += cpu_seconds + sum(share.cpu_seconds for share in taken)
        return [share.loss for share in taken]

    def save(self, folder: Path) -> None:
        """The whole state, or nothing of it."""
        about = About(
            step=self.step,
            num_steps=self.num_steps,
            cpu_seconds=self.cpu_seconds,
            losses=self.losses,
            seed=self.seed,
            speech=self.speech.hashes,
            footage=self.footage.hashes,
        )
        with replacing(folder / STATE) as path:
            tensors = [*self.leaves.items(), *self.optimiser.state.items()]
            write_tensor_file(path, tensors, {"about": json.dumps(asdict(about))})

    def save_weights(self, folder: Path) -> None:
        """The checkpoint as `InteractionModel.load` reads it."""
        with replacing(folder / WEIGHTS) as path:
            save_weights(path, CONFIG, self.weights)

    @torch.no_grad()
    def resume(self, folder: Path) -> bool:
        """Whether there was a state to go on with. Raises TrainingError for one of another seed,
        of other recordings, or one that is damaged."""
        if not (folder / STATE).is_file():
            return False
        file = TensorFile(folder / STATE, _damaged)
        try:
            about = from_data(About, json.loads(file.metadata.get("about", "{}")), "about")
        except (ValueError, RecursionError) as error:
            raise TrainingError(
                f"{folder / STATE} is damaged ({error}): delete it to begin anew"
            ) from error
        wanted = {
            "seed": self.seed,
            "speech": self.speech.hashes,
            "footage": self.footage.hashes,
        }
        for name, value in wanted.items():
            found = getattr(about, name)
            if found != value:
                raise TrainingError(
                    f"{folder / STATE} is of a run with {name}={found}, not {value}: "
                    "choose another folder, or delete that file to begin anew"
                )
        state = {**self.leaves, **self.optimiser.state}
        if sorted(state) != sorted(file.entries) or not set(TASKS) <= set(about.losses):
            raise TrainingError(f"{folder / STATE} is of another version: delete it to begin anew")
        saved = {name: file.tensor(name) for name in state}
        for name, tensor in state.items():
            if (saved[name].dtype, saved[name].shape) != (tensor.dtype, tensor.shape):
                raise TrainingError(
                    f"{folder / STATE} has {name} as {_spelled(saved[name])}, not "
                    f"{_spelled(tensor)}: delete it to begin anew"
                )
        for name, tensor in state.items():
            tensor.copy_(saved[name])
        self.step, self.num_steps = about.step, about.num_steps
        self.cpu_seconds, self.losses = about.cpu_seconds, about.losses
        return True

    @torch.no_grad()
    def _balance(self, loads: Iterable[Sequence[np.ndarray]]) -> None:
        sparse = [lw.mlp for lw in self.weights.layers if isinstance(lw.mlp, MoeWeights)]
        for mlp, of_shares in zip(sparse, zip(*loads, strict=True), strict=True):
            load_E = torch.from_numpy(np.sum(of_shares, axis=0)).float()
            mlp.bias_E.add_((load_E.mean() - load_E).sign(), alpha=BALANCE)


def new_weights(seed: int) -> ModelWeights:
    """Random ones, a little tamer than those of a model that is never trained."""
    weights, _ = random_weights(CONFIG, seed=seed, device="cpu", dtype=torch.float32)
    for name, tensor in leaves(weights):
        if name.endswith(("q_norm_C", "k_norm_C")):
            tensor.mul_(1.5)  # scores of up to 1 alone would leave attention nearly even
        elif name.startswith("unembed"):
            tensor.mul_(0.1)
        elif name.endswith("bias_E"):
            tensor.zero_()
        elif name == "flow.output_bias_B":
            tensor.fill_(SILENT_LEVEL)
    return weights
