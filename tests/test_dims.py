from __future__ import annotations

import pytest
import torch

from tml_kernels._dims import Dims


def test_binds_once_and_compares_afterwards() -> None:
    dims = Dims()
    dims.check(x_T_D=torch.zeros(4, 8))
    assert (dims["T"], dims["D"]) == (4, 8)
    dims.check(bias_D=torch.zeros(8), state_T_3_D=torch.zeros(4, 3, 8))
    with pytest.raises(ValueError, match=r"weight_T_K: T=5, but T=4 was bound earlier"):
        dims.check(weight_T_K=torch.zeros(5, 2))


def test_prefix_sums_have_one_row_more() -> None:
    dims = Dims()
    dims.check(start_S1=torch.zeros(4))
    assert dims["S"] == 3
    dims.check(slot_S=torch.zeros(3))
    with pytest.raises(ValueError, match="S1=3, but S1=4"):
        dims.check(start_S1=torch.zeros(3))
    with pytest.raises(ValueError, match="needs at least one row"):
        Dims().check(start_S1=torch.zeros(0))


def test_flattened_axis_is_the_product() -> None:
    dims = Dims(H=2, C=3)
    dims.check(q_T_HC=torch.zeros(5, 6))
    with pytest.raises(ValueError, match="HC=7, but HC=6"):
        dims.check(q_T_HC=torch.zeros(5, 7))


@pytest.mark.parametrize(
    ("tensor", "options", "error", "words"),
    [
        (torch.zeros(4), {}, ValueError, "expected 2 axes"),
        (torch.zeros(4, 2).T, {}, ValueError, "contiguous"),
        (torch.zeros(4, 2), {"dtype": torch.int32}, TypeError, "torch.int32, got torch.float32"),
        (torch.zeros(4, 2), {"dtype": (torch.half,) * 2}, TypeError, "expected torch.float16, got"),
        (torch.zeros(4, 2), {"device": torch.device("meta")}, ValueError, "device meta"),
        ("text", {}, TypeError, "got str"),
    ],
)
def test_names_what_is_wrong(tensor, options: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=rf"x_T_D: .*{words}"):
        Dims().check(**options, x_T_D=tensor)


def test_a_strided_view_passes_when_the_kernel_takes_strides() -> None:
    Dims().check(x_T_D=torch.zeros(4, 2).T, contiguous=False)
