"""SRRL: its loss by loops, and its connector to the teacher's classifier."""

import numpy as np
import pytest
import torch
from torch import nn

from mdistiller.errors import ConfigError
from mdistiller.functional import srrl_loss
from mdistiller.methods import SRRL, SRRLConfig
from mdistiller.models import create_model
from mdistiller.types import Batch, DataInfo, Outputs

CONTRACT = set()

DATA = DataInfo((3, 32, 32))


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64) for shape in [(4, 5), (4, 5), (3, 5)]]


def test_value_is_the_formula_s(inputs):
    s, t, w = (x.numpy() for x in inputs)
    bias = np.array([3.0, -1.0, 0.5])
    feature = regression = 0.0
    for b in range(4):
        feature += sum((s[b, d] - t[b, d]) ** 2 for d in range(5)) / (4 * 5)
        # The bias is in both logits.
        logits = [[w[c] @ x[b] + bias[c] for c in range(3)] for x in (s, t)]
        regression += sum((logits[0][c] - logits[1][c]) ** 2 for c in range(3)) / (4 * 3)
    got = srrl_loss(*inputs, feature_weight=0.5, regression_weight=2.0)
    assert got.item() == pytest.approx(0.5 * feature + 2 * regression, rel=1e-12)
    assert srrl_loss(inputs[1], inputs[1], inputs[2]).item() == 0


def test_bad_input(inputs):
    s, t, w = inputs
    with pytest.raises(ConfigError, match=r"got \[4, 5\], \[4, 4\] and \[3, 5\]"):
        srrl_loss(s, t[:, :4], w)
    with pytest.raises(ConfigError, match=r"the classifier's weight \[C, D\]"):
        srrl_loss(s, t, w.T)
    with pytest.raises(ConfigError, match="no linear classifier"):
        SRRL(SRRLConfig(), create_model("resnet8"), nn.Conv2d(3, 8, 3), DATA)


def outputs(method, teacher_dim):
    features = torch.randn(4, 64, 8, 8) if method.tap == "last_map" else torch.randn(4, 64)
    student = Outputs(torch.randn(4, 10), {method.tap: features})
    return student, Outputs(torch.randn(4, 10), {"pooled": torch.randn(4, teacher_dim)})


def test_the_connector_meets_the_teacher_s_classifier():
    torch.manual_seed(0)
    teacher = create_model("vgg8", 10)
    method = SRRL(SRRLConfig(feature_weight=0.5), create_model("resnet8", 10), teacher, DATA)
    assert method.student_taps == ("last_map",)
    assert sum(p.numel() for p in method.parameters()) == 64 * 512 + 2 * 512
    assert not any(p is teacher.classifier.weight for p in method.parameters())
    student, teacher_outputs = outputs(method, 512)
    batch = Batch(torch.zeros(4, 3, 32, 32), torch.randint(0, 10, (4,)), torch.arange(4))
    losses = method(student, teacher_outputs, batch, torch.tensor(1.0))
    x = student.features["last_map"]
    convolved = torch.einsum("bchw,dc->bdhw", x, method.connector[0].weight[:, :, 0, 0])
    normed = (convolved - convolved.mean((0, 2, 3), keepdim=True)) / (
        convolved.var((0, 2, 3), correction=0, keepdim=True) + 1e-5
    ).sqrt()
    h, target = normed.clamp(min=0).mean((2, 3)), teacher_outputs.features["pooled"]
    torch.testing.assert_close(losses["srrl_feature"], 0.5 * (h - target).square().mean())
    logits = teacher.classifier(h), teacher.classifier(target)
    torch.testing.assert_close(losses["srrl_regression"], (logits[0] - logits[1]).square().mean())
    sum(losses.values()).backward()
    assert teacher.classifier.weight.grad is None


def test_a_student_without_a_map_is_read_where_its_classifier_reads():
    student = nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10))
    method = SRRL(SRRLConfig(), student, create_model("resnet20", 10), DATA)
    assert method.student_taps == ("pooled",)
    s, t = outputs(method, 64)
    batch = Batch(torch.zeros(4, 3, 32, 32), torch.randint(0, 10, (4,)), torch.arange(4))
    assert torch.isfinite(sum(method(s, t, batch, torch.tensor(1.0)).values()))


def test_an_embedding_of_each_word_is_refused():
    models = [nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3)) for _ in range(2)]
    for model in models:
        model.tap_points = {"pooled": "1:input@sequence"}
    data = DataInfo(torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(
        ConfigError, match=r"'pooled' of Sequential must be a vector \[B, D\]; it is a sequence"
    ):
        SRRL(SRRLConfig(), *models, data)
