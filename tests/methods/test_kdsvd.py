"""Distillation by SVD: values against loops, gradients (of vectors that SVD leaves open, too), sizes."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch

from mdistiller import create_model
from mdistiller.errors import ConfigError
from mdistiller.functional import kdsvd_loss
from mdistiller.methods import KDSVD, KDSVDConfig
from mdistiller.types import DataInfo

CONTRACT = {"zero at equal"}

STUDENT = (2, 3, 6, 6), (2, 4, 4, 4), (2, 5, 3, 3)
TEACHER = (2, 5, 6, 6), (2, 3, 4, 4), (2, 4, 3, 3)


def maps(*shapes, seed=0, dtype=torch.float64):
    """Positive, as behind a ReLU: the leading vector then has one sign, the same for all its entries."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def right_vectors(feature):
    _, values, rows = np.linalg.svd(feature.reshape(-1, feature.shape[-1]))
    return values, [v * np.sign(v.sum()) for v in rows]


def numpy_loss(student, teacher, signs):
    """By the definition. `signs[stage][n]` turns the teacher's vectors, which SVD leaves open."""
    k, total = len(signs[0]), 0.0
    for b in range(len(student[0])):
        stages = []  # of k pairs (student's, teacher's)
        for s, t, turns in zip(student, teacher, signs, strict=True):
            values, targets = right_vectors(t[b].numpy())
            _, candidates = right_vectors(s[b].numpy())
            pairs = []
            for n in range(k):
                target = targets[n] * turns[n]
                cosines = [c @ target for c in candidates[: k + 3]]
                best = np.argmax(np.abs(cosines))
                scale = values[n] / np.linalg.norm(values[:k])
                pairs.append((scale * np.sign(cosines[best]) * candidates[best], scale * target))
            stages.append(pairs)
        for before, after in pairwise(stages):
            for first, second in zip(before, after, strict=True):
                for i, j in product(range(len(second[0])), range(len(first[0]))):
                    s_rbf, t_rbf = (np.exp(-((second[w][i] - first[w][j]) ** 2) / 8) for w in (0, 1))
                    total += (s_rbf - t_rbf) ** 2
    return total / len(student[0])


def test_value_is_the_formula_s():
    student, teacher = maps(*STUDENT), maps(*TEACHER, seed=1)
    expected = numpy_loss(student, teacher, [[1], [1], [1]])
    assert kdsvd_loss(student, teacher).item() == pytest.approx(expected, rel=1e-9)


def test_further_vectors_count_up_to_their_sign():
    student, teacher = maps((1, 3, 6, 6), (1, 4, 4, 4)), maps((1, 3, 6, 6), (1, 5, 4, 4), seed=1)
    got = kdsvd_loss(student, teacher, k=3).item()
    expected = [numpy_loss(student, teacher, [[1, 1, 1], [1, a, b]]) for a, b in product((1, -1), repeat=2)]
    assert any(got == pytest.approx(value, rel=1e-9) for value in expected)


def test_no_more_vectors_than_the_smallest_map_has():
    student, teacher = maps((2, 3, 4, 4), (2, 3, 2, 2)), maps((2, 3, 4, 4), (2, 3, 2, 2), seed=1)
    assert kdsvd_loss(student, teacher, k=5).item() == kdsvd_loss(student, teacher, k=2).item()


def test_the_larger_map_is_averaged_to_the_smaller_one():
    student, teacher = maps((2, 3, 4, 4), (2, 3, 2, 2)), maps((2, 3, 4, 4), (2, 3, 4, 4), seed=1)
    means = teacher[1].unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean((3, 5))
    expected = numpy_loss(student, [teacher[0], means], [[1], [1]])
    assert kdsvd_loss(student, teacher).item() == pytest.approx(expected, rel=1e-9)


def test_zero_where_the_vectors_are_equal():
    x = maps(*STUDENT)
    same = [3 * torch.cat([f, f], 1) for f in x]
    assert kdsvd_loss(same, x, k=2).item() < 1e-24


DEGENERATE = {
    "zeros": lambda shape: torch.zeros(shape),
    "ones": lambda shape: torch.ones(shape),
    "all singular values equal": lambda shape: torch.eye(shape[2]).expand(shape),
    "large": lambda shape: 1e4 * torch.randn(shape),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_extremes_stay_finite(case):
    torch.manual_seed(0)
    student = [DEGENERATE[case](shape).clone().requires_grad_() for shape in STUDENT]
    for teacher in (maps(*TEACHER, dtype=torch.float32), [s.detach() for s in student]):
        loss = kdsvd_loss(student, teacher, k=2)
        grads = torch.autograd.grad(loss, student)
        assert torch.isfinite(loss)
        assert all(torch.isfinite(g).all() for g in grads)


def test_half_precision_is_promoted_under_autocast_too():
    student, teacher = maps(*STUDENT, dtype=torch.bfloat16), maps(*TEACHER, seed=1, dtype=torch.bfloat16)
    expected = kdsvd_loss([s.float() for s in student], [t.float() for t in teacher])
    student = [s.requires_grad_() for s in student]
    with torch.autocast("cpu", torch.bfloat16):
        loss = kdsvd_loss(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    assert all(s.grad.abs().max() > 0 for s in student)


def test_bad_input():
    student, teacher = maps(*STUDENT), maps(*TEACHER)
    with pytest.raises(ConfigError, match="at least two, got 1"):
        kdsvd_loss(student[:1], teacher[:1])
    with pytest.raises(ConfigError, match="one length, at least 1; got 3 and 2"):
        kdsvd_loss(student, teacher[:2])
    with pytest.raises(ConfigError, match="k must be at least 1; got 0"):
        kdsvd_loss(student, teacher, k=0)
    with pytest.raises(ConfigError, match=r"maps \[B, C, H, W\]"):
        kdsvd_loss([s.mean((2, 3)) for s in student], teacher)


def test_the_method_needs_two_stages():
    student, teacher = create_model("resnet8", num_classes=5), create_model("resnet8x4", num_classes=5)
    info = DataInfo((3, 32, 32))
    assert KDSVD(KDSVDConfig(), student, teacher, info).student_taps == ("stage1", "stage2", "stage3")
    config = KDSVDConfig(student_taps=("stage2",), teacher_taps=("stage2",))
    with pytest.raises(ConfigError, match="at least two, got 1"):
        KDSVD(config, student, teacher, info)
