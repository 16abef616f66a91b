"""Features of a model on a set of images: collected, embedded in the plane, and measured."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from mdistiller.errors import DataError
from mdistiller.taps import tap
from mdistiller.training.precision import autocast
from mdistiller.types import Batch


class Collected(NamedTuple):
    """Outputs of a model on N images, in their order, on the CPU; `index` is the position in the data set."""

    logits: Float32[Tensor, "n c"]
    features: Float32[Tensor, "n d"]
    label: Int[Tensor, " n"]
    index: Int[Tensor, " n"]  # type: ignore[assignment]  # as in Batch


class Separability(NamedTuple):
    """Separation of classes in a feature space, by cosine distance because features differ in scale.

    silhouette: mean silhouette coefficient, in [-1, 1]; 1: far apart and dense (Rousseeuw, 1987).
    knn: accuracy in percent of the vote of the nearest neighbours, without the sample itself.
    """

    silhouette: float
    knn: float


@torch.no_grad()
def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    prepare: Callable[[Batch], Batch],
    *,
    feature: str = "pooled",
    precision: torch.dtype = torch.float32,
) -> Collected:
    """Collects logits and one feature of a model in evaluation mode, which is put back afterwards.

    Args:
        model: returns logits [B, classes]; on the device of the batches.
        batches: raw batches, such as an epoch of `make_loader`.
        prepare: converts a raw batch to normalised images.
        feature: name of the tap; each image's feature is flattened.
        precision: autocast precision; float32 means none.

    Raises:
        UnknownNameError: the model has no such tap.
    """
    was_training = model.training
    tapped = tap(model.eval(), [feature])
    found: list[tuple[Tensor, ...]] = []
    try:
        for raw in batches:
            batch = prepare(raw)
            with autocast(batch.image.device, precision):
                logits, features = tapped(batch.image)
            pooled = features[feature].flatten(1)
            found.append((logits.float().cpu(), pooled.float().cpu(), batch.label.cpu(), batch.index.cpu()))
    finally:
        tapped.untap().train(was_training)
    return Collected(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def embed(features: Float[Tensor, "n d"], seed: int = 0) -> np.ndarray:
    """Embeds features in the plane by scikit-learn's t-SNE (van der Maaten and Hinton, 2008).

    The start is the first two principal components; the perplexity is 30, or (N - 1) / 3 if that is less. The
    time grows slightly faster than N, so a few thousand samples are practical. Returns float32 [N, 2].

    Raises:
        DataError: fewer than four samples.
    """
    n = len(features)
    if n < 4:
        raise DataError(f"t-SNE needs at least 4 samples; got {n}")
    from sklearn.manifold import TSNE

    tsne = TSNE(init="pca", perplexity=min(30.0, (n - 1) / 3), random_state=seed)
    return tsne.fit_transform(features.numpy())


def separability(
    features: Float[Tensor, "n d"], label: Int[Tensor, " n"], neighbours: int = 10
) -> Separability:
    """Measures the separation of classes in `features`. A tie of votes goes to the lowest class id.

    Raises:
        DataError: fewer than two classes, no class with two samples, or too few samples for the neighbours.
    """
    x, y = features.numpy(), label.numpy()
    classes = len(np.unique(y))
    if not 2 <= classes < len(y) or len(y) <= neighbours:
        raise DataError(
            f"separability needs 2 classes, fewer classes than samples, and more than {neighbours} samples; "
            f"got {classes} classes and {len(y)} samples"
        )
    # Without an argument, kneighbors() leaves out the sample itself.
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=neighbours, metric="cosine").fit(x).kneighbors()[1]
    votes = np.stack([np.bincount(y[row], minlength=y.max() + 1) for row in nearest])
    silhouette = silhouette_score(x, y, metric="cosine")
    return Separability(float(silhouette), 100 * float((votes.argmax(1) == y).mean()))
