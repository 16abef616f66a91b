"""OFA: the loss by loops and its relation to KD, and the projectors of maps and tokens."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import nn

from mdistiller import Distiller, create_model, tap
from mdistiller.errors import ConfigError
from mdistiller.functional import kd_loss, ofa_loss
from mdistiller.methods import OFAConfig
from mdistiller.methods.ofa import TokenProjector, map_projector

CONTRACT = set()


def logits(dtype=torch.float64):
    torch.manual_seed(0)
    s, t = 3 * torch.randn(2, 5, 7, dtype=dtype)
    return s, t, torch.randint(0, 7, (5,))


@pytest.mark.parametrize("gamma", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_by_loops(gamma, temperature):
    s, t, y = logits()
    total = 0.0
    for a, b, target in zip(s.numpy(), t.numpy(), y, strict=True):
        log_q, p = log_softmax(a / temperature), np.exp(log_softmax(b / temperature))
        for c in range(7):
            weight = (1 + p[c]) ** gamma - 1 if c == target else p[c] ** gamma
            total -= weight * log_q[c] / 5
    assert ofa_loss(s, t, y, gamma=gamma, temperature=temperature).item() == pytest.approx(total, rel=1e-12)


def test_gamma_one_is_kd_up_to_the_teacher_s_entropy():
    s, t, y = logits()
    entropy = -(t.softmax(1) * t.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(ofa_loss(s, t, y) - entropy, kd_loss(s, t, temperature=1.0))


def test_gamma_enhances_the_target_of_a_confident_teacher():
    s, _, y = logits()
    certain = 100.0 * nn.functional.one_hot(y, 7).double()
    cross_entropy = nn.functional.cross_entropy(s, y)
    # (1 + 1)^γ − 1
    torch.testing.assert_close(ofa_loss(s, certain, y, gamma=2.0), 3 * cross_entropy)


def test_soft_labels_are_the_expectation_over_classes():
    s, t, y = logits()
    soft = torch.rand(5, 7, dtype=torch.float64).softmax(1)
    expected = 0.0
    for b in range(5):
        for c in range(7):
            one = ofa_loss(s[b : b + 1], t[b : b + 1], torch.tensor([c]), gamma=1.5)
            expected += soft[b, c] * one / 5
    torch.testing.assert_close(ofa_loss(s, t, soft, gamma=1.5), expected)
    one_hot = nn.functional.one_hot(y, 7).double()
    assert ofa_loss(s, t, one_hot, gamma=1.5) == ofa_loss(s, t, y, gamma=1.5)


def test_bad_input():
    s, t, y = logits()
    with pytest.raises(ConfigError, match=r"one shape \[..., C\]"):
        ofa_loss(s, t[:, :6], y)
    with pytest.raises(ConfigError, match=r"class ids int64 \[5\].*got torch.float64 \[5\]"):
        ofa_loss(s, t, y.double())
    with pytest.raises(ConfigError, match=r"got torch.int64 \[4\]"):
        ofa_loss(s, t, y[:4])
    with pytest.raises(ConfigError, match="temperature must be positive"):
        ofa_loss(s, t, y, temperature=0.0)


def test_maps_are_halved_once_for_every_deeper_stage():
    projector = map_projector(8, 64, 2, 10)
    image = torch.randn(2, 8, 16, 16)
    sizes = [image.shape]
    for layer in projector:
        image = layer(image)
        sizes.append(image.shape)
    convolutions = [(m.in_channels, m.out_channels) for m in projector if isinstance(m, nn.Conv2d)]
    # Two blocks of two separable convolutions; the width doubles in between and ends at 64.
    assert convolutions == [(8, 8), (8, 8), (8, 8), (8, 16), (16, 16), (16, 16), (16, 16), (16, 64)]
    assert {s[2:] for s in sizes if len(s) == 4} == {(16, 16), (8, 8), (4, 4), (1, 1)}
    assert sizes[-1] == (2, 10)
    last = map_projector(8, 64, 0, 10)
    assert [type(m) for m in last] == [nn.Conv2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]


@pytest.mark.parametrize(
    ("grid", "prefix", "merges"),
    [((8, 8), 1, 0), ((14, 14), 1, 1), ((8, 8), 0, 0), ((28, 28), 0, 2), ((14, 14), 5, 1), ((28, 14), 0, 1)],
)
def test_patches_are_merged_down_to_about_seven_by_seven(grid, prefix, merges):
    projector = TokenProjector((2, 8, *grid), prefix, 8, 1, 10)
    assert (len(projector.merge), len(projector.blocks)) == (merges, 1)
    front = [torch.randn(2, prefix, 8)] if prefix else []
    assert projector(torch.randn(2, 8, *grid), *front).shape == (2, 10)


def test_merging_takes_squares_of_four_patches():
    merge = TokenProjector((2, 1, 14, 28), 0, 1, 1, 2).merge[0]
    merge.norm = nn.Identity()
    row, column = torch.meshgrid(torch.arange(14.0), torch.arange(28.0), indexing="ij")
    seen = []
    merge.reduce.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert merge((100 * row + column).reshape(1, 1, 14, 28)).shape == (1, 1, 7, 14)
    # The patches (2, 4), (2, 5), (3, 4), (3, 5) become the one in row 1, column 2.
    assert seen[0][0, 1, 2].tolist() == [204, 205, 304, 305]


def build(student, config=None, teacher="resnet20", **options):
    torch.manual_seed(0)
    models = create_model(student, num_classes=4, **options), create_model(teacher, num_classes=4)
    return Distiller(*models, config or "ofa")


def test_each_stage_and_the_logits_have_a_gamma():
    config = OFAConfig(gamma=(1.0, 1.2, 1.4, 2.0), weight=0.5, logit_weight=3.0, temperature=2.0)
    distiller = build("resnet8", config).eval()
    image, label = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    losses = distiller(image, label).losses
    method = distiller.method
    s, t = tap(distiller.student, method.student_taps)(image), distiller.teacher.eval()(image)
    expected = 0.0
    for i, gamma in enumerate((1.0, 1.2, 1.4)):
        prediction = method.projectors[i](s.features[f"stage{i + 1}"])
        expected += 0.5 * ofa_loss(prediction, t, label, gamma=gamma, temperature=2.0)
    torch.testing.assert_close(losses["ofa"], expected)
    last = 3 * ofa_loss(s.logits, t, label, gamma=2.0, temperature=2.0)
    torch.testing.assert_close(losses["ofa_logits"], last)
    with pytest.raises(ConfigError, match=r"one value, or 4: .*; got 2"):
        build("resnet8", OFAConfig(gamma=(1.0, 2.0)))


def test_a_transformer_learns_from_four_of_its_blocks():
    options = {"img_size": 32, "patch_size": 4, "depth": 6, "embed_dim": 24}
    distiller = build("timm/vit_tiny_patch16_224", **options)
    method = distiller.method
    assert method.student_taps == ("stage2", "stage3", "stage5", "stage6")
    assert [len(p.blocks) for p in method.projectors] == [3, 2, 1, 1]
    losses = distiller(torch.randn(2, 3, 32, 32), torch.tensor([0, 1])).losses
    losses["ofa"].backward()
    assert all(p.grad is not None for p in method.parameters())


def test_the_wider_model_sets_the_projectors_width():
    method = build("resnet8", teacher="vgg8").method
    assert [p[-1].in_features for p in method.projectors] == [512, 512, 512]
