"""CRLD against loops over images and views."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax
from torch.autograd import gradcheck

import mdistiller
from mdistiller.errors import ConfigError
from mdistiller.functional import crld_loss
from mdistiller.methods import CRLDConfig, get_method
from mdistiller.models import create_model
from mdistiller.types import Batch, DataInfo, Outputs

CONTRACT = set()

IMAGES = 6


@pytest.fixture
def logits():
    rng = np.random.default_rng(1)
    scale = np.repeat([4.0, 0.7], IMAGES)[:, None]  # the teacher is surer of weak views
    return 3 * rng.normal(size=(2 * IMAGES, 5)), scale * rng.normal(size=(2 * IMAGES, 5))


def parts(student, teacher, temperature, weak_threshold, strong_threshold):
    def kd(s, t):
        p, q = (log_softmax(z / temperature) for z in (t, s))
        return temperature**2 * np.sum(np.exp(p) * (p - q))

    within = cross = 0.0
    used = [0, 0]
    for b in range(IMAGES):
        s_weak, s_strong, t_weak, t_strong = student[b], student[IMAGES + b], teacher[b], teacher[IMAGES + b]
        if softmax(t_weak).max() >= weak_threshold:
            within += (kd(s_weak, t_weak) + kd(s_strong, t_strong)) / IMAGES
            used[0] += 1
        if softmax(t_strong).max() >= strong_threshold:
            cross += (kd(s_strong, t_weak) + kd(s_weak, t_strong)) / IMAGES
            used[1] += 1
    return within, cross, used


@pytest.mark.parametrize("thresholds", [(0.9, 0.4), (0.0, 0.0), (0.9, 0.2)])
def test_values_are_the_formula_s(logits, thresholds):
    within, cross, used = parts(*logits, 3.0, *thresholds)
    if thresholds == (0.9, 0.4):
        assert 0 < min(used) <= max(used) < IMAGES
    s, t = map(torch.tensor, logits)
    settings = {"temperature": 3.0, "weak_threshold": thresholds[0], "strong_threshold": thresholds[1]}
    got = crld_loss(s, t, within_weight=1.5, cross_weight=0.7, **settings)
    assert got.item() == pytest.approx(1.5 * within + 0.7 * cross, rel=1e-12)


def test_the_method_s_losses(logits):
    s, t = map(torch.tensor, logits)
    label = torch.randint(0, 5, (IMAGES,))
    student, teacher = create_model("resnet8", num_classes=5), create_model("resnet8", num_classes=5)
    method = get_method("crld")(CRLDConfig(), student, teacher, DataInfo((3, 8, 8)))
    batch = Batch(torch.empty(0), label.repeat(2), torch.empty(0))
    got = method(Outputs(s, {}), Outputs(t, {}), batch, torch.tensor(0.0))
    within, cross, _ = parts(*logits, 4.0, 0.9, 0.2)
    assert method.needs.views == 2
    assert got["within"].item() == pytest.approx(2 * within)
    assert got["cross"].item() == pytest.approx(0.5 * cross)
    both_views = F.cross_entropy(s[:IMAGES], label) + F.cross_entropy(s[IMAGES:], label)
    task = method.config.task_weight * F.cross_entropy(s, label.repeat(2))
    torch.testing.assert_close(task, both_views)


def test_gradients_go_to_confident_images_alone(logits):
    s, t = (torch.tensor(x).requires_grad_() for x in logits)
    assert gradcheck(crld_loss, (s, t))
    (grad,) = torch.autograd.grad(crld_loss(s, t, cross_weight=0.0), s)
    confident = t.softmax(1).amax(1)[:IMAGES] >= 0.9
    assert ((grad != 0).any(1) == confident.repeat(2)).all()


def test_zero_where_all_views_agree(logits):
    t = torch.tensor(logits[1])[:IMAGES].repeat(2, 1)
    assert abs(crld_loss(t, t).item()) < 1e-12


def test_bad_input():
    x = torch.randn(4, 5)
    with pytest.raises(ConfigError, match="even batch, weak ones first; got 3"):
        crld_loss(x[:3], x[:3])
    with pytest.raises(ConfigError, match=r"one shape \[B, C\]"):
        crld_loss(x, torch.randn(4, 6))
    with pytest.raises(ConfigError, match="temperature must be positive; got 0"):
        crld_loss(x, x, temperature=0)


def test_the_student_may_run_once_on_each_view():
    torch.manual_seed(0)
    student, teacher = create_model("resnet8", 10), create_model("resnet14", 10).eval()
    by_hand = copy.deepcopy(student).train()
    weak, strong, label = torch.randn(6, 3, 16, 16), 2 * torch.randn(6, 3, 16, 16) + 1, torch.arange(6)
    thresholds = {"weak_threshold": 0.0, "strong_threshold": 0.0}
    distiller = mdistiller.Distiller(student, teacher, "crld", norm_per_view=True, **thresholds).train()
    images, labels = torch.cat([weak, strong]), torch.cat([label, label])
    out = distiller(images, labels)
    logits = torch.cat([by_hand(weak), by_hand(strong)])
    assert torch.equal(out.logits, logits)
    expected = crld_loss(logits, teacher(images).detach(), **thresholds)
    torch.testing.assert_close(out.losses["within"] + out.losses["cross"], expected)
    torch.testing.assert_close(out.losses["task"], 2 * F.cross_entropy(logits, labels))
    assert CRLDConfig().norm_per_view is False
    assert mdistiller.get_recipe("cifar100.crld.resnet56_resnet20").method.norm_per_view
    assert mdistiller.get_recipe("imagenet.crld.resnet34_resnet18").method.norm_per_view
