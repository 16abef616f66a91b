"""SDD against loops over regions, and against its plain base."""

import pytest
import torch
from torch import nn

from mdistiller.errors import ConfigError
from mdistiller.functional import dkd_loss, kd_loss
from mdistiller.methods import DKDConfig, SDDConfig, get_method, method_config
from mdistiller.methods.compose import build_method
from mdistiller.methods.sdd import region_weights
from mdistiller.models import create_model
from mdistiller.taps import tap
from mdistiller.types import Batch, DataInfo

CONTRACT = {"convolutional teacher", "zero at equal"}

CLASSES = 4
DATA = DataInfo((3, 16, 16))


@pytest.fixture(scope="module")
def outputs():
    torch.manual_seed(0)
    student, teacher = create_model("resnet8", num_classes=CLASSES), create_model("vgg8", num_classes=CLASSES)
    image = 3 * torch.randn(8, 3, 16, 16)
    models = []
    for model in (student, teacher):
        model.double().eval()
        head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        nn.init.normal_(head.weight, std=4.0)
        models.append((model, head, tap(model, ["last_map"])(image.double())))
    return models


def losses(outputs, name="sdd", label=None, progress=1.0, **settings):
    (student, _, s), (teacher, _, t) = outputs
    method = build_method(method_config(name, **settings), student, teacher, DATA)
    label = torch.arange(8) % CLASSES if label is None else label
    batch = Batch(torch.empty(0), label, torch.empty(0))
    return method(s, t, batch, torch.tensor(progress)), method


def cells(feature, scale):
    """Means over the cells of a grid, for sides that the scale divides."""
    side = feature.shape[2] // scale
    for i in range(scale):
        for j in range(scale):
            yield feature[:, :, i * side : (i + 1) * side, j * side : (j + 1) * side].mean((2, 3))


def test_losses_are_the_weighted_mean_over_regions(outputs):
    (_, s_head, s), (_, t_head, t) = outputs
    assert (s.features["last_map"].shape[2:], t.features["last_map"].shape[2:]) == ((4, 4), (2, 2))
    label = torch.arange(8) % CLASSES
    total, count, seen = 0.0, 0, set()
    for scale in (1, 2):
        regions = zip(cells(s.features["last_map"], scale), cells(t.features["last_map"], scale), strict=True)
        for s_cell, t_cell in regions:
            s_logits, t_logits = s_head(s_cell), t_head(t_cell)
            for b in range(8):
                local, whole = t_logits[b].argmax() == label[b], t.logits[b].argmax() == label[b]
                weight = 1.0 if local == whole else 3.0
                seen.add((bool(local), bool(whole)))
                one = slice(b, b + 1)
                total += weight * dkd_loss(s_logits[one], t_logits[one], label[one]).item()
                count += 1
    assert len(seen) == 4
    got, _ = losses(outputs, "sdd-dkd", scales=(1, 2), complementary_weight=3.0)
    assert got["dkd"].item() == pytest.approx(total / count, rel=1e-9)


def test_one_region_is_the_base(outputs):
    (_, _, s), (_, _, t) = outputs
    got, _ = losses(outputs, scales=(1,))
    torch.testing.assert_close(got["kd"], 0.9 * kd_loss(s.logits, t.logits))
    label = torch.arange(8) % CLASSES
    base = DKDConfig(task_weight=0.0, beta=2.0, warmup=0.5)
    got, _ = losses(outputs, "sdd-dkd", scales=(1,), base=base, progress=0.25)
    torch.testing.assert_close(got["dkd"], 0.5 * dkd_loss(s.logits, t.logits, label, beta=2.0))


def test_more_cells_than_pixels_repeat_them(outputs):
    coarse, _ = losses(outputs, scales=(2,))
    (_, _, s), (_, _, t) = outputs
    assert t.features["last_map"].shape[2] == 2
    fine, method = losses(outputs, scales=(4,))
    assert s.features["last_map"].shape[2] == 4
    assert torch.isfinite(fine["kd"])
    assert fine["kd"] != coarse["kd"]
    assert (method.student_taps, method.teacher_taps) == (("last_map",), ("last_map",))


def test_one_hot_labels_give_what_class_ids_give(outputs):
    label = torch.arange(8) % CLASSES
    hard, _ = losses(outputs, label=label)
    soft, _ = losses(outputs, label=nn.functional.one_hot(label, CLASSES).double())
    torch.testing.assert_close(hard["kd"], soft["kd"])


def test_soft_labels_weigh_in_expectation():
    regions = torch.eye(CLASSES)[[0, 1, 2]][None]
    whole = torch.eye(CLASSES)[1:2]
    label = torch.tensor([[0.1, 0.6, 0.3, 0.0]])
    got = region_weights(regions, whole, label, 2.0)
    wanted = sum(p * region_weights(regions, whole, torch.tensor([c]), 2.0) for c, p in enumerate(label[0]))
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(got, torch.tensor([[1.7, 1.0, 1.9]]))


def test_classifiers_are_no_parts_of_the_method_and_the_student_s_learns(outputs):
    (_, s_head, _), (teacher, _, _) = outputs
    got, method = losses(outputs)
    assert not list(method.parameters())
    assert not method.state_dict()
    (grad,) = torch.autograd.grad(got["kd"], s_head.weight, retain_graph=True)
    assert (grad != 0).any()
    for p in teacher.parameters():
        assert torch.autograd.grad(got["kd"], p, retain_graph=True, allow_unused=True) == (None,)


def test_region_logits_keep_precision_under_autocast(outputs):
    exact, _ = losses(outputs)
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = losses(outputs)
    torch.testing.assert_close(inside["kd"], exact["kd"], rtol=0, atol=0)


def test_bad_input(outputs):
    with pytest.raises(ConfigError, match=r"'sdd' wraps methods whose loss is a mean over samples.*'mlkd'"):
        get_method("sdd-mlkd")
    with pytest.raises(ValueError, match="scales"):
        SDDConfig(scales=(), base=method_config("kd", task_weight=0.0))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, CLASSES))
    config = method_config("sdd")
    with pytest.raises(ConfigError, match="no tap 'last_map'"):
        build_method(config, create_model("resnet8", num_classes=CLASSES), flat, DATA)
