from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare, ks_2samp
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms import functional as TF

from mdistiller.data import Augment, AugmentConfig
from mdistiller.data.augment import _box, _crop_and_scale, _draw_box, _flip
from mdistiller.data.draws import Draws
from mdistiller.data.policy import Policy
from mdistiller.types import Batch

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def build(**settings):
    return Augment(AugmentConfig(**settings), MEAN, STD, 10)


def batch(count, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    return Batch(image, torch.arange(count) % 10, torch.arange(count))


def reference(image, top, left, flip, padding, size=32):
    """torchvision's crop, flip, scaling and normalization of one uint8 [H, W, 3] image."""
    image = TF.crop(TF.pad(image.permute(2, 0, 1), [padding]), top, left, size, size)
    image = TF.hflip(image) if flip else image
    return TF.normalize(TF.convert_image_dtype(image, torch.float32), MEAN, STD)


def test_evaluation_only_normalizes():
    augment = build(mixup_alpha=1.0, cutmix_alpha=1.0).eval()
    given = batch(4)
    image, label, index = augment(given)[:3]
    for ours, theirs in zip(image, given.image, strict=True):
        torch.testing.assert_close(ours, reference(theirs, 0, 0, False, 0), rtol=0, atol=1e-6)
    assert label is given.label
    assert index is given.index
    assert image.dtype == torch.float32
    assert image.is_contiguous(memory_format=torch.channels_last)


def test_all_162_variants_are_torchvisions():
    augment, original = build(), batch(1).image
    variants = list(itertools.product(range(9), range(9), (False, True)))
    top, left, flip = (torch.tensor(column) for column in zip(*variants, strict=True))
    images = augment._crop(original.expand(162, -1, -1, -1), top, left, flip)
    assert images.dtype == torch.uint8
    assert len(images.flatten(1).unique(dim=0)) == 162
    for ours, variant in zip(augment.normalize(images), variants, strict=True):
        torch.testing.assert_close(ours, reference(original[0], *variant, padding=4), rtol=0, atol=1e-6)


def test_all_162_variants_are_equally_likely():
    augment = build()
    draw = augment.draw(torch.empty(81_000, 32, 32, 0), Draws(0, torch.arange(81_000)))
    counts = ((draw.top * 9 + draw.left) * 2 + draw.flip).bincount(minlength=162)
    assert len(counts) == 162
    assert chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("padding", "size", "used"), [(0, 32, 0), (2, 16, 2), (None, 32, 4), (None, 64, 8)])
@pytest.mark.parametrize("flip", [True, False])
def test_training_output_is_its_draw(padding, size, used, flip):
    augment, given = build(padding=padding, flip=flip), batch(16, size)
    draw = augment.draw(given.image, Draws(5, given.index))
    image = augment(given, Draws(5, given.index)).image
    assert draw.top.max() <= 2 * used
    assert flip or not draw.flip.any()
    for i, ours in enumerate(image):
        theirs = reference(
            given.image[i], int(draw.top[i]), int(draw.left[i]), bool(draw.flip[i]), used, size
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(image, augment(given, Draws(5, given.index)).image)
    global_state = torch.get_rng_state()
    augment(given, Draws(6, given.index))
    assert torch.equal(global_state, torch.get_rng_state())


def normalized(given):
    return build().normalize(given.image)


def partners(given, label, weight):
    """Which sample each was mixed with, from labels that are all different: int64 [B]."""
    rest = label.clone()
    rest[torch.arange(len(label)), given.label] -= weight
    return rest.argmax(1)


@pytest.mark.parametrize("seed", range(5))
def test_mixup_is_its_formula(seed):
    given = batch(10)
    augment = build(flip=False, padding=0, mixup_alpha=0.8)
    image, label, _ = augment(given, generator=torch.Generator().manual_seed(seed))[:3]
    assert label.dtype == torch.float32
    torch.testing.assert_close(label.sum(1), torch.ones(10))
    mixed = label.diagonal() < 1
    weight = label.diagonal()[mixed][0] if mixed.any() else torch.tensor(1.0)
    other = partners(given, label, weight)
    plain = normalized(given)
    torch.testing.assert_close(image, weight * plain + (1 - weight) * plain[other])
    assert sorted(other.tolist()) == list(range(10)), "partners are a permutation"
    one_hot = F.one_hot(given.label, 10).float()
    torch.testing.assert_close(label, weight * one_hot + (1 - weight) * one_hot[other])
    assert image.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_pastes_a_box_and_weighs_by_its_area(seed):
    given = batch(10)
    augment = build(flip=False, padding=0, cutmix_alpha=1.0)
    image, label, _ = augment(given, generator=torch.Generator().manual_seed(seed))[:3]
    plain = normalized(given)
    own = (image == plain).all(1)
    mixed = ~own.flatten(1).all(1)
    torch.testing.assert_close(label.sum(1), torch.ones(10))
    assert mixed.any()
    kept = own[mixed][0]
    assert (own[mixed] == kept).all(), "one box for the batch"
    rows, columns = (~kept).any(1).nonzero(), (~kept).any(0).nonzero()
    area = len(rows) * len(columns)
    assert area == (~kept).sum(), "a rectangle"
    assert rows.max() - rows.min() + 1 == len(rows)
    weight = 1 - area / 1024
    other = partners(given, label, weight)
    assert torch.equal(image, torch.where(kept, plain, plain[other]))
    one_hot = F.one_hot(given.label, 10).float()
    torch.testing.assert_close(label, weight * one_hot + (1 - weight) * one_hot[other])


def weights(augment, count):
    given = batch(2, 16)
    generator = torch.Generator().manual_seed(0)
    found = []
    while len(found) < count:
        label = augment(given, generator=generator).label
        if label[0, 0] < 1 or label[0, 1] > 0:  # else the partner was the sample itself
            found.append(float(label[0, 0]))
    return np.array(found)


def test_mixup_weight_is_beta_distributed():
    found = weights(build(flip=False, padding=0, mixup_alpha=0.5), 1500)
    assert found.mean() == pytest.approx(0.5, abs=0.04)
    assert found.var() == pytest.approx(0.25 / 2, rel=0.1)  # ab / ((a+b)²(a+b+1)) with a = b = 1/2


def test_both_take_turns():
    augment, given = build(flip=False, padding=0, mixup_alpha=1.0, cutmix_alpha=1.0), batch(10, 16)
    plain, generator = normalized(given), torch.Generator().manual_seed(0)
    cut = 0
    for _ in range(200):
        image, label, _ = augment(given, generator=generator)[:3]
        torch.testing.assert_close(label.sum(1), torch.ones(10))
        # CutMix leaves each pixel as it was in some image of the batch.
        cut += bool((image[:, None] == plain[None]).all(2).any(1).all())
    assert 70 <= cut <= 130


@pytest.mark.parametrize("area", [0.0, 0.25, 1.0])
def test_box_of_cutmix(area):
    box = _box(torch.tensor(area), torch.tensor([0.5, 0.5]), 16, 32)
    assert box.shape == (16, 32)
    assert box.sum() == area * 512
    corner = _box(torch.tensor(area), torch.tensor([0.0, 0.0]), 16, 32)
    assert corner.sum() == area * 512 / 4, "what lies outside is cut off"


def test_tiny_alpha_stays_finite():
    augment, generator = build(mixup_alpha=1e-3), torch.Generator().manual_seed(0)
    for _ in range(200):
        image, label, _ = augment(batch(4, 8), generator=generator)[:3]
        assert image.isfinite().all()
        assert label.isfinite().all()


def test_wrong_input_and_buffers():
    augment = build()
    with pytest.raises(ValueError, match=r"got torch.float32 \(1, 3, 8, 8\), need uint8 \[B, H, W, 3\]"):
        augment(Batch(torch.zeros(1, 3, 8, 8), torch.zeros(1).long(), torch.zeros(1).long()))
    assert augment.state_dict() == {}
    assert {name for name, _ in augment.named_buffers()} == {"mean", "std"}


@pytest.mark.parametrize("name", ["autoaugment", "randaugment", "trivialaugment", "fixmatch"])
@pytest.mark.parametrize("strong", [False, True])
def test_a_policy_comes_after_crop_and_flip_in_its_view(name, strong):
    field = "strong_policy" if strong else "policy"
    augment, given = build(**{"strong_policy": "none", field: name}), batch(64)
    image = augment(given, Draws(3, given.index), strong=strong).image
    draw = augment.draw(given.image, Draws(3, given.index), strong=strong)
    cropped = augment._crop(given.image, *draw[:3])
    policy = Policy(name, 32, 32, torch.device("cpu"))
    for ours, original, changes in zip(image, cropped, draw.changes, strict=True):
        changed = policy.apply(original[None], changes[None])[0]
        torch.testing.assert_close(ours, reference(changed, 0, 0, False, 0), rtol=0, atol=1e-6)
    assert image.is_contiguous(memory_format=torch.channels_last)
    other = augment(given, Draws(3, given.index), strong=not strong).image  # no policy here
    assert torch.equal(other, augment.normalize(cropped))
    assert not torch.equal(image, other)
    assert torch.equal(augment.eval()(given, strong=strong).image, normalized(given))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"policy": "randaugment"},
        {"policy": "fixmatch"},
        {"policy": "autoaugment", "mixup_alpha": 0.8, "cutmix_alpha": 1.0},
        {"padding": 0, "flip": False},
        {"crop": "resized", "policy": "trivialaugment"},
    ],
    ids=str,
)
def test_batches_together_are_each_by_itself(settings):
    augment, given = build(**settings), [batch(12, seed=1), batch(5, seed=2), batch(12, seed=3)]
    made = [(Draws(7, one.index), torch.Generator().manual_seed(i)) for i, one in enumerate(given)]
    draws = [augment.draw(one.image, *source) for one, source in zip(given, made, strict=True)]
    for i, found in enumerate(augment.change(given, draws)):
        alone = augment(given[i], Draws(7, given[i].index), torch.Generator().manual_seed(i))
        for ours, theirs in zip(found[:3], alone[:3], strict=True):
            assert torch.equal(ours, theirs)
        assert found.image.is_contiguous(memory_format=torch.channels_last)


# Crops that are scaled back


@pytest.mark.parametrize("flip", [True, False])
def test_a_resized_crop_is_torchvisions(flip):
    augment = build(crop="resized", flip=flip, padding=4)
    given = batch(64)
    given = given._replace(image=given.image // 16 * 16)
    draw = augment.draw(given.image, Draws(2, given.index))
    found = augment.change([given], [draw])[0].image
    for i, ours in enumerate(found):
        top, left, tall, wide = draw.box[:, i].tolist()
        whole = given.image[i].permute(2, 0, 1).float()
        scaled = TF.resized_crop(whole, top, left, tall, wide, [32, 32], antialias=False).round()
        scaled = TF.hflip(scaled) if draw.flip[i] else scaled
        expected = TF.normalize(scaled / 255, MEAN, STD)
        # One level of 255, where the rounding is a tie.
        torch.testing.assert_close(ours, expected, rtol=0, atol=1.01 / 255 / min(STD))
        assert (ours - expected).abs().gt(1e-5).float().mean() < 0.01
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert draw.flip.any() == flip


@pytest.mark.parametrize("size", [32, 7])
def test_resized_crops_are_drawn_as_torchvisions(size):
    ours = _draw_box(torch.empty(20_000, size, size, 3), (0.08, 1.0), Draws(0, torch.arange(20_000))).numpy()
    torch.manual_seed(0)
    image = torch.empty(3, size, size)
    draws = [transforms.RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(20_000)]
    theirs = np.array(draws).T
    for one, other in zip(ours, theirs, strict=True):
        pair = np.stack([np.bincount(x, minlength=size + 1) for x in (one, other)])
        assert chi2_contingency(pair[:, pair.sum(0) > 0]).pvalue > 1e-3
    top, left, tall, wide = ours
    assert ((top + tall <= size) & (left + wide <= size) & (tall > 0) & (wide > 0)).all()
    # Together, too: areas and shapes.
    for measure in (lambda x: x[2] * x[3], lambda x: x[2] - x[3], lambda x: x[0] + x[2]):
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3


def test_the_whole_image_is_itself():
    given = batch(3).image
    box = torch.tensor([[0, 0, 0], [0, 0, 0], [32, 32, 32], [32, 32, 32]])
    assert torch.equal(_crop_and_scale(given, box), given)


@pytest.mark.parametrize(
    "settings", [{}, {"padding": 0}, {"padding": 0, "flip": False}, {"policy": "randaugment"}]
)
def test_memory_formats_have_the_same_bits(settings):
    raw, images = batch(12), []
    for layout in (torch.contiguous_format, torch.channels_last):
        augment = Augment(AugmentConfig(**settings), MEAN, STD, 10, layout)
        for mode in (True, False):
            image = augment.train(mode)(raw, Draws(3, raw.index)).image
            assert image.is_contiguous(memory_format=layout) or settings.get("padding") == 0
            images.append(image)
    assert torch.equal(images[0], images[2])
    assert torch.equal(images[1], images[3])


@pytest.mark.parametrize("device", ["cpu", "other"])
def test_flips_without_crops_are_torchvisions(monkeypatch, device):
    raw = batch(40, size=9)
    before = raw.image.clone()
    augment = build(padding=0).train()
    draw = augment.draw(raw.image, Draws(1, raw.index))
    assert 5 < draw.flip.sum() < 35
    found = _flip(raw.image if device == "cpu" else Elsewhere(raw.image), draw.flip)
    expected = [
        TF.hflip(x.permute(2, 0, 1)) if f else x.permute(2, 0, 1)
        for x, f in zip(raw.image, draw.flip, strict=True)
    ]
    assert torch.equal(torch.as_tensor(found).permute(0, 3, 1, 2), torch.stack(expected))
    assert torch.equal(raw.image, before), "other views need it"
    if device == "cpu":
        images = augment.change([raw], [draw])[0].image
        theirs = [TF.normalize(TF.convert_image_dtype(x, torch.float32), MEAN, STD) for x in expected]
        torch.testing.assert_close(images, torch.stack(theirs))


class Elsewhere(torch.Tensor):
    """A tensor of another device, as far as it is asked."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_subclass(cls, data)

    @property
    def device(self):
        return torch.device("cuda")
