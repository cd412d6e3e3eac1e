"""dmel: sound to levels to tokens, two launches for a tick of all sessions."""

# Dimension key: S session rows, W samples of this call, N state slots, L samples of tail,
# F frames, V = bands * levels rows of the table, D model width.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tml_kernels.ops.dmel import DmelSpec, cases, dmel
from tml_kernels.ops.dmel.constants import frame_window, mel_filters
from tml_kernels.ops.dmel.reference import dmel_embed_ref, dmel_levels_ref
from tml_kernels.ops.dmel.spec import MEL_FLOOR
from tml_kernels.testing import assert_bitwise, assert_matches

from .harness import OpBench, Variant


def check(case: cases.Case, device: str) -> None:
    inputs = case.make_inputs(device)
    pcm, tail, slot = (inputs[name].cpu() for name in ("pcm_S_W", "tail_N_L", "slot_S"))
    levels, tail = dmel_levels_ref(pcm, tail, slot, case.spec)
    out, actual = dmel(**inputs)
    assert_bitwise(inputs["tail_N_L"], tail)
    # A float32 spectrum may choose the other side of a midpoint; the op's tests say how near.
    step = (actual.cpu().int() - levels.int()).abs()
    assert step.numel() == 0 or int(step.max()) <= 1, f"a level is {int(step.max())} off"
    assert int(step.sum()) <= step.numel() // 1000, f"{int(step.sum())} of {step.numel()} are off"
    rows, live = actual.flatten(0, 1), inputs["slot_S"] >= 0
    if rows.numel() == 0:
        return
    weights = (inputs["table_V_D"], inputs["norm_weight_D"])
    tokens = dmel_embed_ref(rows, *weights, num_levels=case.spec.num_levels).view(out.shape)
    assert_matches(out[live], tokens[live], dtype=case.dtype)
    assert not out[~live].any(), "tokens of idle rows are not zero"


def prepare_torch(inputs: dict[str, Any]) -> dict[str, Any]:
    """Window and filters on the device, the norm's weight in the table's dtype."""
    spec, device = inputs["spec"], inputs["pcm_S_W"].device
    return inputs | {
        "window": torch.from_numpy(frame_window(spec)).to(device),
        "mel_Q_B": torch.from_numpy(mel_filters(spec)).to(device),
        "norm_weight_D": inputs["norm_weight_D"].to(inputs["table_V_D"].dtype),
    }


def torch_dmel(
    pcm_S_W: Tensor,
    tail_N_L: Tensor,
    slot_S: Tensor,
    table_V_D: Tensor,
    norm_weight_D: Tensor,
    spec: DmelSpec,
    window: Tensor,
    mel_Q_B: Tensor,
) -> Tensor:
    """In float32: torch's FFT, a product with the filters, an embedding bag, torch's own norm."""
    signal_S_W = torch.cat([tail_N_L[slot_S], pcm_S_W], dim=1)
    tail_N_L[slot_S] = signal_S_W[:, -spec.tail :]
    magnitude = torch.fft.rfft(signal_S_W.unfold(1, spec.fft, spec.hop) * window).abs()
    log_mel = (magnitude @ mel_Q_B).clamp(min=MEL_FLOOR).log10()
    scale = (spec.num_levels - 1) / (spec.level_max - spec.level_min)
    level = ((log_mel - spec.level_min) * scale).round().clamp(0, spec.num_levels - 1).long()
    bands = torch.arange(spec.num_bands, device=level.device) * spec.num_levels
    sum_T_D = F.embedding_bag((level + bands).flatten(0, 1), table_V_D, mode="sum")
    tokens = F.rms_norm(sum_T_D, (sum_T_D.shape[1],), norm_weight_D, 1e-6)
    return tokens.view(*level.shape[:2], -1)


OP = OpBench(
    name="dmel",
    edge=cases.EDGE,
    model=cases.MODEL,
    bench=cases.BENCH,
    check=check,
    variants={
        "ours": Variant(dmel),
        # Two float32 spectra may choose different sides of a midpoint: not compared on every run.
        "torch": Variant(torch_dmel, prepare_torch, check=False),
    },
)
