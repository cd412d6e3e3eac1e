"""Episodes as the tokens that the runtime makes of them, and what is to be said in each step."""

# Dimension key: N episodes, T tokens, M steps of all episodes, P patches, L levels rows, B bands,
# D model width, K steps of a tick, Y frame side.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tml_kernels.ops.dmel.reference import log_mel_ref, quantise_ref

from ...model.weights import ModelWeights
from . import forward
from .stage import Episode
from .words import CONFIG, ID, NOW, YES, voice_V_K_B

SILENCE, MISSING = CONFIG.vocab.silence, CONFIG.vocab.missing
TEXT, VIDEO, AUDIO, STEP, NOTHING = range(5)
SLIPS = (ID[NOW], ID[YES], CONFIG.vocab.delegate)


@dataclass(frozen=True)
class Batch:
    """Episodes padded to the longest. source: where each token comes from in the four kinds one
    after the other: text, patches, frames heard, steps; the row behind them all is zero."""

    source_N_T: Tensor
    ids_R: Tensor  # of text
    frames_P_2_Y_Y_3: Tensor  # uint8
    levels_L_B: Tensor  # uint8, heard
    token_M: Tensor  # said by the step before
    spoken_M_B: Tensor  # uint8, in these levels
    step_at_M: Tensor  # of a step in the flattened tokens
    target_M: Tensor  # what the step says
    mel_M_B: Tensor  # in this speech
    episode_M: Tensor
    dropped_N_T_T: Tensor | None  # bool, of global layers

    def embed(self, w: ModelWeights) -> Tensor:
        """[N, T, D]"""
        sounds = forward.embed_levels(CONFIG, w, torch.cat([self.levels_L_B, self.spoken_M_B]))
        heard, spoken = sounds.split([len(self.levels_L_B), len(self.spoken_M_B)])
        parts = [
            forward.embed_text(CONFIG, w, self.ids_R),
            forward.embed_patches(CONFIG, w.patch, self.frames_P_2_Y_Y_3),
            heard,
            forward.embed_text(CONFIG, w, self.token_M) + spoken,
            sounds.new_zeros(1, CONFIG.width),
        ]
        return torch.cat(parts)[self.source_N_T]


def make_batch(
    episodes: Sequence[Episode],
    rng: np.random.Generator,
    *,
    garble: tuple[float, int] = (0.0, 1),
    slips: tuple[float, float] = (0.0, 0.0),
    keep_ticks: Sequence[int | None] = (),
) -> Batch:
    """garble: the share of speech levels fed back that are off, and by how much at most, since the
    speech head's output is not exact. slips: the shares of words fed back as not said, and of
    silent ticks as ones with a word, since a session says wrong things and must go on. keep_ticks:
    of sound and pictures, in global layers, by episode; None: all."""
    layout, tokens = CONFIG.layout, [_tokens(episode) for episode in episodes]
    num_tokens = max(len(kind_T) for kind_T, _ in tokens)
    kind_N_T = np.full((len(episodes), num_tokens), NOTHING)
    tick_N_T = np.zeros((len(episodes), num_tokens), np.int64)
    for n, (kind_T, tick_T) in enumerate(tokens):
        kind_N_T[n, : len(kind_T)], tick_N_T[n, : len(kind_T)] = kind_T, tick_T
    seen = [episode.frames_T_2_Y_Y_3[episode.seen_T] for episode in episodes]
    word_T = np.concatenate([e.said_T for e in episodes])
    said_M, mel_M_B = _said(word_T)
    fed_M, fed_M_B = _said(_slipped(word_T, rng, *slips)) if any(slips) else (said_M, mel_M_B)
    firsts = np.cumsum([0, *(layout.num_steps * len(e) for e in episodes)])[:-1]
    token_M, spoken_M_B = fed_M.roll(1), quantise_ref(fed_M_B, layout.dmel).roll(1, 0)
    token_M[firsts], spoken_M_B[firsts] = SILENCE, 0  # as in a state that was reset
    if garble[0] > 0:
        off = torch.from_numpy(_offsets(rng, *garble, tuple(spoken_M_B.shape)))
        spoken_M_B = (spoken_M_B + off).clamp(0, layout.dmel.num_levels - 1).to(torch.uint8)
    ids = np.concatenate([_ids(e, t) for e in episodes for t in range(len(e))] or [[]])
    return Batch(
        source_N_T=torch.from_numpy(_sources(kind_N_T)),
        ids_R=torch.from_numpy(ids.astype(np.int64)),
        frames_P_2_Y_Y_3=torch.from_numpy(np.concatenate(seen)),
        levels_L_B=torch.cat([_heard(episode) for episode in episodes]),
        token_M=token_M,
        spoken_M_B=spoken_M_B,
        step_at_M=torch.from_numpy(np.flatnonzero(kind_N_T == STEP)),
        target_M=said_M,
        mel_M_B=mel_M_B,
        episode_M=torch.repeat_interleave(
            torch.arange(len(episodes)),
            torch.tensor([layout.num_steps * len(e) for e in episodes]),
        ),
        dropped_N_T_T=_dropped(kind_N_T, tick_N_T, keep_ticks),
    )


def _tokens(episode: Episode) -> tuple[np.ndarray, np.ndarray]:
    """(kind, tick) of every token, in the order of the turn layout."""
    layout, kinds, ticks = CONFIG.layout, [], []
    for tick in range(len(episode)):
        counts = {
            "text": (TEXT, len(_ids(episode, tick))),
            "video": (VIDEO, int(episode.seen_T[tick])),
            "audio": (AUDIO, layout.audio_tokens),
        }
        blocks = [*(counts[block] for block in layout.blocks), (STEP, layout.num_steps)]
        for kind, count in blocks:
            kinds += [kind] * count
            ticks += [tick] * count
    return np.array(kinds), np.array(ticks)


def _ids(episode: Episode, tick: int) -> list[int]:
    return [MISSING] * int(episode.missing_T[tick]) + list(episode.text[tick])


def _sources(kind_N_T: np.ndarray) -> np.ndarray:
    """Tokens of a kind come in their order; see Batch."""
    source_N_T, first = np.zeros(kind_N_T.shape, np.int64), 0
    for kind in (TEXT, VIDEO, AUDIO, STEP):
        at = kind_N_T == kind
        source_N_T[at] = first + np.arange(at.sum())
        first += int(at.sum())
    source_N_T[kind_N_T == NOTHING] = first
    return source_N_T


def _heard(episode: Episode) -> Tensor:
    dmel = CONFIG.layout.dmel
    pcm = torch.from_numpy(episode.pcm_T_W).flatten()
    signal = torch.cat([torch.zeros(dmel.tail), pcm])
    return quantise_ref(log_mel_ref(signal[None], dmel)[0], dmel)


def _said(word_T: np.ndarray) -> tuple[Tensor, Tensor]:
    """(token [M], mel [M, B]): a word at the first step of its tick, and its speech in all four."""
    num_steps = CONFIG.layout.num_steps
    said_T_K = torch.full((len(word_T), num_steps), SILENCE)
    said_T_K[:, 0] = torch.from_numpy(word_T)
    return said_T_K.flatten(), voice_V_K_B()[torch.from_numpy(word_T)].flatten(0, 1)


def _slipped(word_T: np.ndarray, rng: np.random.Generator, lose: float, add: float) -> np.ndarray:
    """Only words that no later one depends on: a count and a scale go on from the last one said."""
    lost = np.isin(word_T, SLIPS) & (rng.random(len(word_T)) < lose)
    added = (word_T == SILENCE) & (rng.random(len(word_T)) < add)
    return np.where(lost, SILENCE, np.where(added, rng.choice(SLIPS[:2], len(word_T)), word_T))


def _dropped(
    kind_N_T: np.ndarray, tick_N_T: np.ndarray, keep_ticks: Sequence[int | None]
) -> Tensor | None:
    if all(keep is None for keep in keep_ticks):
        return None
    dropped = torch.zeros(*kind_N_T.shape, kind_N_T.shape[1], dtype=torch.bool)
    for n, keep in enumerate(keep_ticks):
        if keep is not None:
            tick_T = torch.from_numpy(tick_N_T[n])
            fades_T = torch.from_numpy(np.isin(kind_N_T[n], (AUDIO, VIDEO)))
            dropped[n] = (tick_T[:, None] - tick_T >= keep) & fades_T
    return dropped


def _offsets(
    rng: np.random.Generator, share: float, reach: int, shape: tuple[int, ...]
) -> np.ndarray:
    """0 but for a share of them, which are up to `reach` to either side: each half as often as the
    one before it."""
    offsets = np.arange(-reach, reach + 1)
    shares = np.where(offsets == 0, 0.0, 0.5 ** np.abs(offsets))
    shares *= share / shares.sum()
    shares[reach] = 1 - share
    return rng.choice(offsets, shape, p=shares)
