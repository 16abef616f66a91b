"""Outputs of the runs' students and teachers on the same test images."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int
from torch import Tensor, nn

from mdistiller.config import SELF
from mdistiller.data import DataConfig, Splits, load_data
from mdistiller.data.loader import PlainBatches
from mdistiller.errors import CheckpointError, ConfigError, DataError, MDistillerError
from mdistiller.models import ModelConfig
from mdistiller.models.weights import read_metadata
from mdistiller.report.page_rows import PageRows
from mdistiller.report.runs import RunRecord, find_baseline
from mdistiller.report.sections import RunOutputs, check_same_images, no_student, part_of
from mdistiller.taps import tap
from mdistiller.tasks.classification.diagnostics import diagnose
from mdistiller.tasks.classification.models import build_model, build_teacher
from mdistiller.tasks.classification.report.measures import (
    correlation_difference,
    off_diagonal_mean,
    separability,
)
from mdistiller.tasks.multilabel.evaluate import average_precision
from mdistiller.training.distributed import pick_device
from mdistiller.types import IGNORED, Batch, Line

BATCH = 250


class Collected(NamedTuple):
    """Outputs of a model on N images, in their order, on the CPU."""

    logits: Float32[Tensor, "n c"]
    features: Float32[Tensor, "n d"]
    label: Int[Tensor, " n"]


@torch.no_grad()
def collect(model: nn.Module, batches: Iterable[Batch], *, feature: str = "pooled") -> Collected:
    """Collects logits and one feature of a model in evaluation mode, which is put back afterwards.

    Args:
        model: returns logits [B, classes]; on the device of the batches.
        batches: normalized images, such as `PlainBatches`.
        feature: name of the tap; each image's feature is flattened.

    Raises:
        UnknownNameError: the model has no such tap.
    """
    was_training = model.training
    tapped = tap(model.eval(), [feature])
    found: list[tuple[Tensor, ...]] = []
    try:
        for batch in batches:
            logits, features = tapped(batch.image)
            pooled = features[feature].flatten(1)
            found.append((logits.float().cpu(), pooled.float().cpu(), batch.label.cpu()))
    finally:
        tapped.untap().train(was_training)
    return Collected(*(torch.cat(parts) for parts in zip(*found, strict=True)))


@dataclass
class ClassifierOutputs(RunOutputs):
    """Outputs of classifiers; empty where models or data are missing.

    students: by row, outputs of each seed.
    teachers: by row, the outputs of its teacher.
    baselines: by row, the row with which it is compared.
    """

    students: dict[str, list[Collected]] = field(default_factory=dict)
    teachers: dict[str, Collected] = field(default_factory=dict)
    splits: Splits | None = None
    baselines: dict[str, str] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return 0 if self.splits is None else len(self.splits.test)

    @property
    def is_multi_label(self) -> bool:
        return self.splits is not None and self.splits.multi_label

    def measures(self, rows: PageRows, label: str) -> dict[str, list[float]]:
        students, values = self.students.get(label, []), dict[str, list[float]]()
        near = [c for c in rows.contests if label in (row.label for row in c.rows)]
        labels = [label, *(row.label for contest in near for row in contest.rows)]
        teacher = next((self.teachers[other] for other in labels if other in self.teachers), None)
        for student in students:
            found: dict[str, float] = {}
            if not self.is_multi_label:
                with suppress(DataError):  # too few images
                    found |= separability(student.features, student.label)._asdict()
                logits = None if teacher is None else teacher.logits
                found |= diagnose(student.logits, logits, student.label)
            if teacher is not None:
                difference = correlation_difference(student.logits, teacher.logits)
                found["correlation"] = off_diagonal_mean(difference)
            for name, value in found.items():
                values.setdefault(name, []).append(value)
        return values

    def per_class(self, label: str) -> np.ndarray:
        """Computes a row's metric of each class in percent, the mean over seeds; NaN without images."""
        assert self.splits is not None
        found = (self._of_classes(outputs) for outputs in self.students[label])
        return np.mean(list(found), axis=0)

    def _of_classes(self, outputs: Collected) -> np.ndarray:
        assert self.splits is not None
        if self.is_multi_label:
            pairs = zip(outputs.logits.T.numpy(), outputs.label.T.numpy(), strict=True)
            return np.array([100 * average_precision(z[y != IGNORED], y[y != IGNORED] > 0) for z, y in pairs])
        classes, label = self.splits.num_classes, outputs.label
        hit = (outputs.logits.argmax(1) == label).double()
        sums = torch.zeros(classes, dtype=torch.float64).index_add_(0, label, hit)
        return (100 * sums / label.bincount(minlength=classes)).numpy()


def run_models(rows: PageRows, images: int, device: str = "auto") -> ClassifierOutputs:
    """Runs each row's students of all seeds, and its teacher, on at most `images` test images.

    The images are those of the first row. Runs with another test set are left out, and so are runs whose data
    or weights are missing. Nothing is downloaded, and no plug-in is loaded.

    Raises:
        ConfigError: no such device.
    """
    found, target, groups = ClassifierOutputs(), pick_device(device), rows.groups
    try:
        first = next(iter(groups.values()))[0]
        config = test_images(first, images)
        with suppress(CheckpointError):
            config = _filled(config, read_metadata(first.path))
        splits = found.splits = load_data(config)
    except (MDistillerError, OSError) as error:
        found.failures.append(f"The test images cannot be read: {error}")
        return found
    batches = PlainBatches(splits.test, splits, BATCH, workers=config.workers, device=target)
    known: dict[tuple[bool, str], Collected] = {}

    def outputs(model: ModelConfig, *, is_teacher: bool = False) -> Collected:
        key = is_teacher, model.model_dump_json()  # a teacher may see other images than as a student
        if key not in known:
            module = build_teacher(model, splits) if is_teacher else build_model(model, splits.num_classes)
            known[key] = collect(module.to(target), batches)
        return known[key]

    for label, runs in groups.items():
        for run in runs:
            try:
                own = test_images(run, images)
                if own != config:  # such as small squares, whose size only the student's file records
                    own = _filled(own, read_metadata(run.path))
                check_same_images(own, config)
                student = outputs(part_of(run, "student", ModelConfig).replace(checkpoint=run.path))
                found.students.setdefault(label, []).append(student)
            except (MDistillerError, OSError) as error:
                found.failures.append(no_student(run, error))
        if label not in found.students or runs[0].teacher in (None, SELF):
            continue
        try:
            if runs[0].config.get("more_teachers"):
                raise ConfigError("the run has several, and only one can be drawn")
            model = part_of(runs[0], "teacher", ModelConfig)
            if model.checkpoint is None:
                raise ConfigError("it has no checkpoint file")
            found.teachers[label] = outputs(model, is_teacher=True)
        except (MDistillerError, OSError) as error:
            found.failures.append(f"The teacher of {label} cannot run on the images: {error}")
    shown = {label: groups[label] for label in found.students}
    for label, runs in shown.items():
        if runs[0].teacher is not None and (other := find_baseline(runs[0], shown)) is not None:
            found.baselines[label] = other
    return found


def test_images(run: RunRecord, images: int) -> DataConfig:
    """Returns a run's data config with at most `images` test images and one training image."""
    data = part_of(run, "data", DataConfig)
    limit = min(images, data.test_limit or images)
    return data.replace(train_limit=1, label_noise=0.0, test_limit=limit, download=False)


def _filled(data: DataConfig, recorded: Line) -> DataConfig:
    """Returns a config with size, mean and std of a student's metadata where it leaves them open."""
    names = [name for name in ("image_size", "mean", "std") if getattr(data, name) is None]
    return data.replace(**{name: recorded[name] for name in names if name in recorded})
