"""MLKD against the three levels written out with loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from scipy.special import log_softmax

from mdistiller.errors import ConfigError
from mdistiller.functional import mlkd_loss
from mdistiller.methods import MLKDConfig, get_method
from mdistiller.models import create_model
from mdistiller.types import Batch, DataInfo, Outputs

CONTRACT = set()


def levels(student, teacher, temperature):
    log_q, log_p = (log_softmax(z / temperature, axis=1) for z in (student, teacher))
    p, q = np.exp(log_p), np.exp(log_q)
    samples, classes = p.shape
    instance = temperature**2 * (p * (log_p - log_q)).sum() / samples
    batch = sum((p[i] @ p[j] - q[i] @ q[j]) ** 2 for i in range(samples) for j in range(samples)) / samples
    pairs = [(i, j) for i in range(classes) for j in range(classes)]
    columns = sum((p[:, i] @ p[:, j] - q[:, i] @ q[:, j]) ** 2 for i, j in pairs) / classes
    return np.array([instance, batch, columns])


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return 4 * rng.normal(size=(8, 5)), 4 * rng.normal(size=(8, 5))


def losses(student_logits, teacher_logits, label, **settings):
    student, teacher = create_model("resnet8", num_classes=5), create_model("resnet8", num_classes=5)
    method = get_method("mlkd")(MLKDConfig(**settings), student, teacher, DataInfo((3, 8, 8)))
    batch = Batch(torch.empty(0), label, torch.empty(0))
    args = Outputs(student_logits, {}), Outputs(teacher_logits, {}), batch, torch.tensor(1.0)
    return {name: value.item() for name, value in method(*args).items()}, method


def test_values_are_the_formula_s(logits):
    s, t = logits
    wanted = sum(levels(s, t, temperature).sum() for temperature in (2, 3, 4, 5, 6))
    assert mlkd_loss(torch.tensor(s), torch.tensor(t)).item() == pytest.approx(wanted, rel=1e-12)
    wanted = levels(s, t, 1.5).sum()
    got = mlkd_loss(torch.tensor(s), torch.tensor(t), temperatures=(1.5,))
    assert got.item() == pytest.approx(wanted, rel=1e-12)


def test_two_views_as_the_authors_weigh_them(logits):
    s, t = logits
    label = torch.tensor([0, 1, 2, 4] * 2)
    got, method = losses(torch.tensor(s), torch.tensor(t), label)
    assert method.needs.views == 2
    weak, strong = (s[:4], t[:4]), (s[4:], t[4:])
    # Half of four samples and three of five classes are not above their medians.
    masked = sum(levels(*weak, temperature) for temperature in (2, 3, 4, 5, 6)) * [0.5, 0.5, 0.6]
    instance = masked[0]
    instance += sum(levels(*strong, temperature)[0] for temperature in (3, 4, 5))
    instance += sum(levels(*weak, temperature)[0] for temperature in (2, 6))
    assert got["instance"] == pytest.approx(0.9 * instance)
    assert got["batch"] == pytest.approx(0.9 * masked[1])
    assert got["class"] == pytest.approx(0.9 * masked[2])
    ce = [F.cross_entropy(torch.tensor(half), label[:4]).item() for half in (s[:4], s[4:])]
    task = method.config.task_weight * F.cross_entropy(torch.tensor(s), label)
    assert task == pytest.approx(0.1 * sum(ce))


def test_one_view_is_the_plain_loss(logits):
    s, t = map(torch.tensor, logits)
    got, method = losses(s[:7], t[:7], torch.zeros(7, dtype=torch.int64), num_views=1, weight=2.0)
    assert method.needs.views == 1
    total = got["instance"] + got["batch"] + got["class"]
    assert total == pytest.approx(2 * mlkd_loss(s[:7], t[:7]).item())


def test_zero_where_student_equals_teacher_and_compiles_whole(logits):
    s, t = map(torch.tensor, logits)
    assert abs(mlkd_loss(t, t).item()) < 1e-12
    torch.testing.assert_close(
        torch.compile(mlkd_loss, fullgraph=True, backend="aot_eager")(s, t), mlkd_loss(s, t)
    )


def test_autocast_does_not_reach_the_correlations(logits):
    s, t = (torch.tensor(x).float() for x in logits)
    with torch.autocast("cpu", torch.bfloat16):
        inside = mlkd_loss(s, t)
    torch.testing.assert_close(inside, mlkd_loss(s, t), rtol=0, atol=0)


def test_bad_input():
    x = torch.randn(4, 5)
    with pytest.raises(ConfigError, match=r"\[4, 5\] and \[4, 6\]"):
        mlkd_loss(x, torch.randn(4, 6))
    with pytest.raises(ConfigError, match="got none"):
        mlkd_loss(x, x, temperatures=())
    with pytest.raises(ConfigError, match="temperature must be positive; got -1"):
        mlkd_loss(x, x, temperatures=(1.0, -1.0))
    with pytest.raises(ConfigError, match="weak ones first; got 3"):
        losses(x[:3], x[:3], torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValidationError):
        MLKDConfig(temperatures=(0.0,))
