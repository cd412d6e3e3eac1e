"""Trains the `cue` model: teacher forcing on mixed episodes, each drawn from the seed and the step.

A run that was stopped goes on from its folder and ends bitwise as one that was not, on the same
machine with the same number of threads.
"""

# Dimension key: M steps of all episodes, Q rows of the speech head, B mel bands, E experts.

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tml_kernels._tensor_file import TensorFile, replacing, write_tensor_file

from ...errors import TmlRuntimeError
from ...model.config import from_data
from ...model.load import random_weights, save_weights
from ...model.weights import ModelWeights, MoeWeights
from . import forward
from .batch import SILENCE, Batch, make_batch
from .lessons import Lesson, draw_tasks, lesson_at
from .optimiser import Optimiser, leaves
from .speech import Footage, Speech
from .stage import Episode
from .tasks import TASKS, make_episode
from .words import CONFIG, SILENT_LEVEL

STATE, WEIGHTS = "training.safetensors", "model.safetensors"
SPEECH_WEIGHT = 0.1  # of the speech head's loss beside that of tokens
LATER_WEIGHT = 0.1  # of a tick's later steps, whose token is always silence
QUIET_ROWS = 24  # of the speech head per batch, of steps long after a word
NEWEST = 0.05  # what an episode's loss counts in the mean of its task
UNKNOWN = 100_000  # steps, for the schedules of the first ones, by which a run's number is set
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


@dataclass(frozen=True)
class Loss:
    """Of one step: of all, of tokens alone, of speech alone; and by task, of first-step tokens for
    each word that is due: silence is easy, and no measure of what is left to learn."""

    total: float
    tokens: float
    speech: float
    tasks: dict[str, float]


class Trainer:
    """Weights and the optimiser's state after `step` steps. For one thread."""

    def __init__(self, seed: int, speech: Speech, footage: Footage) -> None:
        self.seed, self.speech, self.footage = seed, speech, footage
        self.step, self.num_steps = 0, 0
        self.cpu_seconds = 0.0  # of all steps so far
        self.losses = dict.fromkeys(TASKS, 1.0)  # running means, as of `Loss.tasks`
        self.weights = new_weights(seed)
        self.leaves = dict(leaves(self.weights))
        for tensor in self.leaves.values():
            tensor.requires_grad_()
        self.optimiser = Optimiser.new(self.leaves)

    def run_step(self) -> Loss:
        """One step towards `num_steps`, 0 while nobody knows it."""
        begin = time.process_time()
        rng = np.random.default_rng([self.seed, 1, self.step])
        num_steps = self.num_steps or UNKNOWN
        lesson = lesson_at(self.step / num_steps)
        episodes = draw_episodes(
            self.seed, self.step, lesson, self.losses, self.speech, self.footage
        )
        keep = [None if rng.random() < 0.5 else int(rng.integers(16, 64)) for _ in episodes]
        batch = make_batch(
            episodes,
            rng,
            garble=lesson.draw_garble(rng),
            slips=lesson.draw_slips(rng),
            keep_ticks=keep,
        )
        loads: list[Tensor] = []
        with _flushed_denormals():
            total, loss = batch_loss(self.weights, batch, episodes, rng, lesson, loads)
            total.backward()
            self.optimiser.step(self.step, num_steps)
        self._balance(loads)
        for task, value in loss.tasks.items():
            self.losses[task] += NEWEST * (value - self.losses[task])
        self.step += 1
        self.cpu_seconds += time.process_time() - begin
        return loss

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
        file = TensorFile(folder / STATE, lambda path, name, why: TrainingError(f"{path}: {why}"))
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
        for name, tensor in state.items():
            tensor.copy_(file.tensor(name))
        self.step, self.num_steps = about.step, about.num_steps
        self.cpu_seconds, self.losses = about.cpu_seconds, about.losses
        return True

    @torch.no_grad()
    def _balance(self, loads: list[Tensor]) -> None:
        sparse = [lw.mlp for lw in self.weights.layers if isinstance(lw.mlp, MoeWeights)]
        for mlp, load_E in zip(sparse, loads, strict=True):
            mlp.bias_E.add_((load_E.float().mean() - load_E).sign(), alpha=BALANCE)


@contextmanager
def _flushed_denormals() -> Iterator[None]:
    """This thread takes numbers below 2^-126 for zero. What softmax gives back to keys that are
    hardly looked at is full of them, and products of them are a hundred times as slow."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


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


def draw_episodes(
    seed: int,
    step: int,
    lesson: Lesson,
    losses: Mapping[str, float],
    speech: Speech,
    footage: Footage,
) -> list[Episode]:
    """Mixed tasks: 150 ticks of five short episodes to one long one, or one of a minute."""
    rng = np.random.default_rng([seed, 2, step])
    shape = rng.choice(5, p=lesson.lengths)
    if shape == 0:
        lengths, sections = [int(rng.integers(26, 35))] * 5, 1
    elif shape == 1:
        lengths, sections = [int(rng.integers(44, 57))] * 3, 1
    elif shape == 2:
        lengths, sections = [int(rng.integers(64, 81))] * 2, int(rng.integers(1, 3))
    elif shape == 3:
        lengths, sections = [int(rng.integers(120, 181))], int(rng.integers(1, 4))
    else:
        lengths, sections = [int(rng.integers(240, 311))], 1
    names = draw_tasks(losses, len(lengths), rng, lesson.counting)
    paces = lesson.draw_paces(len(lengths), rng)
    speech = replace(speech, varied=lesson.varied)
    footage = replace(footage, varied=lesson.varied)
    return [
        make_episode(
            names[n],
            num_ticks,
            np.random.SeedSequence([seed, 3, step, n]),
            speech,
            footage,
            sections=sections,
            pace=paces[n],
            talks=lesson.talks,
            delays=lesson.delays,
        )
        for n, num_ticks in enumerate(lengths)
    ]


def batch_loss(
    w: ModelWeights,
    batch: Batch,
    episodes: list[Episode],
    rng: np.random.Generator,
    lesson: Lesson,
    loads: list[Tensor] | None = None,
) -> tuple[Tensor, Loss]:
    """What is minimised, with a graph, and its parts."""
    h_N_T_D = forward.hidden_states(CONFIG, w, batch.embed(w), batch.dropped_N_T_T, loads)
    h_M_D = h_N_T_D.flatten(0, 1)[batch.step_at_M]
    logits_M_V = forward.logits(CONFIG, w, h_M_D)
    loss_M = F.cross_entropy(logits_M_V, batch.target_M, reduction="none")
    is_first_M = torch.arange(len(loss_M)) % CONFIG.layout.num_steps == 0
    weight_M = torch.where(is_first_M, 1.0, LATER_WEIGHT)
    weight_M = weight_M * torch.where(batch.target_M == SILENCE, 1.0, lesson.word)
    due = torch.where(batch.target_M != SILENCE)[0]
    silence_V = torch.arange(CONFIG.vocab.num_valid) == SILENCE
    which = logits_M_V[due].masked_fill(silence_V, float("-inf"))
    choice = F.cross_entropy(which, batch.target_M[due], reduction="sum")
    tokens = ((loss_M * weight_M).sum() + lesson.choice * choice) / weight_M.sum()
    speech = speech_loss(w, batch, h_M_D, rng)
    total = tokens + SPEECH_WEIGHT * speech
    tasks = {}
    for n, episode in enumerate(episodes):
        of_n = (batch.episode_M == n) & is_first_M
        num_due = int((episode.said_T != SILENCE).sum())
        tasks[episode.task] = float(loss_M.detach()[of_n].sum()) / (1 + num_due)
    return total, Loss(float(total.detach()), float(tokens.detach()), float(speech.detach()), tasks)


def speech_loss(w: ModelWeights, batch: Batch, h_M_D: Tensor, rng: np.random.Generator) -> Tensor:
    """Flow matching at the times that the head is asked at: all steps of ticks with a word and of
    the ticks after them, a few others. Words such as "<yield>" are silent, and so is what follows
    one: a head that sings on there is heard by the model itself."""
    says_T = (batch.target_M.view(-1, CONFIG.layout.num_steps) != SILENCE).any(1)
    near_M = (says_T | says_T.roll(1)).repeat_interleave(CONFIG.layout.num_steps)
    far = np.flatnonzero(~near_M.numpy())
    some = rng.permutation(far)[:QUIET_ROWS]
    rows = torch.cat([torch.where(near_M)[0], torch.from_numpy(some)])
    mel_Q_B, num_steps = batch.mel_M_B[rows], CONFIG.flow.num_steps
    noise = rng.standard_normal(mel_Q_B.shape, dtype=np.float32)
    noise_Q_B = torch.from_numpy(noise)
    n_Q = torch.from_numpy(rng.integers(num_steps, size=len(rows)))
    t_Q_1 = n_Q[:, None] / num_steps
    x_Q_B = (1 - t_Q_1) * noise_Q_B + t_Q_1 * mel_Q_B
    v_Q_B = forward.velocity(w.flow, h_M_D[rows], x_Q_B, n_Q, num_steps)
    return (v_Q_B - (mel_Q_B - noise_Q_B)).square().mean()
