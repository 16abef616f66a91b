"""Augmentation of whole batches on their device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from mdistiller.data.config import AugmentConfig
from mdistiller.data.dataset import Triple
from mdistiller.types import Batch


class Draw(NamedTuple):
    """The random choices for a batch: one crop and flip for each image.

    top, left: int64 [B], offset of the crop in the padded image, 0 to 2 * padding.
    flip: bool [B].
    """

    top: Tensor
    left: Tensor
    flip: Tensor


_POLICIES: dict[str, Callable[[], Callable[[Tensor], Tensor] | None]] = {
    "none": lambda: None,
    "autoaugment": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    "randaugment": v2.RandAugment,
    "trivialaugment": v2.TrivialAugmentWide,
}


class Augment(nn.Module):
    """Decoded images to normalised network input, randomly changed in training mode.

    In training mode each image gets its own crop after padding with black and its own flip, all
    `(2 * padding + 1)² * 2` variants equally likely; mixup or CutMix then mix the batch with a permutation
    of itself and turn the labels to float [B, classes]. In evaluation mode images are only normalised.

    Args:
        config: what to do.
        mean, std: of each channel, for images scaled to [0, 1].
        num_classes: needed for mixed labels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: AugmentConfig, mean: Triple, std: Triple, num_classes: int) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes
        self.policies = _POLICIES[config.policy](), _POLICIES[config.strong_policy]()
        # Constants of the data, not learnt: they belong to the run's configuration, not to checkpoints.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    def forward(
        self,
        batch: Batch,
        generator: torch.Generator | None = None,
        *,
        strong: bool = False,
        draw: Draw | None = None,
    ) -> Batch:
        """Augment and normalise.

        Args:
            batch: image uint8 [B, H, W, 3], label int64 [B].
            generator: of the random choices, on the batch's device. None: the device's default one.
                Policies draw from the CPU's default one instead, as torchvision's code does.
            strong: apply `strong_policy` in place of `policy`.
            draw: the crops and flips of training mode. None: they are drawn here.

        Returns:
            image float32 [B, 3, H, W] in channels-last memory; label as given, or float32 [B, classes]
            when mixed; index as given.
        """
        image, label, index = batch
        if image.dtype != torch.uint8 or image.ndim != 4 or image.shape[-1] != 3:
            raise ValueError(f"image: got {image.dtype} {tuple(image.shape)}, need uint8 [B, H, W, 3]")
        if self.training and self.variants(image) > 1:
            image = self.apply_draw(image, self.draw(image, generator) if draw is None else draw)
        policy = self.policies[strong]
        if self.training and policy is not None:
            changed = torch.stack([policy(one) for one in image.permute(0, 3, 1, 2)])
            image = changed.permute(0, 2, 3, 1).contiguous()
        image = self.normalise(image)
        if self.training and (self.config.mixup_alpha or self.config.cutmix_alpha):
            image, label = self._mix(image, label, generator)
        return Batch(image.permute(0, 3, 1, 2), label, index)

    def _padding(self, images: Tensor) -> int:
        return images.shape[1] // 8 if self.config.padding is None else self.config.padding

    def variants(self, images: Tensor) -> int:
        """How many crops and flips an image of [B, H, W, 3] has, all equally likely: 162 for CIFAR."""
        return (2 * self._padding(images) + 1) ** 2 * (2 if self.config.flip else 1)

    def variant(self, images: Tensor, draw: Draw) -> Tensor:
        """The number of each image's crop and flip, int64 [B], from 0 to `variants(images)` - 1."""
        number = draw.top * (2 * self._padding(images) + 1) + draw.left
        return 2 * number + draw.flip if self.config.flip else number

    def draw_of(self, images: Tensor, variant: int) -> Draw:
        """The crop and flip with a number, for all of `images`: the inverse of `variant`."""
        number, flip = divmod(variant, 2) if self.config.flip else (variant, 0)
        top, left = divmod(number, 2 * self._padding(images) + 1)
        full = torch.full((len(images),), top, device=images.device)
        return Draw(full, torch.full_like(full, left), torch.full_like(full, flip, dtype=torch.bool))

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Draw:
        """Crops and flips for `images` ([B, H, W, 3]), on their device."""
        shape, offsets = (len(images),), 2 * self._padding(images) + 1

        def integers(high: int) -> Tensor:
            return torch.randint(high, shape, device=images.device, generator=generator)

        top, left = integers(offsets), integers(offsets)
        flip = integers(2).bool() if self.config.flip else torch.zeros_like(top, dtype=torch.bool)
        return Draw(top, left, flip)

    def apply_draw(self, images: Tensor, draw: Draw) -> Tensor:
        """Pad with black, crop to the old size and flip as `draw` says: [B, H, W, 3], same type."""
        count, height, width, _ = images.shape
        padding, device = self._padding(images), images.device
        padded = F.pad(images, (0, 0, padding, padding, padding, padding))
        sample = torch.arange(count, device=device)[:, None, None]
        row = torch.arange(height, device=device) + draw.top[:, None]
        column = torch.arange(width, device=device)
        column = torch.where(draw.flip[:, None], column.flip(0), column) + draw.left[:, None]
        return padded[sample, row[:, :, None], column[:, None, :]]

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] to float32 of the same shape: scaled to [0, 1], less mean, over std."""
        return images.float().div_(255).sub_(self.mean).div_(self.std)

    def _mix(self, image: Tensor, label: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Blend [B, H, W, 3] and one-hot labels with a permutation of the batch.

        Everything random is a tensor on the device, the choice between mixup and CutMix too: a `keep`
        mask [H, W] serves both, constant for mixup, one less a box for CutMix.
        """
        count, height, width, _ = image.shape
        device, config = image.device, self.config

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, device=device, generator=generator)

        def beta(alpha: float) -> Tensor:
            gammas = torch._standard_gamma(torch.full((2,), float(alpha), device=device), generator=generator)
            return gammas[0] / gammas.sum()

        if config.mixup_alpha:
            keep = weight = beta(config.mixup_alpha)
            keep = keep.expand(height, width)
        if config.cutmix_alpha:
            outside = ~_box(1 - beta(config.cutmix_alpha), uniform(2), height, width)
            share = outside.float().mean()
            if config.mixup_alpha:
                cut = uniform() < 0.5
                keep, weight = torch.where(cut, outside.float(), keep), torch.where(cut, share, weight)
            else:
                keep, weight = outside.float(), share

        # Sorting noise permutes without the wait for the device that randperm may need.
        partner = uniform(count).argsort()
        keep = keep[:, :, None]
        one_hot = torch.zeros(count, self.num_classes, device=device).scatter_(1, label[:, None], 1.0)
        return (
            keep * image + (1 - keep) * image[partner],
            weight * one_hot + (1 - weight) * one_hot[partner],
        )


def _box(area: Tensor, centre: Tensor, height: int, width: int) -> Tensor:
    """A mask (bool [height, width]) of a box of relative `area` around `centre` ([2], in [0, 1))."""

    def inside(length: int, position: Tensor) -> Tensor:
        half = (length * area.sqrt()).long() // 2
        middle, axis = (position * length).long(), torch.arange(length, device=area.device)
        return (axis >= middle - half) & (axis < middle + half)

    return inside(height, centre[0])[:, None] & inside(width, centre[1])[None, :]
