"""Formats of stored outputs: their error, and the error of the student's gradient."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mdistiller
from mdistiller.data import Augment, AugmentConfig
from mdistiller.data.draws import Draws
from mdistiller.functional import dist_loss, dkd_loss, kd_loss
from mdistiller.methods.lskd import standardize
from mdistiller.models import load_weights
from mdistiller.training.row_store import Half, Int8
from mdistiller.types import Batch

CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
SHARED = Path(__file__).resolve().parents[3] / "shared"


def made_up(rows=256, classes=100, seed=0):
    """Logits like those of a trained teacher: one class far above noise, one or two near it."""
    random = np.random.default_rng(seed)
    values = random.normal(0, 1.5, (rows, classes))
    index = np.arange(rows)
    values[index, random.integers(classes, size=rows)] += random.gamma(4, 2.5, rows)
    values[index, random.integers(classes, size=rows)] += random.gamma(2, 1.5, rows)
    return values.astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 10, 100, 1000])
def test_int8_is_its_formula(size):
    values = (
        made_up(50, size) if size > 2 else np.random.default_rng(0).normal(size=(50, size)).astype(np.float32)
    )
    rows = Int8(size).encode(values)
    assert (rows.shape, rows.dtype) == ((50, Int8(size).row_bytes), np.uint8)
    found = Int8(size).decode(rows)
    for row, given in zip(found, values, strict=True):
        order = np.argsort(given)
        top, others = order[-2:], order[:-2]
        assert np.array_equal(row[top], given[top].astype(np.float16).astype(np.float32))
        if len(others):
            step = (given[others].max() - given[others].min()) / 255
            assert np.abs(row[others] - given[others]).max() <= step / 2 * 1.001 + 1e-6
            assert row[others].min() == given[others].min()


@pytest.mark.parametrize(("tokens", "channels"), [(1, 3), (5, 1), (17, 48)])
def test_tokens_have_a_scale_for_each_channel(tokens, channels):
    form = Int8(tokens * channels, channels)
    random = np.random.default_rng(0)
    values = random.normal(0, random.uniform(0, 1, channels) ** 4 * 100, (20, tokens, channels))
    values[..., 0] = 3.0  # constant
    flat = values.astype(np.float32).reshape(20, -1)
    rows = form.encode(flat)
    assert (rows.shape, rows.dtype) == ((20, form.row_bytes), np.uint8)
    assert form.row_bytes == 8 * channels + tokens * channels
    assert form.decode(rows[:0]).shape == (0, tokens * channels)
    found, given = (x.reshape(20, tokens, channels) for x in (form.decode(rows), flat))
    step = (given.max(1) - given.min(1)) / 255
    assert (np.abs(found - given).max(1) <= step / 2 * 1.001 + 1e-5).all()
    np.testing.assert_array_equal(found.min(1), given.min(1))


@pytest.mark.parametrize("size", [1, 3, 64, 101])
def test_half_is_half_precision(size):
    values = np.random.default_rng(0).normal(size=(20, size)).astype(np.float32) * 100
    rows = Half(size).encode(values)
    assert rows.shape == (20, Half(size).row_bytes)
    assert np.array_equal(Half(size).decode(rows), values.astype(np.float16).astype(np.float32))


def test_bytes_of_a_row():
    assert (Int8(100).row_bytes, Int8(1000).row_bytes, Half(100).row_bytes) == (120, 1020, 200)


@pytest.mark.parametrize("make", [Int8, Half])
def test_odd_values(make):
    """Ties, constant rows, the largest numbers, tiny ones."""
    values = np.zeros((8, 6), np.float32)
    values[1] = 7
    values[2] = [1, 1, 1, 0, 0, 0]
    values[3] = [65504, -65504, 0, 1, 2, 3]
    values[4] = [65504, -65504, 65504, -65504, 65504, -65504]
    values[5] = [1e-8, 2e-8, 0, -1e-8, 0, 0]
    values[6] = [30000, 30001, 30002, 30003, 30004, 30005]
    values[7] = [-1, -2, -3, -4, -5, -6]
    made = make(6)
    found = made.decode(made.encode(values))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:3], values[:3], rtol=2**-8, atol=1e-6)
    np.testing.assert_allclose(found[3:], values[3:], rtol=2**-7, atol=260)
    assert made.decode(made.encode(values[:0])).shape == (0, 6)


def test_rows_are_the_same_whatever_their_batch():
    values = made_up()
    for made in (Int8(100), Half(100)):
        whole = made.encode(values)
        assert np.array_equal(
            np.concatenate([made.encode(part) for part in np.array_split(values, 11)]), whole
        )
        decoded = made.decode(whole)
        assert np.array_equal(
            np.concatenate([made.decode(part) for part in np.array_split(whole, 7)]), decoded
        )


# Gradient of the student

LOSSES = {
    "KD": lambda s, t, y, temperature: kd_loss(s, t, temperature=temperature),
    "DKD, β 8": lambda s, t, y, temperature: dkd_loss(s, t, y, alpha=1.0, beta=8.0, temperature=temperature),
    "DIST": lambda s, t, y, temperature: dist_loss(s, t, temperature=temperature),
    "LSKD-KD": lambda s, t, y, temperature: kd_loss(standardize(s), standardize(t), temperature=temperature),
}


def uniform_int8(values):
    """One byte a class with a scale a row for all classes: the plain format."""
    low, high = values.min(1, keepdims=True), values.max(1, keepdims=True)
    return low + np.rint((values - low) / (high - low) * 255) * ((high - low) / 255)


def top_k(values, k):
    """Probabilities of the k largest classes, the rest uniform, as logits: Shen and Xing's FKD."""
    probabilities = torch.from_numpy(values).softmax(1)
    kept, index = probabilities.topk(k, 1)
    rest = (1 - kept.sum(1, keepdim=True)).clamp(min=1e-12) / (values.shape[1] - k)
    return rest.expand_as(probabilities).scatter(1, index, kept).log().numpy()


def error(loss, student, teacher, stored, label, temperature):
    """Relative error of the gradient in the student's logits, over all images."""
    gradients = []
    for target in (teacher, stored):
        logits = student.clone().requires_grad_()
        loss(logits, torch.from_numpy(np.asarray(target, np.float32)), label, temperature).backward()
        gradients.append(logits.grad)
    return ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()


def real(count=256):
    """Logits of a trained teacher and of a smaller network on crops and flips of CIFAR-100, and labels."""
    data, teachers = SHARED / "data" / "cifar100", SHARED / "teachers" / "cifar100"
    if not (data.is_dir() and teachers.is_dir()):
        return None
    number = np.linspace(0, 49_999, count).astype(int)
    files = sorted(data.glob("train-*.webp"))  # mosaics of 32 x 32 images
    mosaics = {i: np.asarray(Image.open(files[i]).convert("RGB")) for i in set(number // 1024)}
    tiles = [mosaics[n // 1024].reshape(32, 32, 32, 32, 3)[n % 1024 // 32, :, n % 32] for n in number]
    label = torch.from_numpy(np.load(data / "labels.npz")["train"][number]).long()
    index = torch.arange(count)
    augment = Augment(AugmentConfig(), CIFAR100_MEAN, CIFAR100_STD, 100)
    image = augment(Batch(torch.from_numpy(np.stack(tiles)), label, index), Draws(0, index)).image
    found = []
    for name in ("resnet32x4", "resnet56"):
        model = mdistiller.create_model(name, 100)
        load_weights(model, teachers / f"{name}.pt")
        with torch.no_grad():
            found.append(torch.cat([model.eval()(part) for part in image.split(64)]))
    return found[0].numpy(), found[1], label


def material():
    found = real()
    if found is not None:
        return found
    teacher = made_up(512)
    random = torch.Generator().manual_seed(1)
    student = 0.5 * torch.from_numpy(teacher) + torch.randn(512, 100, generator=random)
    return teacher, student, torch.from_numpy(teacher.argmax(1))


def table(teacher, student, label):
    """Relative errors by format, then by (loss, temperature)."""
    formats = {
        "int8 with the two largest": Int8(100).decode(Int8(100).encode(teacher)),
        "fp16": Half(100).decode(Half(100).encode(teacher)),
        "int8 alone": uniform_int8(teacher),
        "top 16": top_k(teacher, 16),
        "top 5": top_k(teacher, 5),
    }
    return {
        name: {
            (loss, temperature): error(function, student, teacher, stored, label, temperature)
            for loss, function in LOSSES.items()
            for temperature in (1.0, 4.0)
        }
        for name, stored in formats.items()
    }


@pytest.fixture(scope="module")
def errors():
    return table(*material())


def test_the_gradient_with_int8_is_that_of_the_teacher(errors):
    found = errors["int8 with the two largest"]
    assert found["DKD, β 8", 4.0] < 0.006
    assert all(value < 0.006 for value in found.values()), found
    assert all(
        value < found_plain
        for value, found_plain in zip(found.values(), errors["int8 alone"].values(), strict=True)
    )


def test_the_gradient_with_half_precision_is_closer(errors):
    assert all(value < 2e-3 for value in errors["fp16"].values())


def test_what_top_k_throws_away_matters_to_dkd(errors):
    assert errors["top 5"]["DKD, β 8", 4.0] > 0.25
    assert errors["top 16"]["DKD, β 8", 4.0] > 0.15


if __name__ == "__main__":  # the table of docs/teacher-cache.md
    for name, row in table(*material()).items():
        print("|", " | ".join([name, *(f"{100 * value:.2f}" for value in row.values())]), "|")
