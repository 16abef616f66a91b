"""What a model makes of a set of images: its features collected, drawn in the plane, and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from mdistiller.errors import DataError
from mdistiller.taps import tap
from mdistiller.training.precision import autocast
from mdistiller.types import Batch


class Collected(NamedTuple):
    """A model's outputs on N images, in the order in which they came, on the CPU."""

    logits: Float32[Tensor, "n c"]
    features: Float32[Tensor, "n d"]
    label: Int[Tensor, " n"]
    index: Int[Tensor, " n"]  # type: ignore[assignment]  # as in Batch
    """Of each image in its set."""


class Separability(NamedTuple):
    """How well classes lie apart in a feature space, by cosine distance: models' features differ in scale."""

    silhouette: float
    """Mean silhouette coefficient, in [-1, 1]; 1: far apart and dense (Rousseeuw, 1987)."""
    knn: float
    """Accuracy in % of the vote of the nearest neighbours, each sample left out of its own."""


@torch.no_grad()
def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    prepare: Callable[[Batch], Batch],
    *,
    feature: str = "pooled",
    precision: torch.dtype = torch.float32,
) -> Collected:
    """Logits and one feature of a model, in eval mode, over some images; the model is left as it was.

    Args:
        model: gives logits [B, classes]; on the device of the batches.
        batches: raw batches, such as an epoch of `make_loader`.
        prepare: turns a raw batch into normalised images.
        feature: the tap that is read; each image's is flattened.
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
    """t-SNE of features (van der Maaten and Hinton, 2008) by scikit-learn: float32 [N, 2].

    Started from the first two principal components, with perplexity 30 (fewer than 91 samples: a third of
    their number less one). The time grows a little faster than N: take a few thousand samples.

    Raises:
        DataError: fewer than four samples.
    """
    n = len(features)
    if n < 4:
        raise DataError(f"t-SNE needs at least 4 samples; got {n}")
    tsne = TSNE(init="pca", perplexity=min(30.0, (n - 1) / 3), random_state=seed)
    return tsne.fit_transform(features.numpy())


def separability(
    features: Float[Tensor, "n d"], label: Int[Tensor, " n"], neighbours: int = 10
) -> Separability:
    """How well the classes `label` (class ids) lie apart in `features`.

    A tie of the neighbours' votes goes to the lowest class id.

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
    # Asked about nothing, it gives each sample's neighbours without itself.
    nearest = NearestNeighbors(n_neighbors=neighbours, metric="cosine").fit(x).kneighbors()[1]
    votes = np.stack([np.bincount(y[row], minlength=y.max() + 1) for row in nearest])
    silhouette = silhouette_score(x, y, metric="cosine")
    return Separability(float(silhouette), 100 * float((votes.argmax(1) == y).mean()))
