"""AutoAugment, RandAugment, TrivialAugment and FixMatch's strong view for whole batches on the device.

A policy is a table of changes, each a kind with a strength. The changes of every image are drawn on the
device, and each kind is applied at once to all images that drew it, so no step waits for the device.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mdistiller.data.config import PolicyName
from mdistiller.data.draws import Draws
from mdistiller.data.photometric import gray, inside, sample_nearest

_FINDS_ROWS = ("cpu",)  # on other devices, a search for the images with a change would wait for the device
_SIGNED = (
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness"),
)
_RANDOM = ("Identity", *_SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize")
# Changes of FixMatch's strong view with the ranges of their strengths (Sohn et al.: "FixMatch: Simplifying
# Semi-Supervised Learning with Consistency and Confidence", NeurIPS 2020, appendix), as in the code of MLKD,
# LSKD and CRLD: bits, degrees, a threshold, pixels per pixel, fractions of the side, weights of the image.
_RANGES = {
    **dict.fromkeys(("Identity", "AutoContrast", "Equalize"), (0.0, 0.0)),
    **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), (0.05, 0.95)),
    **dict.fromkeys(("ShearX", "ShearY", "TranslateX", "TranslateY"), (-0.3, 0.3)),
    **{"Posterize": (4.0, 8.0), "Rotate": (-30.0, 30.0), "Solarize": (0.0, 256.0)},
}
_LEVELS = 512  # strengths in a range, the middles of equal parts, each within a thousandth of the whole range
_CUTOUT = 0.5  # largest side of the box, as a fraction of the width
_FILL = (125, 123, 114)


class _Slot(NamedTuple):
    """Change with its probability and its strength in its own unit."""

    name: str
    chance: float
    strength: float


class _Changes(NamedTuple):
    """Changes, one per row."""

    kind: Tensor  # index in _KINDS, or -1 for the identity, int64 [R]
    amount: Tensor  # weight of the image in a blend, mask of the bits to keep, or threshold, float32 [R]
    rest: Tensor  # weight of the other image in a blend, float32 [R]
    source: Tensor  # affine map of x and y, in pixels from the center, to half image sizes, float32 [R, 2, 3]

    def of(self, rows: Tensor) -> "_Changes":
        return _Changes(*(column[rows] for column in self))


class Policy:
    """Policy for images of one size on one device.

    Changes, strengths and their order are those of torchvision: AutoAugment for CIFAR-10 (Cubuk et al., CVPR
    2019), RandAugment with two changes of strength 9 of 30, TrivialAugment with the wide space of 31
    strengths; nearest-neighbor interpolation, black outside of the image. Sizes are in pixels.

    FixMatch's strong view has two of 14 changes, each of a strength drawn for the image, and then a gray box
    with a side of up to half the width. Its changes are PIL's, but for one level of 255 in Color, Contrast
    and AutoContrast, and for pixels between two that Rotate and the shears round to the other one.
    """

    def __init__(self, name: PolicyName, height: int, width: int, device: torch.device) -> None:
        rows = _rows(name, height, width)
        self.rounds = 2 if name in ("randaugment", "fixmatch") else 1
        self.cutout = torch.tensor([[height], [width]], device=device) if name == "fixmatch" else None
        self.chance = torch.tensor([[slot.chance for slot in row] for row in rows], device=device)
        # Change 0 is the identity. Then follow the slots of each row, and both signs of each slot; the ranges
        # of FixMatch have both signs already.
        self.signs = 1 if name == "fixmatch" else 2
        slots = [_Slot("Identity", 0.0, 0.0)]
        for slot in (slot for row in rows for slot in row):
            other = slot._replace(strength=-slot.strength) if slot.name in _SIGNED else slot
            slots += [slot, other][: self.signs]
        columns = zip(*(_change(slot, height, width) for slot in slots), strict=True)
        kind, amount, rest, source = (torch.tensor(column) for column in columns)
        source /= torch.tensor([[width / 2], [height / 2]])
        self.changes = _Changes(*(x.to(device) for x in (kind, amount, rest, source)))

    def draw(self, draws: Draws) -> Tensor:
        """Draws the numbers of the changes of the images, in order, int64 [B, changes].

        With a cutout, top, left, bottom and right of the box follow, the last row and column included.
        """
        rows, slots = self.chance.shape
        row = draws.integers(rows, self.rounds, 1).expand(-1, slots, -1)
        slot = torch.arange(slots, device=self.chance.device)[:, None]
        sign, chance = draws.uniform(2, self.rounds, slots)
        number = 1 + self.signs * (row * slots + slot) + (sign < 0.5) * (self.signs - 1)
        numbers = torch.where(chance < self.chance[row, slot], number, 0).flatten(0, 1).T
        if self.cutout is None:
            return numbers
        return torch.cat([numbers, _draw_cutout(self.cutout, draws.uniform(3))], 1)

    def apply(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Applies the changes from `draw` to images uint8 [B, H, W, 3]; same dtype and shape."""
        images = images.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        for column in numbers[:, : self.rounds * self.chance.shape[1]].unbind(1):
            drawn = self.changes.of(column)
            for kind, change in enumerate(_KINDS.values()):
                chosen = drawn.kind == kind
                if images.device.type not in _FINDS_ROWS:
                    images.copy_(torch.where(chosen[:, None, None, None], change(images, drawn), images))
                elif len(rows := chosen.nonzero().squeeze(1)):
                    images[rows] = change(images[rows], drawn.of(rows))
        if self.cutout is not None:
            images = _cut_out(images, numbers[:, -4:])
        return images.permute(0, 2, 3, 1).contiguous()


# The table of a policy is built and sent to the device once.
get_policy = cache(Policy)


def _rows(name: PolicyName, height: int, width: int) -> list[list[_Slot]]:
    """Returns the equally likely rows of a policy, each a sequence of changes for one image."""
    if name == "autoaugment":
        from torchvision.transforms import AutoAugment, AutoAugmentPolicy  # takes a second

        return [
            [_Slot(change, p, _strengths(change, 10, height, width)[level or 0]) for change, p, level in row]
            for row in AutoAugment(AutoAugmentPolicy.CIFAR10).policies
        ]
    if name == "fixmatch":
        return [
            [_Slot(change, 1.0, _in_slot_units(change, low + (high - low) * middle, height, width))]
            for change, (low, high) in _RANGES.items()
            for middle in ((i + 0.5) / _LEVELS for i in range(_LEVELS))
        ]
    wide = name == "trivialaugment"
    chosen = slice(None) if wide else slice(9, 10)
    return [
        [_Slot(change, 1.0, strength)]
        for change in _RANDOM
        for strength in _strengths(change, 31, height, width, wide=wide)[chosen]
    ]


def _strengths(name: str, count: int, height: int, width: int, *, wide: bool = False) -> list[float]:
    """Returns the strengths of a change in its own unit, weakest first; zeros for a change without one."""
    if name == "Posterize":  # bits
        lost = torch.arange(count) / ((count - 1) / (6 if wide else 4))
        return (8 - lost).round().tolist()
    if name == "Solarize":  # threshold, from white to black
        return torch.linspace(1, 0, count).tolist()
    if name.startswith("Shear"):  # pixels per pixel
        top = 0.99 if wide else 0.3
    elif name.startswith("Translate"):  # pixels
        top = 32.0 if wide else 150 / 331 * (width if name.endswith("X") else height)
    elif name == "Rotate":  # degrees
        top = 135.0 if wide else 30.0
    elif name in _SIGNED:  # added to a weight of 1
        top = 0.99 if wide else 0.9
    else:
        top = 0.0
    return torch.linspace(0, top, count).tolist()


def _in_slot_units(name: str, strength: float, height: int, width: int) -> float:
    """Converts a strength in the unit of `_RANGES` to the unit of `_Slot`."""
    if name.startswith("Translate"):  # the content moves against the sign, by whole pixels
        return -math.floor(strength * (width if name.endswith("X") else height) + 0.5)
    if name == "Solarize":
        return strength / 255
    return strength - 1 if name in ("Brightness", "Color", "Contrast", "Sharpness") else strength


def _draw_cutout(size: Tensor, uniform: Tensor) -> Tensor:
    """Returns boxes, int64 [B, 4], from three numbers in [0, 1) for each image, [3, B].

    The size, height and width, is int64 [2, 1]. As in the code of MLKD, a box that would begin outside of the
    image is moved inside, and one that would end outside is cut off.
    """
    side = _CUTOUT * size[1] * uniform[0]
    first = (size * uniform[1:] - side / 2).clamp(min=0).long()
    return torch.cat([first, torch.minimum(first + side.long(), size - 1)]).T


def _cut_out(images: Tensor, box: Tensor) -> Tensor:
    """Sets boxes (int64 [B, 4]) of images uint8 [B, 3, H, W] to gray."""
    mask = inside(box.T[:2], box.T[2:] + 1, images)
    channels = zip(images.unbind(1), _FILL, strict=True)
    return torch.stack([channel.masked_fill(mask, value) for channel, value in channels], 1)


def _change(slot: _Slot, height: int, width: int) -> tuple[int, float, float, list[list[float]]]:
    name, strength = slot.name, slot.strength
    amount = rest = 0.0
    x, y = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]
    kinds = list(_KINDS)
    kind = -1 if name == "Identity" else kinds.index(name if name in kinds else "Affine")
    if name == "ShearX":  # the upper edge is fixed; in ShearY, the left one
        x = [1.0, strength, strength * height / 2]
    elif name == "ShearY":
        y = [strength, 1.0, strength * width / 2]
    elif name == "TranslateX":
        x[2] = -float(int(strength))
    elif name == "TranslateY":
        y[2] = -float(int(strength))
    elif name == "Rotate":
        angle = math.radians(strength % 360)  # torchvision's rounding, for pixels halfway between two
        cosine, sine = math.cos(angle), math.sin(angle)
        x, y = [cosine, -sine, 0.0], [sine, cosine, 0.0]
    elif name == "Posterize":
        amount = float(256 - 2 ** (8 - int(strength)))
    elif name == "Solarize":
        amount = 255 * strength
    elif name in _SIGNED:
        amount = 1 + strength
        rest = 1 - amount
    return kind, amount, rest, [x, y]


def _blend(images: Tensor, other: Tensor, drawn: _Changes) -> Tensor:
    """Computes amount · images + rest · other, clamped to 0 to 255."""
    amount, rest = (x[:, None, None, None] for x in (drawn.amount, drawn.rest))
    return torch.addcmul(images * amount, rest, other).clamp_(0, 255).to(torch.uint8)


def _sharpness(images: Tensor, drawn: _Changes) -> Tensor:
    if min(images.shape[2:]) <= 2:
        return images
    kernel = torch.ones(3, 3, device=images.device)
    kernel[1, 1] = 5  # integers are exact in any precision
    sharp = images.float()
    inner = sharp[:, :, 1:-1, 1:-1]  # the edge pixels stay
    smooth = F.conv2d(sharp, kernel.expand(3, 1, 3, 3), groups=3).div_(13).round_()
    inner.addcmul_(drawn.rest[:, None, None, None], smooth.sub_(inner))
    return sharp.clamp_(0, 255).to(torch.uint8)


def _autocontrast(images: Tensor, drawn: _Changes) -> Tensor:
    from torchvision.transforms.v2 import functional  # takes a second

    return functional.autocontrast(images)


def _equalize(images: Tensor, drawn: _Changes) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.equalize(images)


_Change = Callable[[Tensor, _Changes], Tensor]
# Kinds of change: functions of images uint8 [B, 3, H, W] and their drawn changes, to images of that form.
_KINDS: dict[str, _Change] = {
    "Brightness": lambda x, drawn: (x * drawn.amount[:, None, None, None]).clamp_(0, 255).to(torch.uint8),
    "Color": lambda x, drawn: _blend(x, gray(x, 1), drawn),
    "Contrast": lambda x, drawn: _blend(x, gray(x, 1).mean((1, 2, 3), keepdim=True), drawn),
    "Sharpness": _sharpness,
    "Posterize": lambda x, drawn: x & drawn.amount.to(torch.uint8)[:, None, None, None],
    "Solarize": lambda x, drawn: torch.where(x >= drawn.amount[:, None, None, None], 255 - x, x),
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": lambda x, drawn: 255 - x,
    "Affine": lambda x, drawn: sample_nearest(x, drawn.source),
}
