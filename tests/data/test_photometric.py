"""Rotation, color jitter, vertical flip, random erasing and crop scale against torchvision."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomErasing
from torchvision.transforms.v2 import functional as V

from mdistiller.data import Augment, AugmentConfig
from mdistiller.data.augment import _draw_box
from mdistiller.data.draws import Draws
from mdistiller.data.photometric import (
    draw_changes,
    erase,
    flip_vertically,
    jitter_colors,
    rotate,
)
from mdistiller.types import Batch

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def images(count=16, height=12, width=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, height, width, 3), generator=generator, dtype=torch.uint8)


def test_jitter_equals_torchvision_s_adjustments():
    x = images()
    factors = 0.4 + 1.2 * torch.rand(3, len(x), generator=torch.Generator().manual_seed(1))
    found = jitter_colors(x, factors)
    for i, image in enumerate(x.permute(0, 3, 1, 2)):
        brightness, contrast, saturation = factors[:, i].tolist()
        expected = V.adjust_brightness(image, brightness)
        expected = V.adjust_contrast(expected, contrast)
        expected = V.adjust_saturation(expected, saturation)
        off = (found[i].permute(2, 0, 1).int() - expected.int()).abs()
        assert off.max() <= 1  # a product on a whole number is rounded either way
        assert (off > 0).float().mean() < 0.01


@pytest.mark.parametrize("size", [(64, 64), (13, 20)])
def test_rotation_equals_torchvision_s(size):
    x = images(8, *size)
    degrees = torch.tensor([0.0, 90.0, -90.0, 180.0, 20.0, -17.3, 3.21, -0.4])
    found = rotate(x, degrees)
    for i, image in enumerate(x.permute(0, 3, 1, 2)):
        expected = V.rotate(image, degrees[i].item())
        assert (found[i].permute(2, 0, 1) == expected).float().mean() > 0.999, degrees[i]
    # PIL, which the authors use, rounds some pixels between two to the other one.
    for i in range(4, 8):
        pillow = np.asarray(Image.fromarray(x[i].numpy()).rotate(degrees[i].item()))
        assert (found[i].numpy() == pillow).all(-1).mean() > 0.97


def test_rotation_is_drawn_evenly_and_changes_no_other_draw():
    x, index = images(count=4000, height=2, width=2), torch.arange(4000)
    without = draw_changes(AugmentConfig(color_jitter=0.2, erase=0.5), x, Draws(0, index))
    found = draw_changes(AugmentConfig(color_jitter=0.2, erase=0.5, rotation=20), x, Draws(0, index))
    assert torch.equal(found["color_jitter"], without["color_jitter"])
    assert torch.equal(found["erase"], without["erase"])
    assert 19.9 < found["rotation"].abs().max() <= 20
    assert found["rotation"].std().item() == pytest.approx(20 / 3**0.5, rel=0.05)
    assert found["rotation"].mean().item() == pytest.approx(0, abs=0.6)


def test_a_batch_is_rotated_and_mirrored():
    """Each image is its rotation, mirrored for half of the images, and the others of a batch play no part."""
    x, index = images(count=40, height=16, width=16), torch.arange(40)
    config = AugmentConfig(crop="padded", padding=0, rotation=20)
    augment = Augment(config, MEAN, STD, 10)
    assert not augment.is_countable()
    batch = Batch(x, torch.zeros(40, dtype=torch.int64), index)
    whole = augment(batch, Draws(5, index)).image
    draw = augment.draw(x, Draws(5, index))
    mirrored = torch.where(draw.flip[:, None, None, None], x.flip(2), x)
    expected = augment.normalize(rotate(mirrored, draw.other["rotation"]))
    assert torch.equal(whole, expected)
    part = index[7:11]
    some = augment(Batch(x[part], batch.label[part], part), Draws(5, part)).image
    assert torch.equal(some, whole[part])


def test_factor_one_changes_nothing():
    x = images()
    assert torch.equal(jitter_colors(x, torch.ones(3, len(x))), x)


def test_vertical_flip_equals_torchvision_s():
    x = images()
    chosen = torch.arange(len(x)) % 3 == 0
    found = flip_vertically(x, chosen)
    flipped = V.vertical_flip(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert torch.equal(found[chosen], flipped[chosen])
    assert torch.equal(found[~chosen], x[~chosen])


def test_erasing_equals_torchvision_s():
    x = torch.randn(3, 3, 12, 10)
    box = torch.tensor([[2, 0, 5], [1, 4, 5], [3, 12, 0], [5, 2, 4]])
    found = erase(x, box)
    for i, (top, left, tall, wide) in enumerate(box.T.tolist()):
        expected = V.erase(x[i], top, left, tall, wide, torch.zeros(1))
        assert torch.equal(found[i], expected)
    assert torch.equal(found[2], x[2])


def test_boxes_have_the_distribution_of_random_erasing():
    size, count = 40, 4000
    x = torch.zeros(count, size, size, 3, dtype=torch.uint8)
    box = draw_changes(AugmentConfig(erase=1.0), x, Draws(0, torch.arange(count)))["erase"].double()
    torch.manual_seed(0)
    one = torch.zeros(3, size, size)
    params = [RandomErasing.get_params(one, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(count)]
    expected = torch.tensor([[i, j, h, w] for i, j, h, w in params]).double().T
    for found, theirs in zip(box, expected, strict=True):
        assert found.mean().item() == pytest.approx(theirs.mean().item(), rel=0.05)
        assert found.std().item() == pytest.approx(theirs.std().item(), rel=0.06)
    some = draw_changes(AugmentConfig(erase=0.25), x, Draws(1, torch.arange(count)))["erase"]
    assert (some[2] > 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_crops_have_the_scale_that_is_given():
    x = torch.zeros(2000, 50, 50, 3, dtype=torch.uint8)
    box = _draw_box(x, (0.5, 0.75), Draws(0, torch.arange(2000)))
    area = (box[2] * box[3]) / 2500
    assert area.min() > 0.47
    assert area.max() < 0.78
    assert area.mean().item() == pytest.approx(0.625, abs=0.01)


def test_the_settings_reach_the_batch_and_leave_evaluation_alone():
    x = images(64)
    batch = Batch(x, torch.arange(64) % 4, torch.arange(64))
    plain = AugmentConfig(flip=False, padding=0)
    base = Augment(plain, MEAN, STD, 4)
    normalized = base.normalize(x)

    def changed(**settings):
        augment = Augment(plain.replace(**settings), MEAN, STD, 4)
        assert torch.equal(augment.eval()(batch).image, normalized)
        first, again = (augment.train()(batch, Draws(3, batch.index)).image for _ in range(2))
        assert torch.equal(first, again)
        return first

    assert torch.equal(changed(), normalized)
    upside_down = changed(vertical_flip=True)
    flips = [torch.equal(a, b.flip(1)) for a, b in zip(upside_down, normalized, strict=True)]
    assert 15 < sum(flips) < 49
    erased = changed(erase=1.0)
    assert ((erased == 0).all(1).flatten(1).any(1)).all()
    kept = (erased != 0).all(1, keepdim=True).expand_as(erased)
    assert torch.equal(erased[kept], normalized[kept])
    jittered = changed(color_jitter=0.4)
    assert not torch.equal(jittered, normalized)
    assert torch.equal(changed(color_jitter=0.0), normalized)


def test_draws_of_earlier_settings_stay_the_same():
    """New operations draw last, so runs of before repeat."""
    x = images(8)
    old = Augment(AugmentConfig(mixup_alpha=0.2), MEAN, STD, 4)
    new = Augment(AugmentConfig(mixup_alpha=0.2, color_jitter=0.4, erase=0.5), MEAN, STD, 4)
    a, b = (
        augment.draw(x, Draws(5, torch.arange(8)), torch.Generator().manual_seed(5)) for augment in (old, new)
    )
    assert torch.equal(a.top, b.top)
    assert torch.equal(a.mix.partner, b.mix.partner)


def test_a_scale_that_is_none():
    for scale in ((0.0, 1.0), (0.5, 0.4), (0.5, 1.1)):
        with pytest.raises(ValueError, match="scale"):
            AugmentConfig(scale=scale)
