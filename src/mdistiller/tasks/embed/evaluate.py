"""Embeddings of held-out images against the teacher's, and of labeled images against their labels."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller.data import DataConfig, Splits, load_data
from mdistiller.data.layout import TRAIN, subfolder
from mdistiller.data.loader import PlainBatches
from mdistiller.errors import ConfigError, DataError, TapError, TrainingError
from mdistiller.methods import Method
from mdistiller.taps import Taps
from mdistiller.tasks.embed.config import EmbedConfig
from mdistiller.teacher import EvalMode
from mdistiller.training.distributed import World
from mdistiller.training.precision import autocast, memory_format, torch_dtype
from mdistiller.types import Batch, Line, Outputs

NEIGHBORS = 10  # compared with the teacher's
VOTES, TEMPERATURE = 20, 0.07  # of the nearest neighbors, as in DINO's evaluation
_NAMES = ("pooler_output", "image_embeds")


def embedding_of(result: Any) -> Tensor:
    """Returns the embedding [B, D] in a model's result: the result, or an entry of a model of transformers.

    Raises:
        TapError: there is none.
    """
    read = result.get if isinstance(result, Mapping) else partial(getattr, result)
    entries = [result] if isinstance(result, Tensor) else [read(name, None) for name in _NAMES]
    for found in entries:
        if isinstance(found, Tensor) and (found.ndim == 2 or found.shape[2:] == (1, 1)):
            return found.flatten(1)
    got = f"a tensor {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
    raise TapError(
        f"the model returns {got}, without an embedding; expected a tensor [B, D], or an entry "
        f"{' or '.join(_NAMES)}"
    )


def _numbers(x: Tensor) -> np.ndarray:
    if not x.isfinite().all():
        raise TrainingError("embeddings are not finite, so they have no neighbors")
    return x.double().cpu().numpy()


def agreement(student: Tensor, teacher: Tensor) -> float:
    """Computes the share of common nearest neighbors, in percent, of embeddings [N, D] of the same images.

    Each image has 10 neighbors by cosine, or half of the other images if these are fewer.
    """
    from sklearn.neighbors import NearestNeighbors  # takes a second

    find = NearestNeighbors(n_neighbors=min(NEIGHBORS, (len(student) - 1) // 2), metric="cosine")
    ours, theirs = (find.fit(_numbers(x)).kneighbors(return_distance=False) for x in (student, teacher))
    return float(100 * (ours[:, :, None] == theirs[:, None, :]).any(2).mean())


def probe_accuracies(train: Tensor, labels: Tensor, test: Tensor, expected: Tensor) -> Line:
    """Computes accuracies in percent on the embeddings `test` [M, D], after a fit on `train` [N, D].

    knn: 20 nearest neighbors, whose votes weigh exp(cosine / 0.07).
    linear: logistic regression on embeddings standardized over `train`, whose loss is the mean cross-entropy
        plus 1e-3 times half the squared norm of the weights.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # Of two classes, scikit-learn's one vector of weights is the difference of two.
    scale = 2 if len(labels.unique()) == 2 else 1
    probes = {
        "knn": KNeighborsClassifier(
            min(VOTES, len(train)), weights=lambda far: np.exp(-far / TEMPERATURE), metric="cosine"
        ),
        "linear": make_pipeline(
            StandardScaler(), LogisticRegression(C=scale / (1e-3 * len(train)), max_iter=1000)
        ),
    }
    x, y, wanted, known = _numbers(train), labels.cpu().numpy(), _numbers(test), expected.cpu().numpy()
    return {name: 100 * float(probe.fit(x, y).score(wanted, known)) for name, probe in probes.items()}


def load_probe(config: EmbedConfig, data: Splits, device: torch.device) -> Splits | None:
    """Reads the labeled images of `data.probe`, prepared as the training images; None without one."""
    root = config.data.probe
    if root is None:
        return None
    fields = {name: getattr(data, name) for name in ("image_size", "mean", "std")}
    fields |= {"root": root, "val_fraction": None if root.is_dir() and subfolder(root, TRAIN) else 0.2}
    fields |= config.data.model_dump(include={"resize", "workers", "memory"})
    try:
        return load_data(DataConfig(kind="folder", **fields), device, unlabeled=False)
    except DataError as error:
        raise DataError(f"data.probe: {error}") from error


class EmbedEvaluator:
    """Metrics of students on the held-out images, and on those of `data.probe`.

    agreement: share of nearest neighbors in common with the teacher, in percent; the mean over teachers.
    loss: mean of the distillation losses, each teacher's times its weight.
    knn, linear: accuracy of nearest neighbors and of a linear probe, in percent.

    Every process computes them on all images.
    """

    def __init__(
        self, config: EmbedConfig, data: Splits, pairs: Sequence[tuple[Method, nn.Module]], world: World
    ) -> None:
        if len(data.test) < 3:
            raise ConfigError(f"data: neighbors need 3 held-out images or more; got {len(data.test)}")
        self.config, self.world = config, world
        weights = [weight for _, weight in config.by_teacher()]
        self.pairs = [(*pair, weight) for pair, weight in zip(pairs, weights, strict=True)]
        plain = partial(
            PlainBatches,
            splits=data,
            batch_size=config.eval_batch_size,
            memory_format=memory_format(config.layout),
            workers=config.data.workers,
            device=world.device,
        )
        self.test, probe = plain(data.test), load_probe(config, data, world.device)
        self.probe = () if probe is None else (plain(probe.train), plain(probe.test))

    def __call__(self, model: nn.Module, is_student: bool) -> Line:
        """Computes the metrics of a model; it and the teacher run in evaluation mode."""
        names = [name for method, *_ in self.pairs for name in method.student_taps]
        taps = Taps(model, names, embedding_of)
        teachers = [Taps(teacher, method.teacher_taps, embedding_of) for method, teacher, _ in self.pairs]
        progress, loss, ours = torch.ones((), device=self.world.device), 0.0, []
        theirs: list[list[Tensor]] = [[] for _ in teachers]
        modules = [model, *(part for method, teacher, _ in self.pairs for part in (method, teacher))]
        try:
            with torch.no_grad(), EvalMode([part for module in modules for part in module.modules()]):
                for batch in self.test:
                    student = self._run(taps, batch)
                    ours.append(student.logits)
                    for teacher, (method, _, weight), found in zip(teachers, self.pairs, theirs, strict=True):
                        known = self._run(teacher, batch)
                        with self._autocast():
                            losses = method(student, known.promote(ours[-1].dtype), batch, progress)
                        loss += weight * len(batch.image) * sum(value.item() for value in losses.values())
                        found.append(known.logits)
                common = [agreement(torch.cat(ours), torch.cat(found)) for found in theirs]
                metrics = {"agreement": sum(common) / len(common)}
                metrics["loss"] = loss / sum(map(len, ours))
                if self.probe:
                    metrics |= self._measure(taps)
        finally:
            for part in (taps, *teachers):
                part.remove()
        return metrics

    def _autocast(self) -> torch.autocast:
        return autocast(self.world.device, torch_dtype(self.config.precision))

    def _run(self, taps: Taps, batch: Batch) -> Outputs:
        with self._autocast():
            return taps(batch.image)

    def _measure(self, taps: Taps) -> Line:
        values: list[Any] = []
        for batches in self.probe:
            found = [(self._run(taps, batch).logits, batch.label) for batch in batches]
            values += map(torch.cat, zip(*found, strict=True))
        return probe_accuracies(*values)
