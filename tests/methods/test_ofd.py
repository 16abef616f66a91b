"""OFD: the partial distance and the margins by loops and integrals, and the batch norms found in the zoo."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import nn

from mdistiller import Batch, Distiller, create_model, tap
from mdistiller.errors import ConfigError
from mdistiller.functional import ofd_loss, ofd_margin
from mdistiller.methods import OFDConfig
from mdistiller.methods.ofd import preceding_norms
from mdistiller.models import list_models
from mdistiller.models.cifar import resnetv2

CONTRACT = {"convolutional teacher"}

IMAGE = (3, 32, 32)


def features(dtype=torch.float64, shape=(3, 4, 2, 5)):
    torch.manual_seed(0)
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), -torch.rand(4, dtype=dtype)


def batch_norm(weight, bias):
    layer = nn.BatchNorm2d(len(weight))
    layer.weight.data = torch.tensor(weight)
    layer.bias.data = torch.tensor(bias)
    return layer


def test_value_by_loops():
    s, t, m = features()
    total = 0.0
    for b, c, h, w in np.ndindex(*s.shape):
        student = s[b, c, h, w].item()
        teacher = max(t[b, c, h, w].item(), m[c].item())
        if teacher > 0 or student > teacher:
            total += (student - teacher) ** 2
    assert ofd_loss(s, t, m).item() == pytest.approx(total / 3, rel=1e-12)


def test_what_is_off_in_both_is_free():
    t = torch.tensor([2.0, 0.0, -0.1, -5.0]).view(1, 4, 1, 1)
    m = torch.full((4,), -1.0)
    s = torch.tensor([2.0, -3.0, -0.1, -1.5]).view(1, 4, 1, 1)
    assert ofd_loss(s, t, m) == 0
    # The teacher's −5 asks for no more than the margin.
    assert ofd_loss(s.clamp(min=-0.5), t, m).item() == pytest.approx(0.25)
    assert ofd_loss(s - 1, t, m).item() == pytest.approx(1.0)


def test_margin_is_the_mean_of_the_negative_part():
    weight, bias = [1.0, 0.5, -2.0, 0.3], [0.0, 0.7, -1.0, -4.0]
    got = ofd_margin(batch_norm(weight, bias))
    for m, w, b in zip(got, weight, bias, strict=True):
        mean = quad(lambda x, b=b, w=w: x * norm.pdf(x, b, abs(w)), b - 12 * abs(w), min(0, b + 12 * abs(w)))
        assert m.item() == pytest.approx(mean[0] / norm.cdf(0, b, abs(w)), rel=1e-6)
    assert not got.requires_grad


def test_margins_of_rare_negatives_and_of_dead_channels():
    got = ofd_margin(batch_norm([0.5, 0.5, 0.0, 0.0, 0.0], [1.5, 1.6, -1.0, 1.0, 0.0]))
    # 1.5 / 0.5: one in 741 is negative; 1.6 / 0.5: one in 1455.
    assert -0.2 < got[0] < 0
    torch.testing.assert_close(got[1:], torch.tensor([-1.5, -1.0, 0.0, 0.0]))
    plain = ofd_margin(nn.BatchNorm2d(2, affine=False))
    torch.testing.assert_close(plain, torch.full((2,), -math.sqrt(2 / math.pi)))


def test_bad_input():
    s, t, m = features()
    with pytest.raises(ConfigError, match=r"one shape \[B, C, H, W\]; got .*\[3, 4, 2, 4\]"):
        ofd_loss(s, t[..., :4], m)
    with pytest.raises(ConfigError, match=r"margin must be \[4\]; got \[3\]"):
        ofd_loss(s, t, m[:3])


# For each model, the batch norm in front of every pre-activation.
NORMS = {
    "resnet8": ["layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2"],
    "resnet32x4": ["layer1.4.bn2", "layer2.4.bn2", "layer3.4.bn2"],
    "ResNet18": ["layer1.1.bn2", "layer2.1.bn2", "layer3.1.bn2", "layer4.1.bn2"],
    "ResNet50": ["layer1.2.bn3", "layer2.3.bn3", "layer3.5.bn3", "layer4.2.bn3"],
    "wrn_16_2": ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"],
    "vgg8": ["block1.1", "block2.1", "block3.1", "block4.1"],
    "vgg13": ["block1.4", "block2.4", "block3.4", "block4.4"],
    "MobileNetV2": ["blocks.1.1.conv.7", "blocks.2.2.conv.7", "blocks.4.2.conv.7", "blocks.6.0.conv.7"],
    "ShuffleV1": ["layer1.3.bn3", "layer2.7.bn3", "layer3.3.bn3"],
    "ShuffleV2": ["layer1.3.bn3", "layer2.7.bn3", "layer3.3.bn3"],
    "torchvision/resnet18": ["layer1.1.bn2", "layer2.1.bn2", "layer3.1.bn2", "layer4.1.bn2"],
    "torchvision/resnet50": ["layer1.2.bn3", "layer2.3.bn3", "layer3.5.bn3", "layer4.2.bn3"],
    "torchvision/vgg11_bn": ["features.5", "features.12", "features.19", "features.26"],
    "timm/resnet18": ["layer1.1.bn2", "layer2.1.bn2", "layer3.1.bn2", "layer4.1.bn2"],
}


@pytest.mark.parametrize("name", NORMS)
def test_batch_norms_in_front_of_the_pre_activations(name):
    with torch.device("meta"):
        model = create_model(name, num_classes=4)
    found = preceding_norms(model, [f"stage{i + 1}.preact" for i in range(len(NORMS[name]))], IMAGE)
    paths = {module: path for path, module in model.named_modules()}
    assert [paths[norm] for norm in found] == NORMS[name]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", [n for n in list_models() if n not in NORMS])
def test_every_model_of_the_zoo_can_teach(name):
    with torch.device("meta"):
        model = create_model(name, num_classes=4)
    taps = [name for name in model.tap_points if name.endswith(".preact")]
    assert len(set(preceding_norms(model, taps, IMAGE))) == len(taps) >= 3


def test_a_projected_shortcut_is_not_taken_for_the_block():
    # Its batch norm runs last, after the block's own.
    model = resnetv2.ResNet(resnetv2.BasicBlock, [1, 1, 1, 1], 4)
    found = preceding_norms(model, ["stage2.preact"], IMAGE)
    assert found == [model.layer2[0].bn2]


def test_concatenated_channels_have_no_margin():
    teacher = create_model("ShuffleV2", num_classes=4)
    method = Distiller(create_model("resnet8", num_classes=4), teacher, "ofd").method
    margin = method.margin0
    assert margin.shape == (116,)
    assert (margin[:58] == 0).all()
    torch.testing.assert_close(margin[58:], ofd_margin(teacher.layer1[3].bn3))


def test_a_teacher_without_batch_norms_is_refused():
    teacher = create_model("timm/vit_tiny_patch16_224", num_classes=4, img_size=32, patch_size=4, depth=3)
    with pytest.raises(ConfigError, match=r"VisionTransformer has none of 192 channels in front of 'stage1'"):
        Distiller(create_model("resnet8", num_classes=4), teacher, "ofd")
    with pytest.raises(ConfigError, match=r"compares maps \[B, C, H, W\]; 'pooled' is \[2, 64\]"):
        Distiller(
            create_model("resnet8", num_classes=4),
            create_model("resnet20", num_classes=4),
            OFDConfig(student_taps=("pooled",), teacher_taps=("stage3.preact",)),
        )


def test_the_last_stages_are_matched_and_weigh_twice_the_one_before():
    torch.manual_seed(0)
    student, teacher = create_model("resnet8", num_classes=4), create_model("vgg8", num_classes=4)
    distiller = Distiller(student, teacher, OFDConfig(weight=1.0)).eval()
    method = distiller.method
    assert method.student_taps == ("stage1.preact", "stage2.preact", "stage3.preact")
    assert method.teacher_taps == ("stage2.preact", "stage3.preact", "stage4.preact")
    assert not any("margin" in key for key in distiller.state_dict())
    image, label = torch.randn(2, *IMAGE), torch.tensor([0, 1])
    got = distiller(image, label).losses["ofd"]
    s = tap(student, method.student_taps)(image).features
    t = distiller.asked(Batch(image, label, label)).features
    expected = 0.0
    for i, weight in enumerate([0.25, 0.5, 1.0]):
        mapped = method.connectors[i](s[f"stage{i + 1}.preact"])
        target = nn.functional.adaptive_avg_pool2d(t[f"stage{i + 2}.preact"], mapped.shape[2:])
        expected += weight * ofd_loss(mapped, target, ofd_margin(teacher.get_submodule(f"block{i + 2}")[1]))
    torch.testing.assert_close(got, expected)
