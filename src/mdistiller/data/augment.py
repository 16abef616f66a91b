"""Augmentation of whole batches on the device."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.data.config import AugmentConfig
from mdistiller.data.dataset import PerChannel, as_pixels, check_pixels
from mdistiller.data.draws import Draws
from mdistiller.data.photometric import OPERATIONS, draw_changes, erase, place_box
from mdistiller.data.policy import Policy, get_policy
from mdistiller.errors import ConfigError
from mdistiller.types import IGNORED, Batch, Line


class Mix(NamedTuple):
    """Blend of a batch with a permutation of itself."""

    keep: Tensor  # weight of the own image, float32 [H, W]; mixup: constant, CutMix: 0 in a box, 1 elsewhere
    weight: Tensor  # of the own label, float32 scalar
    partner: Tensor  # index of the other image, int64 [B]


class Draw(NamedTuple):
    """Random choices for a batch; `top` and `left` are the offset of the crop in the padded image."""

    top: Tensor  # int64 [B], 0 to 2 * padding
    left: Tensor  # as top
    flip: Tensor  # whether to mirror, bool [B]
    box: Tensor | None = None  # top, left, height and width of a crop to scale back, int64 [4, B]
    changes: Tensor | None = None  # of a policy, int64 [B, changes], see `Policy.draw`
    mix: Mix | None = None
    other: Mapping[str, Tensor] = {}  # see `draw_changes`


class Augment(nn.Module):
    """Augmentation in training mode, and normalization in any mode.

    In training mode each image gets its own crop and flip, then its own changes from a policy, its rotation,
    changes of colors, of top and bottom, and an erased box. The crop is taken after padding with black, all
    `(2 * padding + 1)² * 2` crops and flips equally likely, or is scaled
    back. Mixup or CutMix then blend the batch with a permutation of itself, which makes the labels float
    [B, classes]. Everything random is a tensor on the device, so no step waits for the device. `mean` and
    `std` are those of each channel, for images scaled to [0, 1]. `memory_format` is that of the results,
    channels last or contiguous.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        config: AugmentConfig,
        mean: PerChannel,
        std: PerChannel,
        num_classes: int,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        super().__init__()
        check_colors(config, len(mean), "color_jitter", "policy")
        self.config, self.num_classes, self.memory_format = config, num_classes, memory_format
        # Not persistent, because these constants belong to the configuration and not to checkpoints.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    def forward(
        self,
        batch: Batch,
        draws: Draws | None = None,
        generator: torch.Generator | None = None,
        *,
        strong: bool = False,
    ) -> Batch:
        """Augments and normalizes a batch.

        Args:
            batch: image as in an `ImageSet` (otherwise ValueError), label int64 [B] or float [B, classes].
            draws: Random numbers of the batch's images. None: new ones from torch's default generator.
            generator: Source of mixup and CutMix, on the device of the batch. None: its default generator.
            strong: Apply `strong_policy` instead of `policy`.

        Returns:
            image float32 [B, C, H, W] in the memory format; label unchanged, or float32 [B, classes] if
            mixed; index unchanged.
        """
        image = batch.image
        check_pixels(image, "image", len(self.mean))
        if not self.training:
            return batch._replace(image=self.normalize(image))
        if draws is None:
            draws = Draws(int(torch.randint(2**63 - 1, ())), batch.index)
        return self.change([batch], [self.draw(image, draws, generator, strong=strong)], strong=strong)[0]

    def change(self, batches: Sequence[Batch], draws: Sequence[Draw], *, strong: bool = False) -> list[Batch]:
        """Applies each batch's result of `draw`, with the same `strong`, as `forward`, all at once."""
        images = batches[0].image if len(batches) == 1 else torch.cat([batch.image for batch in batches])
        boxes = [draw.box for draw in draws if draw.box is not None]
        if boxes:
            images = _crop_and_scale(images, torch.cat(boxes, 1))
        if self.variants(images) > 1:
            top, left, flip = map(torch.cat, zip(*(draw[:3] for draw in draws), strict=True))
            images = self._crop(images, top, left, flip)
        changes = [draw.changes for draw in draws if draw.changes is not None]
        if changes and (policy := self._policy(images, strong)) is not None:
            images = policy.apply(images, torch.cat(changes))
        other = {name: torch.cat([draw.other[name] for draw in draws], -1) for name in draws[0].other}
        for name, change in OPERATIONS.items():
            if name in other:
                images = change(images, other[name])
        normalized = self.normalize(images)
        if "erase" in other:
            normalized = erase(normalized, other["erase"])
        pieces = normalized.split([len(batch.image) for batch in batches])
        changed = []
        for batch, image, draw in zip(batches, pieces, draws, strict=True):
            label = batch.label
            if draw.mix is not None:
                image, label = self._mix(image, label, draw.mix)
            changed.append(Batch(image, label, batch.index))
        return changed

    def _padding(self, images: Tensor) -> int:
        if self.config.crop == "resized":
            return 0
        return images.shape[1] // 8 if self.config.padding is None else self.config.padding

    def variants(self, images: Tensor) -> int:
        """Counts the equally likely padded crops and flips of images [B, H, W, C]: 162 for CIFAR."""
        return (2 * self._padding(images) + 1) ** 2 * (2 if self.config.flip else 1)

    def variant(self, images: Tensor, draw: Draw) -> Tensor:
        """Numbers each image's crop and flip, int64 [B], from 0 to `variants(images)` - 1."""
        number = draw.top * (2 * self._padding(images) + 1) + draw.left
        return 2 * number + draw.flip if self.config.flip else number

    def settings(self, *, strong: bool = False) -> Line:
        """Returns the settings on which an image of a weak or strong view depends, as plain values."""
        unused = {"strong_policy", "mixup_alpha", "cutmix_alpha", "seed"}
        policy = self.config.strong_policy if strong else self.config.policy
        return {**self.config.model_dump(mode="json", exclude=unused), "policy": policy}

    def is_countable(self, *, strong: bool = False) -> bool:
        """Whether a padded crop and a flip, `variant`, are all that happens to an image."""
        plain = AugmentConfig(flip=self.config.flip, crop="padded", padding=self.config.padding)
        own = self.settings(strong=strong)
        return all(
            value == own[name] for name, value in plain.model_dump(mode="json", include=set(own)).items()
        )

    def draw(
        self, images: Tensor, draws: Draws, generator: torch.Generator | None = None, *, strong: bool = False
    ) -> Draw:
        """Draws all random choices for images [B, H, W, C], on their device; arguments as `forward`."""
        offsets = 2 * self._padding(images) + 1
        top, left = draws.integers(offsets, 2)
        flip = draws.integers(2).bool() if self.config.flip else torch.zeros_like(top, dtype=torch.bool)
        box = _draw_box(images, self.config.scale, draws) if self.config.crop == "resized" else None
        policy = self._policy(images, strong)
        changes = None if policy is None else policy.draw(draws)
        mix = self._draw_mix(images, generator)
        return Draw(top, left, flip, box, changes, mix, draw_changes(self.config, images, draws))

    def _policy(self, images: Tensor, strong: bool) -> Policy | None:
        name = self.config.strong_policy if strong else self.config.policy
        return None if name == "none" else get_policy(name, *images.shape[1:3], images.device)

    def _crop(self, images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        count, height, width, _ = images.shape
        padding, device = self._padding(images), images.device
        if padding == 0:
            return _flip(images, flip)
        padded = F.pad(images, (0, 0, padding, padding, padding, padding))
        sample = torch.arange(count, device=device)[:, None, None]
        row = torch.arange(height, device=device) + top[:, None]
        column = torch.arange(width, device=device)
        column = torch.where(flip[:, None], column.flip(0), column) + left[:, None]
        return padded[sample, row[:, :, None], column[:, None, :]]

    def normalize(self, images: Tensor) -> Tensor:
        """Scales pixels [..., H, W, C] to [0, 1], subtracts mean, divides by std: float32 [..., C, H, W]."""
        if self.memory_format == torch.channels_last:
            pixels = images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
            return pixels.div_(255).sub_(self.mean).div_(self.std).movedim(-1, -3)
        # Planes first: then each operation has one number for a whole plane.
        planes = images.movedim(-1, -3)
        planes = planes.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        return planes.div_(255).sub_(self.mean[:, None, None]).div_(self.std[:, None, None])

    def _draw_mix(self, images: Tensor, generator: torch.Generator | None) -> Mix | None:
        count, height, width, _ = images.shape
        device, config = images.device, self.config
        if not (config.mixup_alpha or config.cutmix_alpha):
            return None
        uniform = partial(torch.rand, device=device, generator=generator)

        def beta(alpha: float) -> Tensor:
            gammas = torch._standard_gamma(torch.full((2,), float(alpha), device=device), generator=generator)
            return gammas[0] / gammas.sum()

        if config.mixup_alpha:
            keep = weight = beta(config.mixup_alpha)
            keep = keep.expand(height, width)
        if config.cutmix_alpha:
            outside = ~_box(1 - beta(config.cutmix_alpha), uniform(2), height, width)
            share = outside.float().mean()
            if config.mixup_alpha:  # one of the two at random
                cut = uniform(()) < 0.5
                keep, weight = torch.where(cut, outside.float(), keep), torch.where(cut, share, weight)
            else:
                keep, weight = outside.float(), share
        # randperm can wait for the device, a sort of noise does not.
        return Mix(keep, weight, uniform(count).argsort())

    def _mix(self, image: Tensor, label: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
        keep, weight, partner = mix
        mixed = keep * image + (1 - keep) * image[partner]
        if not label.is_floating_point():
            one_hot = torch.zeros(len(label), self.num_classes, device=label.device)
            known = (label != IGNORED).float()  # an image without a class has a row of zeros
            label = one_hot.scatter_(1, label.clamp(min=0)[:, None], known[:, None])
        return mixed, weight * label + (1 - weight) * label[partner]


def check_colors(config: AugmentConfig, channels: int, *names: str) -> None:
    """Raises ConfigError if a field by name changes the colors of images that are not RGB."""
    for name in names if channels != 3 else ():
        if (value := getattr(config, name)) not in (0, "none"):
            off = "'none'" if isinstance(value, str) else 0
            raise ConfigError(
                f"augment.{name}: got {value!r}, for RGB; of {channels} channels allowed: {off}"
            )


def _flip(images: Tensor, flip: Tensor) -> Tensor:
    """Mirrors those of [B, H, W, C] for which `flip` (bool [B]) holds; planes are first in memory."""
    planes = images.movedim(-1, 1).contiguous()  # rows of one color are mirrored six times as fast
    if images.device.type != "cpu":
        return torch.where(flip[:, None, None, None], planes.flip(3), planes).movedim(1, -1)
    for plane, is_flipped in zip(planes, flip.tolist(), strict=True):  # fresh memory takes most of the time
        if is_flipped:
            plane.copy_(plane.flip(2))
    return planes.movedim(1, -1)


def _draw_box(images: Tensor, scale: tuple[float, float], draws: Draws) -> Tensor:
    """Draws crops with the distribution of torchvision's `RandomResizedCrop`.

    Its ten tries are made at once. If none fits, which is rare, the crop is the whole square image. Returns
    top, left, height and width, int64 [4, B].
    """
    _, height, width, _ = images.shape
    tries = draws.uniform(2, 10)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * tries[0])
    aspect = torch.exp(math.log(4 / 3) * (2 * tries[1] - 1))
    tall, wide = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (tall > 0) & (tall <= height) & (wide > 0) & (wide <= width)
    size = (height, width)
    return place_box((tall, wide), fits, size, draws.uniform(2), fallback=size)


def _crop_and_scale(images: Tensor, box: Tensor) -> Tensor:
    """Crops boxes (int64 [4, B]) from images [B, H, W, C] and scales them back, bilinear; same shape."""
    _, height, width, _ = images.shape

    def source(length: int, start: Tensor, size: Tensor) -> Tensor:
        """Returns the source of each output pixel, [B, length], from -1 to 1 over the image."""
        middle = torch.arange(length, device=images.device) + 0.5
        inside = (middle * (size / length)[:, None]).clamp(min=0.5).minimum(size[:, None] - 0.5)
        return (start[:, None] + inside) * (2 / length) - 1

    top, left, tall, wide = box
    y, x = source(height, top, tall), source(width, left, wide)
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], -1)
    scaled = F.grid_sample(images.permute(0, 3, 1, 2).float(), grid, mode="bilinear", align_corners=False)
    return as_pixels(scaled, images.dtype).permute(0, 2, 3, 1).contiguous()


def _box(area: Tensor, center: Tensor, height: int, width: int) -> Tensor:
    """Returns a mask (bool [height, width]) of a box of relative `area` around `center` ([2], in [0, 1))."""

    def inside(length: int, position: Tensor) -> Tensor:
        half = (length * area.sqrt()).long() // 2
        middle, axis = (position * length).long(), torch.arange(length, device=area.device)
        return (axis >= middle - half) & (axis < middle + half)

    return inside(height, center[0])[:, None] & inside(width, center[1])[None, :]
