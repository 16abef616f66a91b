"""Images of a teacher's own, against numpy, Pillow and torchvision applied to the raw image."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import functional as vision

import mdistiller
from mdistiller import Distiller
from mdistiller.data import Augment, AugmentConfig
from mdistiller.errors import ConfigError
from mdistiller.functional import kd_loss
from mdistiller.methods import KDConfig
from mdistiller.models.external import InputConfig, tap_points
from mdistiller.models.own_input import OwnInput, find_input, own_inputs, with_own_input
from mdistiller.taps import probe, resolve, tap
from mdistiller.types import Batch

GIVEN = InputConfig((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 32)
OWN = InputConfig((0.5, 0.4, 0.3), (0.5, 0.25, 0.2))
RAW = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


class Seen(nn.Module):
    """A model that keeps its images; its logits are their means."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, image):
        self.image = image
        return self.layer(image.float().mean((2, 3)))


def students_images():
    """The raw images as a student gets them."""
    raw, count = torch.from_numpy(RAW), torch.arange(len(RAW))
    return Augment(AugmentConfig(), GIVEN.mean, GIVEN.std, 10).eval()(Batch(raw, count, count)).image


def normalized(mean, std):
    """The raw images normalized in float64, [B, 3, H, W]."""
    return ((RAW / 255.0 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)


def scaled(images, size):
    """Images scaled by Pillow, channel by channel in float32: a triangle filter, wider where they shrink."""
    return np.stack(
        [
            [np.asarray(Image.fromarray(c.astype("f4")).resize((size, size), Image.BILINEAR)) for c in image]
            for image in images
        ]
    )


def seen(own, images=None, given=GIVEN):
    model = Seen()
    with_own_input(model, given, own)(students_images() if images is None else images)
    return model.image


def test_renormalized_images_are_the_raw_ones_normalized_by_the_models_own_values():
    found = seen(OWN)
    np.testing.assert_allclose(found.numpy(), normalized(OWN.mean, OWN.std), rtol=0, atol=2e-6)
    theirs = vision.normalize(torch.from_numpy(RAW).permute(0, 3, 1, 2) / 255, OWN.mean, OWN.std)
    torch.testing.assert_close(found, theirs, rtol=0, atol=2e-6)


def test_one_of_mean_and_deviation_may_be_as_given():
    found = seen(InputConfig(mean=OWN.mean))
    np.testing.assert_allclose(found.numpy(), normalized(OWN.mean, GIVEN.std), rtol=0, atol=2e-6)
    found = seen(InputConfig(std=OWN.std))
    np.testing.assert_allclose(found.numpy(), normalized(GIVEN.mean, OWN.std), rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [12, 20, 32, 48, 57])
def test_sizes_are_those_of_pillow(size):
    own = OWN._replace(image_size=size)
    expected = scaled(normalized(OWN.mean, OWN.std), size)
    np.testing.assert_allclose(seen(own).numpy(), expected, rtol=0, atol=1e-5)
    only_size = seen(InputConfig(image_size=size))
    np.testing.assert_allclose(only_size.numpy(), scaled(normalized(*GIVEN[:2]), size), rtol=0, atol=1e-5)


def test_nothing_is_added_where_nothing_differs():
    model = Seen()
    for own in (InputConfig(), GIVEN, InputConfig(mean=GIVEN.mean), InputConfig(image_size=32)):
        assert with_own_input(model, GIVEN, own) is model
    images = students_images()
    assert seen(InputConfig(image_size=32), images, given=InputConfig()) is images  # the size is not known


@pytest.mark.parametrize("size", [None, 8, 48])
def test_layout_stays_and_precision_does_not_reach_the_images(size):
    model = Seen()
    own = with_own_input(model, GIVEN, OWN._replace(image_size=size))
    images = students_images().contiguous(memory_format=torch.channels_last)
    plain = seen(OWN._replace(image_size=size))
    with torch.autocast("cpu", torch.bfloat16):
        own(images)
    assert model.image.is_contiguous(memory_format=torch.channels_last)
    assert model.image.dtype == torch.float32
    torch.testing.assert_close(model.image, plain, rtol=0, atol=1e-5)


def test_taps_have_the_names_of_the_model():
    torch.manual_seed(0)
    model = mdistiller.create_model("resnet8", 4).eval()
    own = with_own_input(model, GIVEN, InputConfig(image_size=16))
    names = ["stage1", "layer2.0", "last_map", "pooled"]
    assert tap_points(own).keys() == tap_points(model).keys()
    assert resolve(own, names) == {k: f"model.{v}" for k, v in resolve(model, names).items()}
    images = torch.randn(2, 3, 32, 32)
    small = torch.nn.functional.interpolate(images, (16, 16), mode="bilinear", antialias=True)
    expected, found = tap(copy.deepcopy(model), names)(small), tap(copy.deepcopy(own), names)(images)
    torch.testing.assert_close(found.logits, expected.logits)
    for name in names:
        torch.testing.assert_close(found.features[name], expected.features[name])
    shape = probe(own, ["stage1"], (3, 32, 32)).features["stage1"].shape
    assert shape[2:] == (16, 16)
    with pytest.raises(mdistiller.errors.UnknownNameError, match="nearest: stage1"):
        resolve(own, ["stage11"])


def test_it_is_copied_and_pickled():
    own = with_own_input(mdistiller.create_model("resnet8", 4).eval(), GIVEN, OWN)
    images = students_images()
    for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert torch.equal(other(images), own(images))


# Values of the libraries


def test_values_of_timm_torchvision_and_transformers():
    timm = pytest.importorskip("timm")
    from torchvision.models import EfficientNet_B4_Weights

    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    half = (0.5, 0.5, 0.5)
    assert find_input(model.pretrained_cfg, "x") == (half, half, 224)
    preset = EfficientNet_B4_Weights.DEFAULT.transforms()
    expected = tuple(preset.mean), tuple(preset.std), preset.crop_size[0]
    assert find_input(EfficientNet_B4_Weights.DEFAULT, "x") == expected
    # Attributes of the image processors of transformers.
    values = {"image_mean": list(OWN.mean), "image_std": list(OWN.std), "do_normalize": True}
    vit = SimpleNamespace(**values, size={"height": 224, "width": 224})
    assert find_input(vit, "x") == (OWN.mean, OWN.std, 224)
    cropped = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
    clip = SimpleNamespace(**values, size={"shortest_edge": 256}, **cropped)
    assert find_input(clip, "x") == (OWN.mean, OWN.std, 224)
    plain = SimpleNamespace(**values | {"do_normalize": False}, size={"height": 96, "width": 96})
    assert find_input(plain, "x") == ((0.0,) * 3, (1.0,) * 3, 96)
    assert find_input({"image_size": 96}, "x") == (None, None, 96)
    assert find_input(InputConfig(image_size=96), "x") == (None, None, 96)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {},
            "got dict without any value; allowed: a mapping with mean, std and image_size, the pretr",
        ),
        (3, "got int without any value"),
        (
            {"mean": (0.5, 0.5), "std": (1, 1, 1)},
            r"mean: got \(0.5, 0.5\); allowed are 3 numbers, one for each",
        ),
        ({"mean": 0.5}, "mean: got 0.5; allowed are 3 numbers"),
        ({"mean": (0.5, 0.5, float("nan"))}, r"mean: got \(0.5, 0.5, nan\); allowed are numbers$"),
        ({"std": (0.5, 0, 0.5)}, r"std: got \(0.5, 0, 0.5\); allowed are numbers above 0"),
        ({"std": (0.5, -1, 0.5)}, "allowed are numbers above 0"),
        ({"std": (0.5, "a", 0.5)}, "allowed are 3 numbers"),
        ({"image_size": 0}, "image_size: got 0; allowed is the side of a square in pixels, 1 or more"),
        ({"image_size": -3}, "image_size: got -3"),
        ({"image_size": 2.5}, "image_size: got 2.5"),
        ({"input_size": (3, 224, 192)}, r"image_size: got \(3, 224, 192\); allowed is the side of a square"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(ConfigError, match=f"^teacher_input: .*{message}"):
        find_input(values, "teacher_input")


# In one's own loop


def pair():
    torch.manual_seed(0)
    return mdistiller.create_model("resnet8", 10), mdistiller.create_model("resnet14", 10)


def test_a_distiller_gives_the_teacher_its_own_images():
    student, teacher = pair()
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    label = torch.arange(5)
    own = OWN._replace(image_size=16)
    distiller = Distiller(student, teacher, "kd", student_input=GIVEN, teacher_input=own)
    found = distiller.eval()(students_images(), label)
    with torch.no_grad():
        small = torch.from_numpy(scaled(normalized(OWN.mean, OWN.std), 16)).float()
        expected = copy.deepcopy(teacher).eval()(small)
        logits = copy.deepcopy(student).eval()(students_images())
    config = KDConfig()
    loss = kd_loss(logits, expected, temperature=config.temperature)
    torch.testing.assert_close(found.losses["kd"], loss * config.weight, rtol=1e-4, atol=1e-6)
    # The given teacher is as it was, and is the one that is returned.
    assert distiller.teacher is teacher
    assert teacher.training
    assert not own_inputs(teacher)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not any("teacher" in name or "scale" in name for name in distiller.state_dict())


def test_a_distiller_with_a_vision_transformer_of_another_size():
    timm = pytest.importorskip("timm")
    student, _ = pair()
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64, depth=2)
    images, label = students_images(), torch.arange(5)
    with pytest.raises(ConfigError, match="cannot run on images of shape"):
        Distiller(student, teacher, "fitnet")
    given = {"mean": GIVEN.mean, "std": GIVEN.std}
    for method in ("kd", "fitnet"):
        inputs = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "image_size": 64}
        out = Distiller(student, teacher, method, student_input=given, teacher_input=inputs, total_steps=9)(
            images, label
        )
        assert out.loss.isfinite()
        out.loss.backward()


def test_a_mapping_of_inputs():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Seen()

        def forward(self, pixel_values, scale):
            return {"logits": self.model(pixel_values) * scale}

    student, teacher = Named(), Named()
    inputs = {"pixel_values": students_images(), "scale": torch.tensor(1.0)}
    label = torch.zeros(5, dtype=torch.int64)
    Distiller(student, teacher, "kd", student_input=GIVEN, teacher_input=OWN)(inputs, label)
    np.testing.assert_allclose(teacher.model.image.numpy(), normalized(OWN.mean, OWN.std), rtol=0, atol=2e-6)
    assert student.model.image is inputs["pixel_values"]


def test_arguments_of_a_distiller_that_lack_their_counterpart():
    student, teacher = pair()
    with pytest.raises(ConfigError, match=r"^student_input: teacher_input has mean, so mean and std of the"):
        Distiller(student, teacher, "kd", teacher_input=OWN)
    with pytest.raises(ConfigError, match=r"^student_input: teacher_input has std, so mean"):
        Distiller(student, teacher, "kd", teacher_input={"std": OWN.std}, student_input={"mean": OWN.mean})
    with pytest.raises(ConfigError, match=r"^student_input: got a value without teacher_input"):
        Distiller(student, teacher, "kd", student_input=GIVEN)
    with pytest.raises(ConfigError, match=r"^teacher_input: got a value without a teacher"):
        Distiller(student, None, "none", teacher_input=OWN)
    with pytest.raises(ConfigError, match=r"^teacher_input: mean: got .*; allowed are 1 numbers"):
        Distiller(student, teacher, "kd", input_shape=(1, 32, 32), student_input=GIVEN, teacher_input=OWN)
    with pytest.raises(ConfigError, match="share parameters"):
        Distiller(student, student, "kd", student_input=GIVEN, teacher_input=OWN)
    assert isinstance(Distiller(student, teacher, "kd", teacher_input={"image_size": 16}).teacher, nn.Module)
    assert OwnInput(teacher, InputConfig(), InputConfig(image_size=16)).describe() == "16 pixels"
