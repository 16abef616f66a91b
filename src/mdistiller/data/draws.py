"""Random numbers of single images, which follow from a seed and the image's index alone."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_WEYL = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# The same bits as int64, which torch multiplies.
_WEYL_BITS, _FIRST_BITS, _SECOND_BITS = (x - 2**64 for x in (_WEYL, _FIRST, _SECOND))


@dataclass
class Draws:
    """Random numbers for images `index` (int64 [B]), on the device of `index`.

    The k-th number of an image follows from `seed` (0 to 2⁶³ - 1), the image's index and k. The other images
    of a batch, their order and the device have no effect. The numbers of an image are those of SplitMix64
    (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), whose state starts
    at a hash of seed and index.
    """

    seed: int
    index: Tensor
    drawn: int = 0  # numbers of each image so far
    state: Tensor | None = None  # hash of seed and index, from the first draw on

    def uniform(self, *shape: int) -> Tensor:
        """Draws numbers from [0, 1), float32 [*shape, B]."""
        return (self._bits(shape) >> 40 & 0xFFFFFF).float().mul_(2**-24)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Draws integers from 0 to `high` - 1, int64 [*shape, B]; `high` is at most 2³¹."""
        return (self._bits(shape) >> 32 & 0xFFFFFFFF).mul_(high) >> 32

    def _bits(self, shape: tuple[int, ...]) -> Tensor:
        """Draws 64 bits for each number, as int64 [*shape, B]."""
        if self.state is None:
            hashed = mix(self.seed)
            self.state = _mix(self.index * _WEYL_BITS + (hashed - 2**64 if hashed >= 2**63 else hashed))
        count = math.prod(shape)
        number = torch.arange(self.drawn + 1, self.drawn + 1 + count, device=self.index.device)
        self.drawn += count
        return _mix(number[:, None] * _WEYL_BITS + self.state).view(*shape, -1)


def mix(value: int) -> int:
    """Hashes 64 bits, one to one: the output function of SplitMix64."""
    value = (value ^ value >> 30) * _FIRST % 2**64
    value = (value ^ value >> 27) * _SECOND % 2**64
    return value ^ value >> 31


def _mix(bits: Tensor) -> Tensor:
    """Computes `mix` of each number. int64 multiplies as uint64, but its shifts keep the sign."""
    bits = (bits ^ (bits >> 30 & 0x3FFFFFFFF)) * _FIRST_BITS
    bits = (bits ^ (bits >> 27 & 0x1FFFFFFFFF)) * _SECOND_BITS
    return bits ^ (bits >> 31 & 0x1FFFFFFFF)
