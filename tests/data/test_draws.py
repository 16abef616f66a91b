"""Random numbers of single images: against SplitMix64 in plain Python, and their distribution."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from mdistiller.data.draws import Draws
from mdistiller.seeding import derive_seed

MASK = 2**64 - 1


def splitmix64(state):
    """Sebastiano Vigna's public-domain splitmix64.c."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


def start(seed, index):
    """The state of an image: the number `index` of the generator that starts at the hash of the seed."""
    hashed = next(splitmix64(seed - 0x9E3779B97F4A7C15))
    return next(splitmix64((hashed + (index - 1) * 0x9E3779B97F4A7C15) & MASK))


def test_the_reference_is_vignas():
    numbers = splitmix64(1234567)  # values published with the generator's ports, such as Rosetta Code's
    assert [next(numbers) for _ in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, derive_seed(5, 2, 0, 1)])
def test_numbers_are_splitmix64s(seed):
    index = [0, 1, 7, 49_999, 2**40]
    draws = Draws(seed, torch.tensor(index))
    uniform, integers, last = draws.uniform(2, 3), draws.integers(9, 4), draws.uniform()
    assert (uniform.shape, integers.shape, last.shape) == ((2, 3, 5), (4, 5), (5,))
    assert (uniform.dtype, integers.dtype) == (torch.float32, torch.int64)
    for i, image in enumerate(index):
        numbers = splitmix64(start(seed, image))
        assert uniform[..., i].flatten().tolist() == [(next(numbers) >> 40) / 2**24 for _ in range(6)]
        assert integers[:, i].tolist() == [(next(numbers) >> 32) * 9 >> 32 for _ in range(4)]
        assert last[i].item() == (next(numbers) >> 40) / 2**24


def test_an_image_has_its_numbers_in_any_batch():
    whole = Draws(3, torch.arange(50))
    first, second = whole.uniform(4), whole.integers(162)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    for part in order.split(7):
        draws = Draws(3, part)
        assert torch.equal(draws.uniform(4), first[:, part])
        assert torch.equal(draws.integers(162), second[part])


@pytest.mark.parametrize("high", [2, 9, 162, 1000])
def test_integers_are_equally_likely(high):
    found = Draws(8, torch.arange(200_000)).integers(high)
    assert (found.min(), found.max()) == (0, high - 1)
    assert chisquare(found.bincount(minlength=high).numpy()).pvalue > 1e-3


def test_uniform_numbers_are_uniform():
    found = Draws(8, torch.arange(50_000)).uniform(3)
    assert found.min() >= 0
    assert found.max() < 1
    for row in found.numpy():
        assert kstest(row, "uniform").pvalue > 1e-3


def pairs():
    """Pairs of numbers that must have nothing to do with each other."""
    index = torch.arange(100_000)
    first = Draws(8, index)
    a, b = first.integers(16, 2)
    yield "draws of an image", a, b
    yield "neighbors", a[:-1], a[1:]
    yield "neighbors, crosswise", a[:-1], b[1:]
    yield "seeds", a, Draws(9, index).integers(16)
    for name, other in (("views", (0, 4, 0, 1)), ("methods' views", (0, 3, 1, 1)), ("runs", (1, 3, 0, 1))):
        yield name, *(Draws(derive_seed(*parts), index).integers(16) for parts in ((0, 3, 0, 1), other))


def test_numbers_are_independent():
    for name, a, b in pairs():
        both = (16 * a + b).bincount(minlength=256).numpy()
        assert chisquare(both).pvalue > 1e-3, name
        assert abs(np.corrcoef(a.numpy(), b.numpy())[0, 1]) < 0.015, name


def test_each_bit_is_even():
    bits = Draws(1, torch.arange(20_000))._bits((2,))
    for bit in range(64):
        share = (bits >> bit & 1).double().mean().item()
        assert abs(share - 0.5) < 0.01, bit


def test_global_generators_stay():
    state = torch.get_rng_state()
    Draws(0, torch.arange(4)).uniform(2)
    assert torch.equal(state, torch.get_rng_state())
