"""Random crops: one distribution of scale, position and sharpness, wherever the images are kept."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision import transforms

from mdistiller.data import AugmentConfig, DataConfig, ImageSet, load_data
from mdistiller.data.draws import Draws
from mdistiller.data.encoded import are_squares
from mdistiller.models import ModelConfig
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.batches import ImageBatches
from mdistiller.training.distributed import World

# Python 3.12 and later say so whenever a process with threads (torch's) forks a DataLoader's workers.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

SIDE = 32
LARGE, SQUARE = (150, 100), (SIDE, SIDE)


def chart(size):
    """An image with its horizontal coordinate in red, the vertical one in green, and noise in blue."""
    width, height = size
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    noise = np.random.default_rng(0).normal(size=(height, width))
    # A spectrum that falls with the frequency, as photographs have.
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    waves = np.fft.irfft2(np.fft.rfft2(noise) / np.maximum(frequency, 1), s=(height, width))
    pixels[..., 2] = (128 + 50 * waves / waves.std()).clip(0, 255)
    return Image.fromarray(pixels)


def folder(root, size):
    for split, count in (("train", 8), ("val", 1)):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                chart(size).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    return {size: folder(tmp_path_factory.mktemp("charts"), size) for size in (LARGE, SQUARE)}


def source(root, crop="auto", **settings):
    data = {"kind": "folder", "root": root, "image_size": SIDE, "workers": 0, **settings}
    config = ClassificationConfig(
        data=DataConfig(**data),
        augment=AugmentConfig(flip=False, crop=crop, padding=None),
        student=ModelConfig(name="resnet8"),
        batch_size=16,
        seed=1,
    )
    return ImageBatches(config, load_data(config.data), World(torch.device("cpu")))


def crops(root, epochs, **settings):
    """Training images as a model gets them, [N, 3, S, S] in [0, 255]."""
    batches = source(root, **settings)
    augment, found = batches.augment.train(), []
    for epoch in range(epochs):
        found += [augment(raw, Draws(epoch, raw.index)).image for raw in batches.loader.epoch(epoch)]
    mean, std = (torch.tensor(v)[:, None, None] for v in (batches.splits.mean, batches.splits.std))
    return (torch.cat(found) * std + mean) * 255


def measured(images):
    """Area of each crop, its center (as fractions of the image), and its mean gradient of blue."""
    red, green, blue = images.unbind(1)
    wide, tall = (red[:, :, -2] - red[:, :, 1]).mean(1), (green[:, -2] - green[:, 1]).mean(1)
    part = 255 * (SIDE - 3) / SIDE
    gradient = blue.diff(dim=1).abs().mean((1, 2)) + blue.diff(dim=2).abs().mean((1, 2))
    center = [images[:, channel].mean((1, 2)) / 255 for channel in (0, 1)]
    found = {"area": wide * tall / part**2, "x": center[0], "y": center[1], "gradient": gradient}
    return {name: values.numpy() for name, values in found.items()}


def torchvisions(size, count):
    """Crops that torchvision takes from the whole image."""
    change = transforms.Compose([transforms.RandomResizedCrop(SIDE), transforms.PILToTensor()])
    torch.manual_seed(0)
    return torch.stack([change(chart(size)) for _ in range(count)]).float()


@pytest.mark.parametrize(
    ("size", "memory"),
    [(LARGE, "auto"), (LARGE, "stream"), (SQUARE, "resident"), (SQUARE, "auto")],
)
def test_crops_are_torchvisions(roots, size, memory):
    ours = measured(crops(roots[size], 40, memory=memory))
    theirs = measured(torchvisions(size, 640))
    for name, values in ours.items():
        assert ks_2samp(values, theirs[name]).pvalue > 1e-3, name
        gap = np.quantile(values, [0.1, 0.5, 0.9]) - np.quantile(theirs[name], [0.1, 0.5, 0.9])
        assert np.abs(gap).max() < 0.35 * theirs[name].std(), name
    assert ours["gradient"].mean() == pytest.approx(theirs["gradient"].mean(), rel=0.03)


def test_squares_of_large_files_are_blurred(roots):
    """Resident squares, which only an explicit choice gives, lose a third of the sharpness and the sides."""
    ours, theirs = measured(crops(roots[LARGE], 40, memory="resident")), measured(torchvisions(LARGE, 640))
    assert ours["gradient"].mean() < 0.75 * theirs["gradient"].mean()
    assert ours["x"].max() < theirs["x"].max() - 0.05
    description = source(roots[LARGE], memory="resident").splits.description
    assert description.endswith("decoded in memory and shrunk to 32x32, from which random crops are enlarged")


def test_squares_are_decoded_once(roots):
    splits = source(roots[SQUARE]).splits
    assert isinstance(splits.train, ImageSet)
    assert splits.description.endswith(", decoded in memory")


@pytest.mark.parametrize("size", [LARGE, SQUARE])
@pytest.mark.parametrize("crop", ["auto", "padded"])
def test_memory_changes_no_bit(roots, size, crop):
    auto = crops(roots[size], 2, crop=crop)
    others = [{"memory": "stream"}, {"memory_limit_gb": 0}]
    if size == SQUARE or crop == "padded":
        others.append({"memory": "resident"})
    others.append({"memory": "stream", "workers": 2})
    for settings in others:
        assert torch.equal(auto, crops(roots[size], 2, crop=crop, **settings)), settings


def test_auto_is_resized_for_image_files_of_any_number_and_size(roots):
    for settings in ({}, {"memory": "resident"}, {"memory": "stream"}, {"memory_limit_gb": 0}):
        for root in roots.values():
            area = measured(crops(root, 2, **settings))["area"]
            assert area.min() < 0.5, "a padded crop has all of the image but its edge"
    arrays = ClassificationConfig(data=DataConfig(kind="synthetic"), student=ModelConfig(name="resnet8"))
    batches = ImageBatches(arrays, load_data(arrays.data), World(torch.device("cpu")))
    assert (batches.augment.config.crop, batches.augment.config.padding) == ("padded", 4)


@pytest.mark.parametrize(
    ("sizes", "settings", "expected"),
    [
        ([(40, 40)] * 10, {}, False),
        ([(40, 32)] * 10, {}, False),
        ([(16, 16)] * 10, {}, False),
        ([(32, 32)] * 10, {}, True),
        ([(32, 32)] * 9 + [(400, 300)], {}, True),
        ([(32, 32)] * 8 + [(400, 300)] * 2, {}, False),
        # The center crop of 32 from 36 pixels would cut the edges off.
        ([(32, 32)] * 10, {"resize": 36}, False),
    ],
)
def test_files_that_are_squares_already(tmp_path, sizes, settings, expected):
    for split in ("train", "val"):
        for i, size in enumerate(sizes):
            path = tmp_path / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size).save(path)
    config = DataConfig(kind="folder", root=tmp_path, image_size=SIDE, memory="stream", workers=0, **settings)
    train = load_data(config).train
    assert train.random_crop == (not expected)
    assert are_squares(train) == expected


def test_modes_are_in_the_description(roots):
    def description(**settings):
        return source(roots[LARGE], **settings).splits.description.rsplit(", ", 1)[1]

    assert description() == description(memory="stream") == description(memory_limit_gb=0) == "streamed"
