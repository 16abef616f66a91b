"""ReviewKD: the hierarchical context loss by loops, the fusion by hand, shapes of unlike models."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mdistiller import Distiller, create_model, tap
from mdistiller.errors import ConfigError
from mdistiller.functional import hcl_loss
from mdistiller.methods import ReviewKDConfig
from mdistiller.methods.reviewkd import ABF
from mdistiller.types import Batch

CONTRACT = set()


def maps(side, dtype=torch.float64):
    generator = torch.Generator().manual_seed(side)
    return (torch.randn(2, 3, side, side, generator=generator, dtype=dtype) for _ in range(2))


def pooled(x, grid):
    """Averages of a numpy map [H, W] over a grid of equal cells."""
    size = x.shape[0] // grid
    return np.array(
        [
            [x[i * size : (i + 1) * size, j * size : (j + 1) * size].mean() for j in range(grid)]
            for i in range(grid)
        ]
    )


# The grids that are coarser than the map, and the weights of the map and of these.
@pytest.mark.parametrize(
    ("side", "grids", "weights"),
    [(8, [4, 2, 1], [1, 0.5, 0.25, 0.125]), (4, [2, 1], [1, 0.5, 0.25]), (2, [1], [1, 0.5]), (1, [], [1])],
)
def test_value_by_loops(side, grids, weights):
    s, t = maps(side)
    errors = np.zeros(len(weights))
    for b in range(2):
        for c in range(3):
            a, d = s[b, c].numpy(), t[b, c].numpy()
            errors[0] += ((a - d) ** 2).mean() / 6
            for i, grid in enumerate(grids):
                errors[i + 1] += ((pooled(a, grid) - pooled(d, grid)) ** 2).mean() / 6
    expected = (errors * weights).sum() / sum(weights)
    assert hcl_loss([s], [t]).item() == pytest.approx(expected, rel=1e-12)
    assert hcl_loss([s, s], [t, t]).item() == pytest.approx(2 * expected, rel=1e-12)
    assert hcl_loss([t], [t]) == 0


def test_the_height_alone_decides_on_the_grids():
    """A map of 8 x 2 has the grids of 4, 2 and 1 like the authors': two columns are four cells twice."""
    s, t = (x[..., :2] for x in maps(8))
    difference = (s - t).numpy()
    rows = difference.reshape(2, 3, 4, 2, 2).mean(3)
    errors = [difference, rows, rows.reshape(2, 3, 2, 2, 2).mean(3), difference.mean((2, 3))]
    weights = [1, 0.5, 0.25, 0.125]
    expected = sum(w * (e**2).mean() for w, e in zip(weights, errors, strict=True)) / sum(weights)
    assert hcl_loss([s], [t]).item() == pytest.approx(expected, rel=1e-12)


def test_bad_input():
    s, t = maps(4)
    with pytest.raises(ConfigError, match="one length, at least 1; got 0 and 0"):
        hcl_loss([], [])
    with pytest.raises(ConfigError, match=r"got \[2, 3, 4, 4\] and \[2, 2, 4, 4\]"):
        hcl_loss([s], [t[:, :2]])
    with pytest.raises(ConfigError, match=r"one shape \[B, C, H, W\]"):
        hcl_loss([s[:, :, 0, 0]], [t[:, :, 0, 0]])


def test_fusion_weighs_both_by_attention():
    torch.manual_seed(0)
    fusion = ABF(3, 4, 5, fuse=True).eval()
    x, deeper = torch.randn(2, 3, 4, 4), torch.randn(2, 4, 2, 2)
    out, handed_on = fusion(x, deeper, torch.Size((8, 8)))
    own, above = fusion.enter(x), deeper.repeat_interleave(2, 2).repeat_interleave(2, 3)
    gate = fusion.attention[0]
    for b, h, w in np.ndindex(2, 4, 4):
        both = torch.cat([own[b, :, h, w], above[b, :, h, w]])
        shares = torch.sigmoid(gate.weight[:, :, 0, 0] @ both + gate.bias)
        expected = own[b, :, h, w] * shares[0] + above[b, :, h, w] * shares[1]
        torch.testing.assert_close(handed_on[b, :, 2 * h, 2 * w], expected)
        torch.testing.assert_close(handed_on[b, :, 2 * h + 1, 2 * w + 1], expected)
    torch.testing.assert_close(out, fusion.leave(handed_on))
    assert out.shape == (2, 5, 8, 8)


def build(teacher, student, config=None, **options):
    torch.manual_seed(0)
    models = create_model(student, num_classes=4), create_model(teacher, num_classes=4, **options)
    return Distiller(*models, config or "reviewkd")


def test_taps_are_stages_against_pre_activations_and_pooled():
    method = build("resnet20", "vgg8").method
    assert method.student_taps == ("stage2", "stage3", "stage4", "pooled")
    assert method.teacher_taps == ("stage1.preact", "stage2.preact", "stage3.preact", "pooled")
    assert method.student_shapes[-1] == (2, 512, 1, 1)
    assert [f.attention is None for f in method.fusions] == [False, False, False, True]


@pytest.mark.parametrize(("limit", "middle"), [(512, 64), (32, 32)])
def test_fusion_is_as_wide_as_the_deepest_feature_within_the_limit(limit, middle):
    method = build("resnet20", "resnet8", ReviewKDConfig(max_mid_channel=limit)).method
    assert {f.enter[0].out_channels for f in method.fusions} == {middle}
    assert [f.leave[0].out_channels for f in method.fusions] == [16, 32, 64, 64]


def test_every_teacher_s_stage_guides_the_student_s_and_the_deeper_ones():
    distiller = build("resnet20", "resnet8").eval()
    method, image, label = distiller.method, torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    s = tap(distiller.student, method.student_taps)(image)
    t = distiller.asked(Batch(image, label, label))
    features, targets = method.read(s, t)
    deeper, expected = None, 0.0
    for x, target, fusion in zip(features[::-1], targets[::-1], list(method.fusions)[::-1], strict=True):
        out, deeper = fusion(x, deeper, target.shape[2:])
        expected += hcl_loss([out], [target])
    got = distiller(image, label, progress=1.0).losses["reviewkd"]
    torch.testing.assert_close(got, expected)


def test_warm_up_and_weight():
    distiller = build("resnet20", "resnet8", ReviewKDConfig(weight=5.0, warmup=0.5)).eval()
    image, label = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    losses = [distiller(image, label, progress=p).losses["reviewkd"].item() for p in (0.0, 0.25, 0.5, 1.0)]
    assert losses == [0, pytest.approx(losses[2] / 2), losses[2], losses[2]]
    plain = build("resnet20", "resnet8").eval()(image, label, progress=1.0).losses["reviewkd"].item()
    assert losses[2] == pytest.approx(5 * plain)


def test_a_transformer_teaches():
    options = {"img_size": 32, "patch_size": 4, "depth": 6}
    distiller = build("timm/vit_tiny_patch16_224", "resnet8", **options)
    method = distiller.method
    assert method.teacher_taps == ("stage2", "stage4", "stage6", "pooled")
    assert [s[1:] for s in method.teacher_shapes] == [(192, 8, 8)] * 3 + [(192, 1, 1)]
    loss = distiller(
        torch.randn(2, 3, 32, 32), F.one_hot(torch.tensor([0, 1]), 4).float(), progress=1.0
    ).losses["reviewkd"]
    assert loss > 0
