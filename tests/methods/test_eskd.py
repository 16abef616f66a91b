"""Early-stopped KD: the KD loss up to the stop, and nothing after it."""

import pytest
import torch

import mdistiller
from mdistiller.errors import ConfigError
from mdistiller.functional import kd_loss

CONTRACT = {"zero at equal"}


def distiller(**settings):
    torch.manual_seed(0)
    student, teacher = mdistiller.create_model("resnet8", 10), mdistiller.create_model("resnet8", 10)
    return mdistiller.Distiller(student.eval(), teacher, "eskd", **settings).eval()


def test_the_loss_is_kd_s_until_the_stop():
    image, label = torch.randn(4, 3, 32, 32), torch.arange(4)
    d = distiller(stop=0.5)
    with torch.no_grad():
        wanted = 0.9 * kd_loss(d.student(image), d.teacher.eval()(image))
    torch.testing.assert_close(d(image, label, progress=0.49).losses["kd"], wanted)
    assert d(image, label, progress=0.5).losses["kd"] == 0
    torch.testing.assert_close(distiller()(image, label).losses["kd"], wanted)


def test_a_stop_is_a_schedule():
    assert not distiller().method.needs.progress
    with pytest.raises(ConfigError, match="'eskd' has a schedule"):
        distiller(stop=0.5)(torch.randn(4, 3, 32, 32), torch.arange(4))
