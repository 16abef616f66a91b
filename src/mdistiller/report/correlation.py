"""Correlation of the classes' logits, and its difference between student and teacher."""

import torch
from jaxtyping import Float
from torch import Tensor

from mdistiller.errors import DataError


def logit_correlation(logits: Float[Tensor, "n c"]) -> Float[Tensor, "c c"]:
    """Computes Pearson's correlation of the classes' logits over the samples, in float64.

    Entry (i, j) is the correlation of logit i with logit j: classes that are alike for the model have a high
    one. A class whose logit is constant has no correlation: its row and column are NaN.

    Raises:
        DataError: fewer than two samples.
    """
    if len(logits) < 2:
        raise DataError(f"a correlation needs at least 2 samples; got {len(logits)}")
    z = logits.double()
    z = z - z.mean(0)
    z = z / z.square().sum(0).sqrt()
    return z.T @ z


def correlation_difference(
    student_logits: Float[Tensor, "n c"], teacher_logits: Float[Tensor, "n c"]
) -> Float[Tensor, "c c"]:
    """Computes |student's − teacher's| correlation matrix, in [0, 2], from logits of the same samples.

    Figure 4 of the DKD paper (Zhao et al., CVPR 2022), after CRD's (Tian et al., ICLR 2020), by its caption.
    The notebook that its authors published compares the mean logits of each class instead.
    """
    return (logit_correlation(student_logits) - logit_correlation(teacher_logits)).abs()


def off_diagonal_mean(matrix: Float[Tensor, "c c"]) -> float:
    """Computes the mean over pairs of different classes, without NaN."""
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)].nanmean().item()
