"""Similarity-preserving distillation: values against loops over samples, gradients, taps."""

import numpy as np
import pytest
import torch

from mdistiller import Batch, Distiller, create_model, tap
from mdistiller.errors import ConfigError
from mdistiller.functional import sp_loss
from mdistiller.methods import SPConfig

CONTRACT = {"zero at equal"}


def features(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def numpy_sp(student, teacher):
    """Row by row, over the definition."""
    size, total = len(student), 0.0
    for i in range(size):
        rows = []
        for f in (student.numpy(), teacher.numpy()):
            row = np.array([(f[i] * f[j]).sum() for j in range(size)])
            rows.append(row / np.linalg.norm(row))
        total += ((rows[0] - rows[1]) ** 2).sum()
    return total / size**2


def test_value_is_the_formula_s():
    student, teacher = features(5, 3, 4, 4), features(5, 7, seed=1)
    assert sp_loss(student, teacher).item() == pytest.approx(numpy_sp(student, teacher), rel=1e-12)


def test_zero_where_similarities_are_equal():
    x = features(5, 8)
    rotation = torch.linalg.qr(features(8, 8, seed=1)).Q
    assert sp_loss(3 * x @ rotation, x).item() < 1e-28
    assert sp_loss(x, features(5, 8, seed=2)).item() > 1e-3


def test_bad_input():
    with pytest.raises(ConfigError, match=r"one B; got student \[4, 9\], teacher \[3, 9\]"):
        sp_loss(features(4, 9), features(3, 9))
    with pytest.raises(ConfigError, match=r"one B; got student \[4\]"):
        sp_loss(features(4), features(4, 9))


def test_the_method_reads_the_last_stages_or_the_taps_it_is_given():
    torch.manual_seed(0)
    student, teacher = create_model("MobileNetV2", num_classes=5), create_model("resnet8", num_classes=5)
    method = Distiller(student, teacher, "sp").method
    assert (method.student_taps, method.teacher_taps) == (("stage4",), ("stage3",))

    config = SPConfig(weight=2.0, student_taps=("pooled", "stage1"), teacher_taps=("pooled", "stage1"))
    distiller = Distiller(student, teacher, config).eval()
    image, label = torch.randn(4, 3, 32, 32), torch.arange(4)
    s = tap(student, config.student_taps)(image).features
    t = distiller.asked(Batch(image, label, label)).features
    losses = distiller(image, label).losses
    expected = 2 * (sp_loss(s["pooled"], t["pooled"]) + sp_loss(s["stage1"], t["stage1"]))
    torch.testing.assert_close(losses["sp"], expected)
