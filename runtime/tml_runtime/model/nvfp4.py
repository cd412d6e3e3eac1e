"""Routed experts that a checkpoint holds in nvfp4, read as they are: nothing is rounded.

Two spellings are read. Of NAME, a stack of E matrices [R, K]:

                 the published nvfp4 release         compressed-tensors
codes            NAME                                NAME.weight_packed
block scales     NAME.scale                          NAME.weight_scale
global scale     NAME.scale2                         NAME.weight_global_scale
left unread      NAME.input_amax, .original_shape    NAME.input_global_scale

Codes are uint8 [E, R, K / 2], two e2m1 in a byte, the low half is the even column. Block scales are
float8_e4m3fn [E, R, K / 16]. The global scale is float32 [E]; compressed-tensors also has [E, 1]
and, of gate and up, [E, 2], which have to be equal here. A weight is code * block scale * global
scale in the published release, and compressed-tensors stores the reciprocal: there it is divided
by, and the float32 next to 1 / global scale is what it is multiplied with here.
Sources: NVIDIA Model Optimizer's and the compressed-tensors project's NVFP4 formats, as vLLM's
loader of this model reads them.
"""

# Dimension key: E experts, R rows of a matrix, K columns, N global scales of one expert.

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tml_kernels._tensor_file import TensorFile
from tml_kernels.quant import FORMATS, PackedExperts
from tml_kernels.quant.checkpoint import MatrixScales, read_checkpoint
from tml_kernels.quant.codes import decode
from tml_kernels.quant.fill import Source, pack_experts

from .checkpoint import CheckpointError

FORMAT = FORMATS["nvfp4"]
GROUP = 16  # columns under one block scale
# Of a global scale as a factor: times 2^8 it is a normal float32, times 6 * 448 a finite one.
_LEAST, _MOST = 2.0**-126, 2.0**116


@dataclass(frozen=True)
class Spelling:
    """What is behind a stack's name in the names of its parts."""

    codes: str
    scale: str
    outer: str
    unread: tuple[str, ...]
    divides: bool  # the global scale is a divisor


SPELLINGS = (
    Spelling("", ".scale", ".scale2", (".input_amax", ".original_shape"), divides=False),
    Spelling(
        ".weight_packed",
        ".weight_scale",
        ".weight_global_scale",
        (".input_global_scale",),
        divides=True,
    ),
)


@dataclass(frozen=True)
class Nvfp4Stack:
    """One matrix of all routed experts of a layer, found to have the right parts."""

    codes: str  # names of tensors
    scale: str
    outer: str
    unread: tuple[str, ...]  # those that belong to it and say nothing about its weights
    files: dict[str, TensorFile]  # of the checkpoint
    outer_E: Tensor  # float32 factors, on the CPU

    @property
    def parts(self) -> tuple[str, str, str]:
        return self.codes, self.scale, self.outer

    def packed(self, begin: int, end: int, device: torch.device | str) -> PackedExperts:
        """Experts begin..end: the checkpoint's codes and scales, in the order that kernels read.
        Raises CheckpointError for a block scale that no weight can have."""
        packed = pack_experts(self._source(begin, end, device), FORMAT)
        # An error of 0, and not none at all: a converted folder has a place for it.
        return replace(packed, error_E=torch.zeros(end - begin, device=device))

    def values(self, expert: int, device: torch.device | str) -> Tensor:
        """float32 [R, K] of one expert. Raises as `packed` does."""
        source = self._source(expert, expert + 1, device)
        scales = source.scales(0)
        return decode(source.codes(0, 0, source.shape[1], scales), scales, FORMAT)

    def _source(self, begin: int, end: int, device: torch.device | str) -> Source:
        codes, scale = (
            self.files[name].tensor(name)[begin:end].to(device) for name in (self.codes, self.scale)
        )
        bad_E = (scale.view(torch.uint8) >= 0x7F).flatten(1).any(1)
        if bad_E.any():
            expert = begin + int(bad_E.nonzero()[0])
            reason = f"expert {expert} has a block scale that is NaN or negative"
            raise CheckpointError(self.files[self.scale].path, self.scale, reason)
        given = MatrixScales(scale, outer=self.outer_E[begin:end].to(device))
        return read_checkpoint(self.codes, codes, FORMAT, given, kn=False, packing=None)


def find_stack(
    path: Path, files: dict[str, TensorFile], name: str, shape: tuple[int, ...]
) -> Nvfp4Stack | None:
    """The stack [E, R, K] of this name if it is there in nvfp4; None where it is not. Raises
    CheckpointError for a part that is missing, of another dtype or shape, or a global scale that
    is not a positive number of ordinary size."""
    for spelling in SPELLINGS:
        codes = name + spelling.codes
        if codes in files and (codes != name or files[name].entries[name].dtype == "U8"):
            break
    else:
        return None
    num_experts, num_rows, num_columns = shape
    scale, outer = name + spelling.scale, name + spelling.outer
    outer_shapes = [(num_experts,)]
    if spelling.divides:
        outer_shapes += [(num_experts, 1), (num_experts, 2)]
    for part, dtype, shapes in (
        (codes, "U8", [(num_experts, num_rows, num_columns // 2)]),
        (scale, "F8_E4M3", [(num_experts, num_rows, num_columns // GROUP)]),
        (outer, "F32", outer_shapes),
    ):
        _check_part(path, files, part, dtype, shapes)
    unread = (name + part for part in spelling.unread)
    return Nvfp4Stack(
        codes,
        scale,
        outer,
        tuple(part for part in unread if part in files),
        files,
        _factors(files[outer], outer, spelling),
    )


def _check_part(
    path: Path,
    files: dict[str, TensorFile],
    part: str,
    dtype: str,
    shapes: list[tuple[int, ...]],
) -> None:
    wanted = f"{dtype} {' or '.join(map(str, shapes))}"
    if part not in files:
        raise CheckpointError(path, part, f"missing; nvfp4 experts need it, expected {wanted}")
    entry = files[part].entries[part]
    if entry.dtype != dtype or entry.shape not in shapes:
        reason = f"is {entry.dtype} {entry.shape}, expected {wanted}"
        raise CheckpointError(files[part].path, part, reason)


def _factors(file: TensorFile, name: str, spelling: Spelling) -> Tensor:
    """float32 [E], what weights are multiplied with."""
    stored = file.tensor(name)
    stored_E_N = stored.view(stored.shape[0], -1)
    factor_E_N = 1 / stored_E_N if spelling.divides else stored_E_N
    usable_E = ((factor_E_N >= _LEAST) & (factor_E_N < _MOST)).all(1)  # NaN is not
    if not usable_E.all():
        expert = int((~usable_E).nonzero()[0])
        reason = (
            f"expert {expert} has global scale {stored_E_N[expert].tolist()}; as a factor it has "
            "to be in 2^-126..2^116"
        )
        raise CheckpointError(file.path, name, reason)
    differs_E = (stored_E_N != stored_E_N[:, :1]).any(1)
    if differs_E.any():
        expert = int(differs_E.nonzero()[0])
        reason = f"expert {expert} has other global scales for gate and up rows; one is read"
        raise CheckpointError(file.path, name, reason)
    return factor_E_N[:, 0].clone()
