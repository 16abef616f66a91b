"""Measurements on finished runs besides accuracy: cost, features, correlations, logit gaps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mdistiller.analysis.transfer import Dataset, open_dataset, probe
from mdistiller.data import Augment, ImageSet, Splits, load_data, make_loader
from mdistiller.data.draws import Draws
from mdistiller.errors import ConfigError
from mdistiller.methods.dkd import DKDConfig, logit_gap
from mdistiller.models import ModelConfig
from mdistiller.recipes.published import find_top1
from mdistiller.report.correlation import correlation_difference, mean_logit_difference, off_diagonal_mean
from mdistiller.report.cost import cost_chart
from mdistiller.report.features import Collected, collect, embed, separability
from mdistiller.report.looks import looks
from mdistiller.report.markup import panel
from mdistiller.report.runs import MeanStd, load_run, make_row
from mdistiller.tasks.classification.cells import Cell, models_of
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.models import build_model, build_teacher
from mdistiller.tasks.classification.report.spaces import matrix_chart, plane_chart
from mdistiller.types import Batch

BATCH = 500
EMBEDDED = 2000  # most test images in a t-SNE plot, spread evenly over the set
GAP_IMAGES = 2000  # augmented training images for a teacher's logit gap

Values = dict[tuple[str, str], tuple[str, ...]]
"""Texts of a table's additional columns by (pair, setting)."""


class Measured(NamedTuple):
    """Additional columns of a table, their texts, pictures as HTML, and notes."""

    columns: tuple[str, ...]
    values: Mapping[tuple[str, str], tuple[str, ...]]
    pictures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


NOTHING = Measured((), {})


@dataclass
class Material:
    """Everything that the measurements read.

    cells: the experiment's cells, whose configs have the data folder and the precision.
    folders: finished runs, one per seed, by (pair, setting).
    teachers: weights by the teacher's key; pretrained teachers are not in it.
    transfer: folders of other data sets.
    """

    cells: Sequence[Cell]
    folders: dict[tuple[str, str], list[Path]]
    teachers: dict[str, Path]
    device: torch.device
    transfer: Sequence[Path] = ()

    @cached_property
    def splits(self) -> Splits:
        return load_data(self.cells[0].config.data)

    def finished(self) -> Iterator[tuple[Cell, list[Path]]]:
        """Yields the cells that have finished runs, and these runs."""
        for cell in self.cells:
            if folders := self.folders.get((cell.pair, cell.setting)):
                yield cell, folders

    def model(self, config: ModelConfig, weights: Path) -> nn.Module:
        """Builds a model in evaluation mode, with the given weights."""
        return build_model(config.replace(checkpoint=weights), self.splits.num_classes).to(self.device).eval()

    def teacher(self, cell: Cell) -> nn.Module:
        assert cell.teacher is not None
        assert cell.config.teacher is not None
        weights = self.teachers.get(cell.teacher.key)
        config = cell.config.teacher
        config = config if weights is None else config.replace(checkpoint=weights)
        return build_teacher(config, self.splits).to(self.device).eval()

    def augment(self, config: ClassificationConfig) -> Augment:
        splits = self.splits
        return Augment(config.augment, splits.mean, splits.std, splits.num_classes).to(self.device)

    def test_batches(self) -> Iterator[Batch]:
        """Yields the test images, raw."""
        return make_loader(self.splits.test, BATCH, device=self.device, shuffle=False).epoch(0)

    def outputs(self, model: nn.Module, config: ClassificationConfig) -> Collected:
        """Computes a model's outputs on the test images."""
        return collect(model, self.test_batches(), self.augment(config).eval())

    def students(self) -> Iterator[tuple[Cell, Iterator[Collected]]]:
        """Yields the cells that have finished runs, and the outputs of their students, one per seed."""
        for cell, folders in self.finished():
            models = (self.model(cell.config.student, folder) for folder in folders)
            yield cell, (self.outputs(model, cell.config) for model in models)


def cost(material: Material) -> Measured:
    """Measures milliseconds a step and parameters besides the student's, against accuracy."""
    values: Values = {}
    rows = []
    for cell, folders in material.finished():
        runs = [load_run(folder) for folder in folders]
        row, metric = make_row(cell.setting, runs), runs[0].main_metric
        step = "" if row.ms_per_step is None else f"{row.ms_per_step:.1f}"
        values[cell.pair, cell.setting] = (step, f"{row.method_parameters:,}")
        rows.append(row)
    columns = ("ms/step", "extra parameters")
    if not rows:
        return Measured(columns, values)
    picture = cost_chart("figure2", rows, looks(rows), {row.label: row.label for row in rows}, metric)
    return Measured(columns, values, (picture,))


def features(material: Material) -> Measured:
    """Measures how well the classes separate in the pooled features of the test images, with t-SNE."""
    values: Values = {}
    planes = []
    for cell, students in material.students():
        seeds = []
        for outputs in students:
            seeds.append(separability(outputs.features, outputs.label))
            if len(seeds) == 1:
                chosen = _evenly(len(outputs.label), EMBEDDED)
                planes.append((_title(cell), embed(outputs.features[chosen]), outputs.label[chosen].tolist()))
        silhouette, knn = map(MeanStd.of, zip(*seeds, strict=True))
        values[cell.pair, cell.setting] = (f"{silhouette:.4f}", f"{knn:.2f}")
    note = (
        "Silhouette: mean silhouette coefficient of the classes. 10 nearest: accuracy of the vote of the 10 "
        "nearest other images. Both by cosine distance of the pooled features of all test images."
    )
    names = [str(k) for k in range(material.splits.num_classes)]
    pictures = []
    for i, (title, plane, label) in enumerate(planes):
        text = f"t-SNE of the features of {len(label)} test images of {title}, coloured by class."
        pictures.append(panel(title, plane_chart(f"figure3-{i}", plane, label, names, text)))
    return Measured(("silhouette", "10 nearest, %"), values, tuple(pictures), (note,))


def correlation(material: Material) -> Measured:
    """Measures the difference in the correlation of logits between student and teacher."""
    values: Values = {}
    teachers: dict[str, Collected] = {}
    first: dict[str, Tensor] = {}
    for cell, students in material.students():
        if cell.teacher is None:
            continue
        if cell.teacher.key not in teachers:
            teachers[cell.teacher.key] = material.outputs(material.teacher(cell), cell.config)
        teacher = teachers[cell.teacher.key]
        found = []
        for outputs in students:
            difference = correlation_difference(outputs.logits, teacher.logits)
            first.setdefault(_title(cell), difference)
            mean = mean_logit_difference(outputs.logits, teacher.logits, outputs.label)
            found.append((off_diagonal_mean(difference), off_diagonal_mean(mean)))
        differences, means = map(MeanStd.of, zip(*found, strict=True))
        values[cell.pair, cell.setting] = (f"{differences:.4f}", f"{means:.3f}")
    columns = ("Δ correlation", "Δ mean logit")
    notes = (
        "Δ correlation: absolute difference between student and teacher in the correlation of two classes' "
        "logits over the test images, mean over the pairs of classes. Δ mean logit: the same for the mean "
        "logit of another class over the images of a class, as in the authors' notebook.",
    )
    top = max((difference.nan_to_num().max().item() for difference in first.values()), default=0)
    pictures = [
        matrix_chart(f"figure4-{i}", title, difference.numpy(), top, material.splits.classes)
        for i, (title, difference) in enumerate(first.items())
    ]
    return Measured(columns, values, tuple(pictures), notes)


def check_transfer(cells: Sequence[Cell], folders: Sequence[Path]) -> None:
    """Checks that `transfer` has other data; only the digits serve as their own.

    Raises:
        ConfigError: no folder was given.
    """
    if not folders and cells[0].config.data.kind != "digits":
        message = "needs the folder of at least one other data set, such as STL-10 or Tiny-ImageNet"
        raise ConfigError(f"transfer: {message}")


def transfer(material: Material) -> Measured:
    """Measures the accuracy of a linear classifier on the students' frozen features of other data."""
    check_transfer(material.cells, material.transfer)
    size = material.splits.image_size
    own = Dataset("digits", material.splits.train, material.splits.test)
    others = [open_dataset(folder, size) for folder in material.transfer] or [own]
    values: Values = {}
    for cell, folders in material.finished():
        models = [material.model(cell.config.student, folder) for folder in folders]
        prepare = material.augment(cell.config).eval()
        texts: list[str] = []
        for data in others:
            found = [probe(model, data, prepare, material.device) for model in models]
            known, _ = find_top1(cell.pair, f"{data.name}: {cell.setting}", ("table13",))
            texts += [f"{MeanStd.of(found):.2f}", "" if known is None else f"{known:.1f} (unverified)"]
        values[cell.pair, cell.setting] = tuple(texts)
    columns = [text for data in others for text in (f"{data.name}, %", f"{data.name} published, %")]
    sizes = "; ".join(f"{data.name}: {len(data.train):,} and {len(data.test):,} images" for data in others)
    note = f"Logistic regression on the frozen, standardised pooled features at {size} pixels. {sizes}."
    return Measured(tuple(columns), values, notes=(note,))


def gap(material: Material) -> Measured:
    """Measures the teacher's logit gap on augmented training images, from which the adaptive β follows."""
    values: Values = {}
    known: dict[str, tuple[float, float, float]] = {}
    for cell in material.cells:
        if cell.teacher is None:
            continue
        key = cell.teacher.key
        if key not in known:
            augment = material.augment(cell.config)
            known[key] = teacher_gap(material.teacher(cell), material.splits, augment, material.device)
        confidence, mean, median = known[key]
        assert isinstance(cell.config.method, DKDConfig)
        beta = str(cell.config.method.beta)
        beta = {"auto": f"{mean:.2f}", "auto-sample": "each sample's gap"}.get(beta, beta)
        values[cell.pair, cell.setting] = (beta, f"{confidence:.3f}", f"{mean:.2f}", f"{median:.2f}")
    note = (
        f"Measured on {GAP_IMAGES:,} augmented training images. p_t: the teacher's probability of the label. "
        "Gap: the label's logit minus the largest other one, at least 0. `DKD` has the authors' β."
    )
    return Measured(("β", "teacher's p_t", "mean gap", "median gap"), values, notes=(note,))


@torch.no_grad()
def teacher_gap(
    teacher: nn.Module, splits: Splits, augment: Augment, device: torch.device
) -> tuple[float, float, float]:
    """Computes mean p_t, mean and median logit gap (at least 0 per image) on augmented training images."""
    images = splits.train
    if isinstance(images, ImageSet):
        images = images.select(_evenly(len(images), GAP_IMAGES))
    generator = torch.Generator(device).manual_seed(0)
    confidence, gaps = [], []
    for raw in make_loader(images, BATCH, device=device, shuffle=False).epoch(0):
        batch = augment(raw, Draws(0, raw.index), generator)
        logits = teacher(batch.image)
        confidence.append(logits.softmax(1).gather(1, batch.label[:, None]))
        gaps.append(logit_gap(logits, batch.label).clamp(min=0))
        if sum(map(len, gaps)) >= GAP_IMAGES:
            break
    found = torch.cat(gaps)
    return torch.cat(confidence).mean().item(), found.mean().item(), found.median().item()


MEASURES: dict[str, Callable[[Material], Measured]] = {
    measure.__name__: measure for measure in (cost, features, correlation, transfer, gap)
}
"""Measurements by the name of an experiment's `extra`."""


def _title(cell: Cell) -> str:
    return f"{cell.setting}: {' → '.join(models_of(cell.pair))}"


def _evenly(n: int, count: int) -> Tensor:
    """Returns indices spread over a whole set, which may be sorted by class."""
    return torch.linspace(0, n - 1, min(n, count)).round().long()
