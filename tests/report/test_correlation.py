"""Correlation of logits against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mdistiller.errors import DataError
from mdistiller.tasks.classification.report.measures import correlation_difference


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(60, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + 3
    return student, student + torch.randn(60, 5, generator=generator)


def test_difference(pair):
    student, teacher = (logits.double().numpy() for logits in pair)
    expected = np.abs(np.corrcoef(student.T) - np.corrcoef(teacher.T))
    np.testing.assert_allclose(correlation_difference(*pair), expected, rtol=1e-10, atol=1e-13)
    assert float(correlation_difference(pair[0], pair[0]).max()) == 0
    opposite = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    assert float(correlation_difference(pair[0], pair[0] * opposite).max()) <= 2 + 1e-12


def test_a_constant_logit_has_no_correlation(pair):
    logits = pair[0].clone()
    logits[:, 2] = 1.0
    found = correlation_difference(logits, pair[1])
    assert found.dtype == torch.float64
    assert found[2].isnan().all()
    assert found[:, 2].isnan().all()
    rest = [0, 1, 3, 4]
    torch.testing.assert_close(
        found[rest][:, rest], correlation_difference(logits[:, rest], pair[1][:, rest])
    )


def test_one_sample_is_refused(pair):
    with pytest.raises(DataError, match="at least 2 samples; got 1"):
        correlation_difference(pair[0][:1], pair[1][:1])
