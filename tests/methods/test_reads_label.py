"""What methods say of labels, and their losses where images have no class."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from test_contract import WRAPPERS, models

import mdistiller
from mdistiller.errors import ConfigError
from mdistiller.methods import get_method, list_methods, method_config
from mdistiller.methods.base import LogitMethod
from mdistiller.methods.compose import build_method
from mdistiller.taps import TappedModel
from mdistiller.tasks.classification.models import check_labels
from mdistiller.types import Batch, DataInfo, Outputs

NO_CLASS = torch.tensor([-100])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


NAMES = [name for name in list_methods() if get_method(name).needs.teacher]
# A wrapper that asks its base for the losses of samples, and so cannot skip any.
OTHER = next(w.name for w in WRAPPERS if w.needs.every_label)
NAMES += ["lskd-dkd", f"{OTHER}-dkd", "dkd+fitnet"]
CLASSES = {name: get_method(name) for name in NAMES}
SKIPPING = [name for name, cls in CLASSES.items() if issubclass(cls, LogitMethod) and cls.needs.labels]
MEMORY = next(name for name, cls in CLASSES.items() if cls.needs.index)


def built(name, labels, **settings):
    student, teacher = models()
    config = method_config(name, **settings)
    return build_method(config, student, teacher, DataInfo((3, 32, 32), labels, 32))


@pytest.mark.parametrize("name", NAMES)
def test_what_methods_say_of_labels(name):
    """A method that does not read labels has the same losses with other labels."""
    method = built(name, torch.arange(40) % 10)
    is_dkd = "dkd" in name.replace("+", "-").split("-")
    assert method.needs.labels or not is_dkd
    assert method.needs.labels or not method.needs.index
    if method.needs.views == 2 or method.needs.index:
        return
    teacher, student = (random(32, 10, seed=seed).float() for seed in (1, 2))
    method.eval()
    if method.student_taps or method.teacher_taps:
        image = random(32, 3, 32, 32).float()
        student, teacher = (model.eval() for model in models())
        student = method.extend_student(student)
        with torch.no_grad():
            student, teacher = (
                TappedModel(model, taps)(image)
                for model, taps in ((student, method.student_taps), (teacher, method.teacher_taps))
            )
    else:
        student, teacher = Outputs(student, {}), Outputs(teacher, {})
    found = []
    for label in (torch.arange(32) % 10, (torch.arange(32) + 2) % 10):
        torch.manual_seed(0)
        losses = method(student, teacher, Batch(None, label, torch.arange(32)), torch.tensor(1.0))
        found.append(torch.stack([value.detach() for value in losses.values()]))
    assert method.needs.labels or torch.equal(*found)
    assert not torch.equal(*found) or not is_dkd


@pytest.mark.parametrize("name", [*SKIPPING, "lskd-dkd"])
def test_methods_skip_images_without_a_class(name):
    labels = torch.cat([torch.arange(20) % 10, NO_CLASS.expand(20)])
    method = built(name, labels)
    assert not method.needs.every_label
    s, t = random(7, 10, seed=1).requires_grad_(), random(7, 10, seed=2)
    label = torch.tensor([0, 3, -100, 1, 7, -100, 4])
    known = label >= 0

    def loss(method, s, t, label):
        losses = method(Outputs(s, {}), Outputs(t, {}), Batch(s, label, label), torch.tensor(1.0))
        return sum(losses.values())

    found = loss(method, s, t, label)
    expected = loss(built(name, labels[:20]), s[known], t[known], label[known])
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, s)
    torch.testing.assert_close(gradient[known], torch.autograd.grad(expected, s)[0][known])
    assert not gradient[~known].any()
    nothing = loss(method, s, t, NO_CLASS.expand(7))
    assert nothing.item() == 0
    rows = torch.zeros(7, 10, dtype=torch.float64)
    rows[known, label[known]] = 1
    try:
        same = loss(method, s, t, rows)
    except ConfigError:  # it takes no soft labels
        return
    torch.testing.assert_close(same, expected)


def test_methods_without_labels_take_all_images():
    method = built("kd", NO_CLASS.expand(8))
    s, t = random(8, 10, seed=1), random(8, 10, seed=2)
    label = NO_CLASS.expand(8)
    losses = method(Outputs(s, {}), Outputs(t, {}), Batch(s, label, label), torch.tensor(1.0))
    p = softmax(t.numpy() / 4, 1)
    expected = 0.9 * 16 * (p * (np.log(p) - log_softmax(s.numpy() / 4, 1))).sum(1).mean()
    assert losses["kd"].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("dkd", 0, "method 'dkd' reads the labels, and no training image has a class"),
        (MEMORY, 20, f"method {MEMORY!r} needs the class of every training image, and 20 have none"),
        (f"{OTHER}-dkd", 20, f"method '{OTHER}-dkd' needs the class"),
        (f"dkd+{MEMORY}", 20, "needs the class"),
    ],
)
def test_methods_that_need_classes(name, known, message):
    labels = torch.cat([torch.arange(known) % 10, NO_CLASS.expand(40 - known)])
    with pytest.raises(ConfigError, match=message):
        check_labels(built(name, labels), labels)


@pytest.mark.parametrize("name", ["kd", "fitnet", f"{OTHER}-kd", "lskd", "kd+fitnet"])
def test_methods_that_need_none(name):
    labels = NO_CLASS.expand(40)
    check_labels(built(name, labels), labels)


@pytest.mark.parametrize("settings", [{"beta": "auto"}, {"nckd_samples": "unsure"}])
def test_settings_that_compare_labels(settings):
    built("dkd", torch.arange(10), **settings)
    with pytest.raises(ConfigError, match=r"with training images without a class, allowed are beta a number"):
        built("dkd", torch.cat([torch.arange(10), NO_CLASS]), **settings)


def test_own_loop():
    student, teacher = models()
    labels = torch.cat([torch.arange(10), NO_CLASS.expand(10)])
    distiller = mdistiller.Distiller(student, teacher, "dkd", labels=labels, warmup=0)
    image = random(4, 3, 32, 32).float()
    out = distiller(image, torch.tensor([1, -100, -100, 2]))
    distiller.eval()
    out = distiller(image, torch.tensor([1, -100, -100, 2]))
    two = distiller(image[[0, 3]], torch.tensor([1, 2]))
    torch.testing.assert_close(out.loss, two.loss)
    assert distiller(image, NO_CLASS.expand(4)).loss.item() == 0
