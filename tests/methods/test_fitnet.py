"""FitNet: the regressor for every pair of sizes, the value of the loss, the taps."""

import numpy as np
import pytest
import torch
from torch import nn

from mdistiller import Distiller, create_model, tap
from mdistiller.errors import ConfigError
from mdistiller.methods import FitNet, FitNetConfig
from mdistiller.methods.fitnet import regressor
from mdistiller.types import Batch, DataInfo

CONTRACT = set()

SIZES = {  # student's (H, W), teacher's, the layers, the convolution's kernel
    "equal": ((8, 8), (8, 8), [nn.Conv2d], (1, 1)),
    "half": ((8, 8), (4, 4), [nn.Conv2d], (3, 3)),
    "double": ((4, 4), (8, 8), [nn.ConvTranspose2d], (4, 4)),
    "a third": ((9, 9), (3, 3), [nn.Conv2d], (7, 7)),
    "a little smaller, oblong": ((8, 6), (7, 6), [nn.Conv2d], (2, 1)),
    "half of one side": ((8, 4), (4, 4), [nn.Conv2d], (5, 1)),
    "larger": ((4, 4), (7, 7), [nn.Upsample, nn.Conv2d], (1, 1)),
    "larger on one side": ((4, 8), (8, 4), [nn.Upsample, nn.Conv2d], (1, 1)),
}


@pytest.mark.parametrize("case", SIZES)
def test_the_regressor_fits(case):
    student, teacher, kinds, kernel = SIZES[case]
    layers = regressor((2, 3, *student), (2, 5, *teacher), relu=True)
    assert [type(layer) for layer in layers] == [*kinds, nn.BatchNorm2d, nn.ReLU]
    assert layers[len(kinds) - 1].kernel_size == kernel
    out = layers(torch.randn(2, 3, *student))
    assert out.shape == (2, 5, *teacher)
    assert out.min() == 0


def test_without_relu_negative_hints_can_be_met():
    layers = regressor((2, 3, 4, 4), (2, 5, 4, 4), relu=False)
    assert not any(isinstance(layer, nn.ReLU) for layer in layers)
    assert layers(torch.randn(2, 3, 4, 4)).min() < 0


def test_vectors_are_no_hints():
    with pytest.raises(ConfigError, match=r"feature maps.*\[2, 3\] and \[2, 5, 4, 4\]"):
        regressor((2, 3), (2, 5, 4, 4), relu=True)


def pair(student="resnet8", teacher="resnet8x4"):
    torch.manual_seed(0)
    return create_model(student, num_classes=5), create_model(teacher, num_classes=5)


def test_the_loss_is_the_mean_squared_error_at_the_second_stage():
    distiller = Distiller(*pair(), FitNetConfig(weight=7.0)).eval()
    method = distiller.method
    assert method.student_taps == method.teacher_taps == ("stage2",)
    image, label = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    with torch.no_grad():
        got = distiller(image, label).losses["fitnet"].item()
        student = tap(distiller.student, ["stage2"])(image).features["stage2"].numpy()
        teacher = distiller.asked(Batch(image, label, label)).features["stage2"].numpy()
    convolution, norm, _ = method.regressors[0]
    weight, bias = convolution.weight.detach().numpy()[:, :, 0, 0], convolution.bias.detach().numpy()
    mapped = np.einsum("oc,bchw->bohw", weight, student) + bias[:, None, None]
    mapped = np.maximum(mapped / np.sqrt(1 + norm.eps), 0)  # fresh statistics: mean 0, variance 1
    assert got == pytest.approx(7 * ((mapped - teacher) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "taps", "parameters"),
    [
        ("resnet8x4", "resnet32x4", ("stage2", "stage2"), 128 * 128 + 3 * 128),
        ("vgg8", "ResNet50", ("stage2", "stage2"), 256 * 512 * 16 + 3 * 512),
        ("resnet8", "vgg8", ("stage2", "stage2"), 32 * 256 * 9 + 3 * 256),
    ],
)
def test_default_taps_and_sizes(student, teacher, taps, parameters):
    method = FitNet(FitNetConfig(), *pair(student, teacher), DataInfo((3, 32, 32)))
    assert (method.student_taps, method.teacher_taps) == ((taps[0],), (taps[1],))
    assert sum(p.numel() for p in method.parameters()) == parameters


def test_a_transformer_s_hint_is_as_deep_in_proportion():
    timm = pytest.importorskip("timm")
    teacher = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=5)
    student = create_model("MobileNetV2", num_classes=5)
    method = FitNet(FitNetConfig(relu=False), student, teacher, DataInfo((3, 32, 32)))
    assert (method.student_taps, method.teacher_taps) == (("stage2",), ("stage6",))
    assert method.regressors[0](torch.randn(method.student_shapes[0])).shape == (2, 192, 8, 8)


def test_several_hints_add_up():
    taps = ("stem", "stage3")
    distiller = Distiller(*pair(), FitNetConfig(student_taps=taps, teacher_taps=taps))
    image, label = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    losses = distiller(image, label).losses
    losses["fitnet"].backward()
    assert all(p.grad is not None for p in distiller.method.parameters())
    s, t = tap(distiller.student, taps)(image), distiller.asked(Batch(image, label, label))
    terms = [
        (layers(s.features[name]) - t.features[name]).square().mean()
        for layers, name in zip(distiller.method.regressors, taps, strict=True)
    ]
    torch.testing.assert_close(losses["fitnet"], 100 * sum(terms))


def test_the_error_is_taken_in_single_precision():
    distiller = Distiller(*pair(), "fitnet")
    with torch.autocast("cpu", torch.bfloat16):
        losses = distiller(torch.randn(2, 3, 32, 32), torch.tensor([0, 1])).losses
    assert losses["fitnet"].dtype == torch.float32


def test_a_hint_that_is_no_map_is_refused_when_built():
    config = FitNetConfig(student_taps=("pooled",), teacher_taps=("pooled",))
    with pytest.raises(ConfigError, match=r"fitnet needs feature maps.*\[2, 64\] and \[2, 256\]"):
        Distiller(*pair(), config)
