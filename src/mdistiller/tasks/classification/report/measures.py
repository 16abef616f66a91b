"""Measures of students on test images: separation of the classes, and likeness to the teacher."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mdistiller.errors import DataError


class Separability(NamedTuple):
    """Separation of classes in a feature space, by cosine distance because features differ in scale.

    silhouette: mean silhouette coefficient, in [-1, 1]; 1: far apart and dense (Rousseeuw, 1987).
    knn: accuracy in percent of the vote of the nearest neighbors, without the sample itself.
    """

    silhouette: float
    knn: float


def separability(
    features: Float[Tensor, "n d"], label: Int[Tensor, " n"], neighbors: int = 10
) -> Separability:
    """Measures the separation of classes in `features`. A tie of votes goes to the lowest class id.

    Raises:
        DataError: fewer than two classes, no class with two samples, or too few samples for the neighbors.
    """
    x, y = features.numpy(), label.numpy()
    classes = len(np.unique(y))
    if not 2 <= classes < len(y) or len(y) <= neighbors:
        raise DataError(
            f"separability needs 2 classes, fewer classes than samples, and more than {neighbors} samples; "
            f"got {classes} classes and {len(y)} samples"
        )
    # Without an argument, kneighbors() leaves out the sample itself.
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=neighbors, metric="cosine").fit(x).kneighbors()[1]
    votes = np.stack([np.bincount(y[row], minlength=y.max() + 1) for row in nearest])
    silhouette = silhouette_score(x, y, metric="cosine")
    return Separability(float(silhouette), 100 * float((votes.argmax(1) == y).mean()))


def correlation_difference(
    student_logits: Float[Tensor, "n c"], teacher_logits: Float[Tensor, "n c"]
) -> Float[Tensor, "c c"]:
    """Computes |student's − teacher's| Pearson correlation of the classes' logits, in [0, 2], float64.

    Figure 4 of the DKD paper (Zhao et al., CVPR 2022), after CRD's (Tian et al., ICLR 2020), by its caption.
    The notebook that its authors published compares the mean logits of each class instead. A class whose
    logit is constant has no correlation: its row and column are NaN.

    Raises:
        DataError: fewer than two samples.
    """
    if len(student_logits) < 2:
        raise DataError(f"a correlation needs at least 2 samples; got {len(student_logits)}")
    student, teacher = (logits.double().T.corrcoef() for logits in (student_logits, teacher_logits))
    return (student - teacher).abs()


def off_diagonal_mean(matrix: Float[Tensor, "c c"]) -> float:
    """Computes the mean over pairs of different classes, without NaN."""
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)].nanmean().item()
