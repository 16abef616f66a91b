"""Embeddings of held-out images against the teacher's, and of labeled images against their labels."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.data import DataConfig, Splits, load_data
from mdistiller.data.layout import TRAIN, subfolder
from mdistiller.data.loader import PlainBatches
from mdistiller.errors import ConfigError, DataError, TapError
from mdistiller.methods import Method
from mdistiller.taps import Taps
from mdistiller.tasks.embed.config import EmbedConfig
from mdistiller.teacher import EvalMode
from mdistiller.training.distributed import World
from mdistiller.training.precision import autocast, memory_format, torch_dtype
from mdistiller.types import Batch, Line, Outputs

NEIGHBORS = 10  # compared with the teacher's
VOTES, TEMPERATURE = 20, 0.07  # of the nearest neighbors, as in DINO's evaluation
_ROWS = 1024  # compared with all others at once
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


def neighbors(x: Tensor, count: int) -> Tensor:
    """Returns the nearest other embeddings of each one by cosine, int64 [N, count]."""
    x, found = F.normalize(x.float()), []
    for start in range(0, len(x), _ROWS):
        likeness = x[start : start + _ROWS] @ x.T
        rows = torch.arange(len(likeness), device=x.device)
        likeness[rows, start + rows] = -torch.inf
        found.append(likeness.topk(count).indices)
    return torch.cat(found)


def agreement(student: Tensor, teacher: Tensor) -> float:
    """Computes the share of common nearest neighbors, in percent, of embeddings [N, D] of the same images.

    Each image has 10 neighbors, or half of the other images if these are fewer.
    """
    count = min(NEIGHBORS, (len(student) - 1) // 2)
    ours, theirs = neighbors(student, count), neighbors(teacher, count)
    return 100 * (ours[:, :, None] == theirs[:, None, :]).any(2).double().mean().item()


def knn_accuracy(train: Tensor, labels: Tensor, test: Tensor, expected: Tensor, classes: int) -> float:
    """Computes the accuracy in percent of 20 nearest neighbors, whose votes weigh exp(cosine / 0.07)."""
    train, test, hits = F.normalize(train.float()), F.normalize(test.float()), 0
    for part, wanted in zip(test.split(_ROWS), expected.split(_ROWS), strict=True):
        likeness, nearest = (part @ train.T).topk(min(VOTES, len(train)))
        votes = torch.zeros(len(part), classes, device=part.device)
        votes.scatter_add_(1, labels[nearest], ((likeness - 1) / TEMPERATURE).exp())
        hits += int((votes.argmax(1) == wanted).sum())
    return 100 * hits / len(test)


@torch.enable_grad()
def linear_accuracy(train: Tensor, labels: Tensor, test: Tensor, expected: Tensor, classes: int) -> float:
    """Computes the accuracy in percent of logistic regression on embeddings standardized over `train`.

    The loss is the mean cross-entropy plus 1e-3 times half the squared norm of the weights.
    """
    std, mean = torch.std_mean(train.double(), 0, correction=0)
    train, test = ((x.double() - mean) / (std + 1e-6) for x in (train, test))
    weight = torch.zeros(classes, train.shape[1], dtype=train.dtype, device=train.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=train.dtype, device=train.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(train @ weight.T + bias, labels) + 5e-4 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return 100 * ((test @ weight.T + bias).argmax(1) == expected).double().mean().item()


def load_probe(config: EmbedConfig, data: Splits, device: torch.device) -> Splits | None:
    """Reads the labeled images of `data.probe`, prepared as the training images; None without one."""
    root = config.data.probe
    if root is None:
        return None
    fields = {name: getattr(data, name) for name in ("image_size", "mean", "std")}
    fields |= {"root": root, "val_fraction": None if root.is_dir() and subfolder(root, TRAIN) else 0.2}
    fields |= config.data.model_dump(include={"resize", "workers", "memory"})
    try:
        return load_data(DataConfig(kind="folder", **fields), device, unlabelled=False)
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
        self.classes = 0 if probe is None else probe.num_classes

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
        values.append(self.classes)
        return {"knn": knn_accuracy(*values), "linear": linear_accuracy(*values)}
