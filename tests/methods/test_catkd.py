"""CAT-KD: the loss by loops, and the class activation maps against the models' own logits."""

import numpy as np
import pytest
import torch

from mdistiller import Distiller, create_model, tap
from mdistiller.errors import ConfigError
from mdistiller.functional import catkd_loss
from mdistiller.methods import CATKDConfig
from mdistiller.methods.catkd import activation_maps
from mdistiller.types import Batch

CONTRACT = {"convolutional teacher", "zero at equal"}


def cams(dtype=torch.float64, shapes=((2, 3, 4, 4), (2, 3, 8, 8))):
    torch.manual_seed(0)
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("resolution", [1, 2, 4])
def test_value_by_loops(normalize, resolution):
    s, t = cams()
    total = 0.0
    for b in range(2):
        for k in range(3):
            grids = []
            for x in (s[b, k].numpy(), t[b, k].numpy()):
                n = len(x) // resolution
                grid = x.reshape(resolution, n, resolution, n).mean((1, 3))
                grids.append(grid / np.sqrt((grid**2).sum()) if normalize else grid)
            total += ((grids[0] - grids[1]) ** 2).mean() / 6
    got = catkd_loss(s, t, resolution=resolution, normalize=normalize)
    assert got.item() == pytest.approx(total, rel=1e-8)


def test_zero_for_equal_maps_and_for_scaled_ones_when_normalized():
    s, _ = cams()
    assert catkd_loss(s, s) == 0
    assert catkd_loss(3 * s, s) < 1e-20
    assert catkd_loss(3 * s, s, normalize=False) > 0.1


def test_bad_input():
    s, t = cams()
    with pytest.raises(ConfigError, match=r"one B and C; got \[2, 3, 4, 4\] and \[2, 2, 8, 8\]"):
        catkd_loss(s, t[:, :2])
    with pytest.raises(ConfigError, match=r"\[B, C, H, W\]"):
        catkd_loss(s[0], t[0])


def test_maps_are_the_classifier_at_every_position():
    feature, weight = torch.randn(2, 5, 8, 8), torch.randn(3, 5)
    at_every_position = torch.einsum("kd,bdhw->bkhw", weight, feature)
    expected = torch.nn.functional.adaptive_avg_pool2d(at_every_position, 2)
    torch.testing.assert_close(activation_maps(feature, weight, 2), expected)


def build(teacher="resnet20", student="resnet8", config=None):
    torch.manual_seed(0)
    models = create_model(student, num_classes=4), create_model(teacher, num_classes=4)
    return Distiller(*models, config or "catkd")


@pytest.mark.parametrize("student", ["resnet8", "wrn_16_1", "vgg8", "ShuffleV1", "ShuffleV2", "MobileNetV2"])
def test_the_means_of_the_maps_are_the_logits_less_the_bias(student):
    config = CATKDConfig(resolution=1, normalize=False, weight=1.0)
    distiller = build(student=student, config=config).eval()
    image, label = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    bias = [distiller.method._student_head[0].bias, distiller.method._teacher_head[0].bias]
    s, t = distiller.student(image) - bias[0], distiller.teacher.eval()(image) - bias[1]
    got = distiller(image, label).losses["catkd"]
    torch.testing.assert_close(got, (s - t).square().mean(), rtol=1e-4, atol=1e-6)


def test_it_trains_the_student_s_classifier_and_nothing_of_its_own():
    distiller = build()
    assert not list(distiller.method.parameters())
    assert set(distiller.state_dict()) == {f"student.{k}" for k in distiller.student.state_dict()}
    distiller(torch.randn(2, 3, 32, 32), torch.tensor([0, 1])).losses["catkd"].backward()
    assert distiller.student.fc.weight.grad.abs().max() > 0
    assert distiller.student.conv1.weight.grad.abs().max() > 0
    assert distiller.student.fc.bias.grad is None


def test_autocast_does_not_touch_the_maps():
    distiller = build().eval()
    method, label = distiller.method, torch.tensor([0, 1])
    image = torch.randn(2, 3, 32, 32)
    batch = Batch(image, label, label)
    s, t = tap(distiller.student, method.student_taps)(image), distiller.asked(batch)
    plain = method(s, t, batch, torch.tensor(1.0))["catkd"]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(method(s, t, batch, torch.tensor(1.0))["catkd"], plain, rtol=0, atol=0)


def test_models_without_such_maps_are_refused():
    vit = create_model("timm/vit_tiny_patch16_224", num_classes=4, img_size=32, patch_size=4, depth=1)
    with pytest.raises(ConfigError, match="VisionTransformer has no tap 'last_map', a feature map"):
        Distiller(create_model("resnet8", num_classes=4), vit, "catkd")
    config = CATKDConfig(student_taps=("stage2",), teacher_taps=("last_map",))
    with pytest.raises(ConfigError, match=r"reads one map \[B, 64, H, W\].*\['stage2'\].*\[2, 32, 16, 16\]"):
        build(config=config)
