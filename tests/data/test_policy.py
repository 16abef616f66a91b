from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from torchvision.transforms import v2

from mdistiller.data import policy
from mdistiller.data.draws import Draws
from mdistiller.data.policy import Policy, get_policy

THEIRS = {
    "autoaugment": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    "randaugment": v2.RandAugment(),
    "trivialaugment": v2.TrivialAugmentWide(),
}
CPU = torch.device("cpu")


def images(height=32, width=32):
    """Noise, dark, of one color, of few values in one channel, a ramp, black and white."""
    generator = torch.Generator().manual_seed(0)
    given = torch.randint(0, 256, (7, height, width, 3), dtype=torch.uint8, generator=generator)
    given[1] = given[1] // 4 + 40
    given[2] = 200
    given[3, :, :, 0] //= 100
    given[4] = torch.linspace(0, 255, width).to(torch.uint8)[None, :, None]
    given[5], given[6] = 0, 255
    return given


def changes(name, height=32, width=32):
    """torchvision's changes, each with its probability: [row][slot] of (name, signed strengths, odds).

    Its tables are read here, so that ours are held against them.
    """
    theirs = THEIRS[name]
    space = theirs._AUGMENTATION_SPACE

    def strengths(change, count, which):
        made = space[change][0](count, height, width)
        if made is None:
            return [0.0, 0.0]
        found = float(made[which])
        return [found, -found if space[change][1] else found]

    if name == "autoaugment":
        return [
            [(change, strengths(change, 10, i), odds) for change, odds, i in row] for row in theirs._policies
        ]
    if name == "randaugment":
        return [
            [(change, strengths(change, theirs.num_magnitude_bins, theirs.magnitude), 1.0)]
            for change in space
        ]
    bins = theirs.num_magnitude_bins
    return [[(change, strengths(change, bins, i), 1.0)] for change in space for i in range(bins)]


def torchvisions(name, image, change, strength):
    """One change of torchvision's, of a uint8 [H, W, 3] image."""
    theirs = THEIRS[name]
    changed = theirs._apply_image_or_video_transform(
        image.permute(2, 0, 1), change, strength, theirs.interpolation, theirs._fill
    )
    return changed.permute(1, 2, 0)


def quarter_turns(image, strength):
    """The four ways to round a turn by 90° of [H, W, 3], H + W odd: each pixel lies halfway between two.

    Which one a CPU takes depends on the rounding of its own instructions.
    """
    height, width, _ = image.shape
    turned = torch.rot90(image, 1 if strength > 0 else -1)
    ways = []
    for top in ((width - height) // 2, (width - height) // 2 + 1):
        for left in ((width - height) // 2, (width - height) // 2 + 1):
            way = torch.zeros_like(image)
            way[:, left : left + height] = turned[top : top + height]
            ways.append(way)
    return ways


def one_of(image, ways):
    return torch.stack([(image == way).all(-1) for way in ways]).any(0)


@pytest.mark.parametrize("select", ["rows", "mask"])
@pytest.mark.parametrize("size", [(32, 32), (24, 41), (2, 5)])
@pytest.mark.parametrize("name", THEIRS)
def test_every_change_of_every_strength_is_torchvisions(name, size, select, monkeypatch):
    if select == "mask":  # as on a GPU
        monkeypatch.setattr(policy, "_FINDS_ROWS", ())
    ours, given = Policy(name, *size, CPU), images(*size)
    number = 0
    assert torch.equal(ours.apply(given, torch.zeros(7, 1).long()), given)
    for row in changes(name, *size):
        for change, strengths, _ in row:
            for strength in strengths:
                number += 1
                found = ours.apply(given, torch.full((7, 1), number))
                expected = [torchvisions(name, image, change, strength) for image in given]
                assert found.dtype == torch.uint8
                if change == "Rotate" and abs(strength) == 90 and sum(size) % 2:
                    for one, other, image in zip(found, expected, given, strict=True):
                        ways = quarter_turns(image, strength)
                        assert one_of(one, ways).all()
                        assert one_of(other, ways).all()
                    continue
                assert torch.equal(found, torch.stack(expected)), (change, strength)
    assert number + 1 == len(ours.changes.kind), "no other changes"


@pytest.mark.parametrize("select", ["rows", "mask"])
def test_images_get_their_own_changes_one_after_another(select, monkeypatch):
    if select == "mask":
        monkeypatch.setattr(policy, "_FINDS_ROWS", ())
    ours, given = Policy("randaugment", 32, 32, CPU), images()[[0, 1, 4] * 20]
    drawn = ours.draw(Draws(0, torch.arange(60)))
    assert drawn.shape == (60, 2)
    table = [change for row in changes("randaugment") for change, _, _ in row]
    found = ours.apply(given, drawn)
    for image, original, numbers in zip(found, given, drawn.tolist(), strict=True):
        for number in numbers:
            row, negative = divmod(number - 1, 2)
            strength = changes("randaugment")[row][0][1][negative]
            original = torchvisions("randaugment", original, table[row], strength)
        assert torch.equal(image, original)


@pytest.mark.parametrize("name", THEIRS)
def test_draws_have_torchvisions_odds(name):
    ours, count = Policy(name, 32, 32, CPU), 100_000
    drawn = ours.draw(Draws(1, torch.arange(count)))
    rows = changes(name)
    slots = len(rows[0])
    for column in range(drawn.shape[1]):
        odds = torch.zeros(len(ours.changes.kind), dtype=torch.float64)
        for i, row in enumerate(rows):
            chance = row[column % slots][2]
            start = 1 + 2 * (slots * i + column % slots)
            odds[start : start + 2] = chance / len(rows) / 2
            odds[0] += (1 - chance) / len(rows)
        times = drawn[:, column].bincount(minlength=len(odds))
        possible = odds > 0
        assert times[~possible].sum() == 0
        assert chisquare(times[possible].numpy(), (odds[possible] * count).numpy()).pvalue > 1e-3
    if name == "autoaugment":  # both changes are of one sub-policy
        both = drawn[(drawn > 0).all(1)] - 1
        assert torch.equal(both[:, 0] // 4, both[:, 1] // 4)
    if name == "randaugment":  # and these know nothing of each other
        pairs = (28 * (drawn[:, 0] - 1) + drawn[:, 1] - 1).bincount(minlength=28 * 28)
        assert chisquare(pairs.numpy()).pvalue > 1e-3


def test_draws_follow_the_seed_and_the_image_alone():
    ours, state = Policy("trivialaugment", 32, 32, CPU), torch.get_rng_state()
    first = ours.draw(Draws(4, torch.arange(50)))
    assert torch.equal(first, ours.draw(Draws(4, torch.arange(50))))
    assert not torch.equal(first, ours.draw(Draws(5, torch.arange(50))))
    given = images()
    before = given.clone()
    ours.apply(given, first[:7])
    assert torch.equal(given, before), "what was given stays"
    assert torch.equal(state, torch.get_rng_state())


def test_a_table_is_made_once_for_a_size():
    assert get_policy("randaugment", 32, 32, CPU) is get_policy("randaugment", 32, 32, CPU)
    assert get_policy("randaugment", 32, 16, CPU) is not get_policy("randaugment", 32, 32, CPU)
