"""Rotation, color jitter, vertical flip and random erasing for whole batches on the device.

Draws are tensors on the device, so no step waits for it. Each operation equals torchvision's of the same
draws.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mdistiller.data.config import AugmentConfig
from mdistiller.data.draws import Draws


def draw_changes(config: AugmentConfig, images: Tensor, draws: Draws) -> dict[str, Tensor]:
    """Draws the changes of images [B, H, W, C], on their device, by the fields that switch them on.

    color_jitter: factors of brightness, contrast and saturation, float32 [3, B].
    vertical_flip: whether to mirror top and bottom, bool [B].
    erase: top, left, height and width of a box, int64 [4, B]; height 0: nothing.
    rotation: degrees by which to rotate, float32 [B].
    """
    height, width = images.shape[1:3]
    make: dict[str, Callable[[], Tensor]] = {
        "color_jitter": lambda: 1 + config.color_jitter * (2 * draws.uniform(3) - 1),
        "vertical_flip": lambda: draws.uniform() < 0.5,
        "erase": lambda: _draw_box(config.erase, height, width, draws.uniform(2, 10), draws.uniform(3)),
        "rotation": lambda: config.rotation * (2 * draws.uniform() - 1),
    }
    return {name: draw() for name, draw in make.items() if getattr(config, name)}


def _draw_box(chance: float, height: int, width: int, tries: Tensor, place: Tensor) -> Tensor:
    """Returns boxes with the distribution of torchvision's `RandomErasing`, from ten tries at once."""
    area = height * width * (0.02 + 0.31 * tries[0])
    aspect = torch.exp(math.log(0.3) + math.log(3.3 / 0.3) * tries[1])
    tall, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (tall < height) & (wide < width) & (place[2] < chance)
    return place_box((tall, wide), fits, (height, width), place[:2], fallback=(0, 0))


def place_box(
    sides: Sequence[Tensor], fits: Tensor, size: tuple[int, int], place: Tensor, fallback: tuple[int, int]
) -> Tensor:
    """Places the first try that fits at random; returns top, left, height and width, int64 [4, B].

    `sides` are heights and widths of the tries, float32 [tries, B] each, `fits` bool [tries, B], `size`
    that of the images, `place` numbers from [0, 1), [2, B], `fallback` the size where no try fits.
    """
    first, found = fits.int().argmax(0, keepdim=True), fits.any(0)
    tried = (side.gather(0, first)[0] for side in sides)
    tall, wide = (torch.where(found, x, other) for x, other in zip(tried, fallback, strict=True))
    room = torch.stack([size[0] - tall, size[1] - wide])
    # The product can round up to room + 1.
    offset = torch.minimum((place * (room + 1)).floor(), room)
    return torch.cat([offset, tall[None], wide[None]]).long()


def jitter_colors(images: Tensor, factors: Tensor) -> Tensor:
    """Changes brightness, then contrast, then saturation of uint8 [B, H, W, 3] by factors [3, B]."""
    brightness, contrast, saturation = factors[:, :, None, None, None]
    images = _to_bytes(images * brightness)
    images = _blend(images, gray(images, -1).mean((1, 2, 3), keepdim=True), contrast)
    return _blend(images, gray(images, -1), saturation)


def gray(images: Tensor, channels: int) -> Tensor:
    """Computes the gray values of uint8 images, float32, whole numbers; `channels` keeps one entry."""
    red, green, blue = images.unbind(channels)
    values = red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)
    return values.floor_().unsqueeze(channels)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    # Not by torch.addcmul as in the policies: it rounds once, which changes some pixels by one level.
    return _to_bytes(images * factor + other * (1 - factor))


def _to_bytes(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).to(torch.uint8)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotates images [B, H, W, C] counter-clockwise by degrees [B] around the center, black outside."""
    _, height, width, _ = images.shape
    angle = (degrees.double() % 360).deg2rad()
    zero = torch.zeros_like(angle)
    cosine, sine = angle.cos(), angle.sin()
    rows = (
        torch.stack([cosine, -sine, zero], -1) * (2 / width),
        torch.stack([sine, cosine, zero], -1) * (2 / height),
    )
    rotated = sample_nearest(images.permute(0, 3, 1, 2), torch.stack(rows, 1).float())
    return rotated.permute(0, 2, 3, 1).contiguous()


def sample_nearest(images: Tensor, source: Tensor) -> Tensor:
    """Takes each pixel of images [B, C, H, W] from the nearest one at its source, black outside.

    The sources are affine maps of x and y, in pixels from the center, to half image sizes, float32 [B, 2, 3].
    """
    _, _, height, width = images.shape
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device) - (height - 1) / 2
    by_x, by_y, constant = source[:, None, None].unbind(-1)  # [B, 1, 1, 2]
    grid = torch.addcmul(by_x * x[:, None], by_y, y[:, None, None]) + constant
    return F.grid_sample(images.float(), grid, mode="nearest", align_corners=False).to(images.dtype)


def flip_vertically(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirrors top and bottom of the chosen images [B, H, W, C]."""
    return torch.where(chosen[:, None, None, None], images.flip(1), images)


def erase(images: Tensor, box: Tensor) -> Tensor:
    """Sets boxes (int64 [4, B]) of normalized images [B, C, H, W] to zero, the mean color."""
    first, size = box[:2], box[2:]
    return images.masked_fill(inside(first, first + size, images)[:, None], 0.0)


def inside(first: Tensor, end: Tensor, images: Tensor) -> Tensor:
    """Returns masks bool [B, H, W] of boxes in images [B, C, H, W].

    `first` has top and left, `end` bottom and right, which are outside; int64 [2, B].
    """
    masks = []
    for low, high, length in zip(first[:, :, None], end[:, :, None], images.shape[2:], strict=True):
        axis = torch.arange(length, device=images.device)
        masks.append((axis >= low) & (axis < high))
    rows, columns = masks
    return rows[:, :, None] & columns[:, None, :]


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rotation": rotate,
    "color_jitter": jitter_colors,
    "vertical_flip": flip_vertically,
}
"""Changes of uint8 images by `draw_changes`, in the order of their application."""
