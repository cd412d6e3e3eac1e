"""What training lowers: the loss of a batch's tokens, and of its speech."""

# Dimension key: M steps of all episodes, Q rows of the speech head, B mel bands, D model width,
# V vocabulary.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...model.weights import ModelWeights
from . import forward
from .batch import SILENCE, Batch
from .lessons import Lesson
from .stage import Episode
from .words import CONFIG

SPEECH_WEIGHT = 0.1  # of the speech head's loss beside that of tokens
LATER_WEIGHT = 0.1  # of a tick's later steps, whose token is always silence
QUIET_ROWS = 24  # of the speech head per batch, of steps long after a word


@dataclass(frozen=True)
class Loss:
    """Of one step: of all, of tokens alone, of speech alone; and by task, of first-step tokens for
    each word that is due: silence is easy, and no measure of what is left to learn."""

    total: float
    tokens: float
    speech: float
    tasks: dict[str, float]


def batch_loss(
    w: ModelWeights,
    batch: Batch,
    episodes: Sequence[Episode],
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
