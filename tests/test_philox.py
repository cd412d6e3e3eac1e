from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from scipy import stats
from torch import Tensor

from tml_kernels._philox import (
    FLOW_STREAM,
    SAMPLE_STREAM,
    gumbel,
    normal,
    philox_4x32,
    random_bits,
    uniform,
)
from tml_kernels.testing import assert_bitwise, assert_matches

SEEDS = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # kat_vectors of Random123 1.14, philox4x32 with 10 rounds
        (
            [0, 0, 0, 0],
            [0, 0],
            [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        ),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF] * 2,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    c = torch.tensor(counter)
    even, odd = philox_4x32(c[[0, 2]], c[[1, 3]], torch.tensor(key))
    assert [even[0].item(), odd[0].item(), even[1].item(), odd[1].item()] == words


def scalar_philox(c0: int, c1: int, c2: int, c3: int, k0: int, k1: int) -> tuple[int, ...]:
    """The ten rounds in Python's unbounded integers."""
    mask = 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & mask, (a >> 32) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def test_layout_of_key_and_counter() -> None:
    counters = torch.tensor([0, 5, 2**32, 2**40 + 3, 2**62, 7])
    bits = random_bits(SEEDS, counters, 11, 9)
    assert bits.shape == (6, 11)
    for s, (seed, counter) in enumerate(zip(SEEDS.tolist(), counters.tolist(), strict=True)):
        seed &= 2**64 - 1
        for column in range(11):
            words = scalar_philox(
                column // 4, counter % 2**32, counter >> 32, 9, seed % 2**32, seed >> 32
            )
            assert bits[s, column].item() == words[column % 4]


@triton.jit
def philox_kernel(seed_ptr, counter_ptr, out_ptr, stream, BLOCKS: tl.constexpr):
    s = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    zero = tl.zeros([BLOCKS], tl.uint32)
    counter = tl.load(counter_ptr + s)
    low = (counter & 0xFFFFFFFF).to(tl.uint32) + zero
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32) + zero
    tag = (zero + stream).to(tl.uint32)
    words = tl.philox(tl.load(seed_ptr + s), block.to(tl.uint32), low, high, tag)
    for w in tl.static_range(4):
        tl.store(out_ptr + s * 4 * BLOCKS + block * 4 + w, words[w].to(tl.int64))


def test_equals_triton(device: str) -> None:
    seeds = SEEDS.to(device)
    counters = torch.tensor([0, 1, 2**33 + 1, 17, 2**62, 3], device=device)
    out = torch.empty(6, 32, dtype=torch.int64, device=device)
    philox_kernel[(6,)](seeds, counters, out, FLOW_STREAM, BLOCKS=8)
    assert_bitwise(out, random_bits(seeds, counters, 32, FLOW_STREAM))


@pytest.mark.gpu
def test_same_integers_on_the_gpu() -> None:
    counters = torch.arange(6) * 2**31
    on_gpu = random_bits(SEEDS.cuda(), counters.cuda(), 77, SAMPLE_STREAM)
    assert_bitwise(on_gpu, random_bits(SEEDS, counters, 77, SAMPLE_STREAM))


def test_a_number_is_a_function_of_its_names() -> None:
    counters = torch.tensor([3, 3, 4, 0, 9, 1])
    together = random_bits(SEEDS, counters, 40, SAMPLE_STREAM)
    for s in range(6):
        alone = random_bits(SEEDS[s : s + 1], counters[s : s + 1], 13, SAMPLE_STREAM)
        assert_bitwise(alone[0], together[s, :13])


def test_streams_seeds_and_counters_do_not_collide() -> None:
    seed, counter = torch.arange(8).repeat_interleave(8), torch.arange(8).repeat(8)
    drawn = [random_bits(seed, counter, 64, stream) for stream in (SAMPLE_STREAM, FLOW_STREAM)]
    values = torch.cat(drawn).flatten()
    # 8192 draws of 32 bits: 0.008 equal pairs are expected by chance, none among these.
    assert values.unique().numel() == values.numel()


def extremes() -> Tensor:
    return torch.tensor([0, 1, 2**24, 2**31, 2**32 - 2**8, 2**32 - 2, 2**32 - 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_bits_stay_inside_the_open_interval(dtype: torch.dtype) -> None:
    u = uniform(extremes(), dtype)
    assert ((u > 0) & (u < 1)).all()
    assert u.diff().ge(0).all()
    g = gumbel(extremes(), dtype)
    assert g.isfinite().all()
    assert g[0].item() == pytest.approx(33 * math.log(2), rel=1e-6)


def test_float32_noise_matches_float64() -> None:
    bits = random_bits(torch.tensor([11]), torch.tensor([0]), 100_000, SAMPLE_STREAM)
    assert_matches(gumbel(bits, torch.float32), gumbel(bits, torch.float64))
    names = torch.tensor([11]), torch.tensor([0]), 100_000, FLOW_STREAM
    assert_matches(normal(*names, torch.float32), normal(*names, torch.float64))


@pytest.mark.parametrize("along", ["columns", "counters", "seeds"])
def test_distributions(along: str) -> None:
    n, zero = 50_000, torch.zeros(50_000, dtype=torch.int64)
    index = torch.arange(n)
    names = {
        "columns": (zero[:1], zero[:1], n),
        "counters": (zero, index, 2),
        "seeds": (index, zero, 2),
    }[along]
    bits = random_bits(*names, SAMPLE_STREAM).flatten()[:n]
    noise = normal(*names, FLOW_STREAM, torch.float64).flatten()[:n]
    # Fixed seeds: a p-value under 1e-3 would be a defect of the generator, not bad luck.
    assert stats.kstest(uniform(bits, torch.float64), "uniform").pvalue > 1e-3
    assert stats.kstest(gumbel(bits, torch.float64), "gumbel_r").pvalue > 1e-3
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert abs(float((noise[0::2] * noise[1::2]).mean())) < 4 / math.sqrt(n / 2)


@pytest.mark.parametrize("num_columns", [0, 1, 2, 3, 5])
def test_odd_counts_are_prefixes(num_columns: int) -> None:
    names = SEEDS, torch.arange(6)
    whole = normal(*names, 8, FLOW_STREAM, torch.float32)
    assert_bitwise(
        normal(*names, num_columns, FLOW_STREAM, torch.float32).contiguous(),
        whole[:, :num_columns].contiguous(),
    )
    assert random_bits(*names, num_columns, FLOW_STREAM).shape == (6, num_columns)
