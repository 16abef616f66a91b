"""Random numbers of single images, which follow from a seed and the image's index alone."""

import math

import torch
from torch import Tensor

_WEYL = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Draws:
    """Random numbers for images `index` (int64 [B]), on the device of `index`.

    The k-th number of an image follows from `seed` (0 to 2⁶³ - 1), the image's index and k. The other images
    of a batch, their order and the device have no effect. The numbers of an image are those of SplitMix64
    (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), whose state starts
    at a hash of seed and index.
    """

    def __init__(self, seed: int, index: Tensor) -> None:
        self._state = _mix(index * _signed(_WEYL) + _signed(mix(seed)))
        self._drawn = 0

    def uniform(self, *shape: int) -> Tensor:
        """Draws numbers from [0, 1), float32 [*shape, B]."""
        return (self._bits(shape) >> 40 & 0xFFFFFF).float().mul_(2**-24)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Draws integers from 0 to `high` - 1, int64 [*shape, B]; `high` is at most 2³¹."""
        return (self._bits(shape) >> 32 & 0xFFFFFFFF).mul_(high) >> 32

    def _bits(self, shape: tuple[int, ...]) -> Tensor:
        """Draws 64 bits for each number, as int64 [*shape, B]."""
        count, device = math.prod(shape), self._state.device
        number = torch.arange(self._drawn + 1, self._drawn + 1 + count, device=device)
        self._drawn += count
        return _mix(number[:, None] * _signed(_WEYL) + self._state).view(*shape, -1)


def mix(value: int) -> int:
    """Hashes 64 bits, one to one: the output function of SplitMix64."""
    value = (value ^ value >> 30) * _FIRST % 2**64
    value = (value ^ value >> 27) * _SECOND % 2**64
    return value ^ value >> 31


def _mix(bits: Tensor) -> Tensor:
    """Computes `mix` of each number. int64 multiplies as uint64, but its shifts keep the sign."""
    bits = (bits ^ (bits >> 30 & 0x3FFFFFFFF)) * _signed(_FIRST)
    bits = (bits ^ (bits >> 27 & 0x1FFFFFFFFF)) * _signed(_SECOND)
    return bits ^ (bits >> 31 & 0x1FFFFFFFF)


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits
