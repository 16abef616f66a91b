"""What an experiment measures on its finished runs besides accuracy: cost, features, correlations, gaps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor, nn

from mdistiller.analysis.correlation import correlation_difference, mean_logit_difference
from mdistiller.analysis.features import Collected, collect, embed, separability
from mdistiller.analysis.runs import figure, load_run
from mdistiller.analysis.transfer import PUBLISHED, Dataset, open_dataset, probe
from mdistiller.data import Augment, ImageSet, Splits, load_data, make_loader
from mdistiller.errors import ConfigError
from mdistiller.methods import DKDConfig
from mdistiller.methods.dkd import logit_gap
from mdistiller.models import ModelConfig
from mdistiller.recipes.cells import Cell, models_of
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.models import build_model

BATCH = 500
EMBEDDED = 2000
"""Test images in a t-SNE picture, evenly over the set: enough to see, few enough to compute."""
TAUGHT = 2000
"""Augmented training images from which a teacher's logit gap is taken."""
_MARGIN = {"l": 60, "r": 20, "t": 40, "b": 50}


class Picture(NamedTuple):
    """name: of its file; plot; text: what it shows, for those who don't see it."""

    name: str
    plot: go.Figure
    text: str


class Measured(NamedTuple):
    """Columns of a table, the texts of each cell by (pair, setting), pictures, and what is to be said."""

    columns: tuple[str, ...]
    values: Mapping[tuple[str, str], tuple[str, ...]]
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class Material:
    """What there is to measure.

    cells: the experiment's, their configs with data folder and precision.
    folders: the finished runs of each cell by (pair, setting), a seed each.
    teachers: weights by the teacher's key; pretrained ones are not there.
    device: where models run.
    transfer: folders of other data sets.
    """

    cells: Sequence[Cell]
    folders: dict[tuple[str, str], list[Path]]
    teachers: dict[str, Path]
    device: torch.device
    transfer: Sequence[Path] = ()

    @cached_property
    def splits(self) -> Splits:
        """The data of the experiment."""
        return load_data(self.cells[0].config.data)

    def finished(self) -> Iterator[tuple[Cell, list[Path]]]:
        """The cells that have finished runs."""
        for cell in self.cells:
            if folders := self.folders.get((cell.pair, cell.setting)):
                yield cell, folders

    def model(self, config: ModelConfig, weights: Path | None) -> nn.Module:
        """A model with its weights, in eval mode."""
        weighed = config if weights is None else config.model_copy(update={"checkpoint": weights})
        return build_model(weighed, self.splits.num_classes).to(self.device).eval()

    def teacher(self, cell: Cell) -> nn.Module:
        """The teacher of a cell that has one."""
        assert cell.teacher is not None
        assert cell.config.teacher is not None
        return self.model(cell.config.teacher, self.teachers.get(cell.teacher.key))

    def augment(self, config: ClassificationConfig) -> Augment:
        """What prepares the images of a run."""
        splits = self.splits
        return Augment(config.augment, splits.mean, splits.std, splits.num_classes).to(self.device)

    def look(self, model: nn.Module, config: ClassificationConfig) -> Collected:
        """Outputs on the test images."""
        loader = make_loader(self.splits.test, BATCH, device=self.device, shuffle=False)
        return collect(model, loader.epoch(0), self.augment(config).eval())


def cost(material: Material) -> Measured:
    """Milliseconds a step and parameters beside the student's, against accuracy."""
    values: dict[tuple[str, str], tuple[str, ...]] = {}
    points = []
    for cell, folders in material.finished():
        runs = [load_run(folder) for folder in folders]
        summaries = [run.summary for run in runs if run.summary is not None]
        ms = statistics.fmean(summary["ms_per_step"] for summary in summaries)
        extra = summaries[0]["method_parameters"]
        values[cell.pair, cell.setting] = (f"{ms:.1f}", f"{extra:,}")
        points.append((cell.setting, ms, extra, statistics.fmean(run.evals[-1]["top1"] for run in runs)))
    if not points:
        return Measured(("ms/step", "extra parameters"), values)
    most = max(extra for _, _, extra, _ in points) or 1
    plot = go.Figure()
    for name, ms, extra, top1 in points:
        size = 10 + 30 * (extra / most) ** 0.5  # its area stands for the number
        told = f"{name}: {ms:.1f} ms/step, {top1:.2f} %, {extra:,} extra parameters<extra></extra>"
        marker = {"size": size, "color": "#0072B2", "opacity": 0.7}
        plot.add_scatter(
            x=[ms],
            y=[top1],
            text=[name],
            mode="markers+text",
            textposition="top center",
            marker=marker,
            hovertemplate=told,
            showlegend=False,
        )
    plot.update_layout(
        height=520, margin=_MARGIN, xaxis_title="milliseconds a step", yaxis_title="test top-1, %"
    )
    text = "; ".join(f"{n}: {ms:.1f} ms, {top1:.2f} %, {x:,} more parameters" for n, ms, x, top1 in points)
    shown = Picture("figure2", plot, f"Time a step against accuracy, the area is extra parameters. {text}")
    return Measured(("ms/step", "extra parameters"), values, (shown,))


def features(material: Material) -> Measured:
    """t-SNE of the pooled features of the test images, and how well their classes lie apart."""
    values, drawn = {}, []
    for cell, folders in material.finished():
        found = []
        for i, folder in enumerate(folders):
            seen = material.look(material.model(cell.config.student, folder), cell.config)
            found.append(separability(seen.features, seen.label))
            if i == 0:
                chosen = _evenly(len(seen.label), EMBEDDED)
                name = _named(cell)
                drawn.append((name, embed(seen.features[chosen]), seen.label[chosen]))
        values[cell.pair, cell.setting] = (
            _mean([x.silhouette for x in found], 4),
            _mean([x.knn for x in found], 2),
        )
    notes = (
        "Of the pooled features of all test images, by cosine distance: the mean silhouette of the classes, "
        "and the accuracy of the vote of the 10 nearest others.",
    )
    columns = ("silhouette", "10 nearest, %")
    if not drawn:
        return Measured(columns, values, notes=notes)
    plot = make_subplots(cols=len(drawn), subplot_titles=[name for name, _, _ in drawn])
    for i, (_, plane, label) in enumerate(drawn, 1):
        marker = {"size": 4, "color": label.tolist(), "colorscale": "Turbo", "opacity": 0.8}
        plot.add_scatter(
            x=plane[:, 0],
            y=plane[:, 1],
            mode="markers",
            marker=marker,
            text=[f"class {x}" for x in label.tolist()],
            hoverinfo="text",
            showlegend=False,
            row=1,
            col=i,
        )
    plot.update_layout(height=520, margin=_MARGIN)
    plot.update_xaxes(visible=False)
    plot.update_yaxes(visible=False)
    told = "; ".join(f"{key[1]}: silhouette {a}, nearest {b} %" for key, (a, b) in values.items())
    text = f"t-SNE of the features of {len(drawn[0][2])} test images, coloured by class. {told}"
    return Measured(columns, values, (Picture("figure3", plot, text),), notes)


def correlation(material: Material) -> Measured:
    """How far student and teacher are in the correlation of their logits, over the test images."""
    values, drawn = {}, []
    told_by: dict[str, Collected] = {}
    for cell, folders in material.finished():
        if cell.teacher is None:
            continue
        if cell.teacher.key not in told_by:
            told_by[cell.teacher.key] = material.look(material.teacher(cell), cell.config)
        taught = told_by[cell.teacher.key]
        apart, means = [], []
        for i, folder in enumerate(folders):
            seen = material.look(material.model(cell.config.student, folder), cell.config)
            difference = correlation_difference(seen.logits, taught.logits)
            apart.append(_off_diagonal(difference))
            means.append(_off_diagonal(mean_logit_difference(seen.logits, taught.logits, seen.label)))
            if i == 0:
                drawn.append((_named(cell), difference))
        values[cell.pair, cell.setting] = (_mean(apart, 4), _mean(means, 3))
    columns = ("Δ correlation", "Δ mean logit")
    notes = (
        "Δ correlation: of student and teacher, the absolute difference in the correlation of two classes' "
        "logits over the test images, mean over the pairs of classes. Δ mean logit: that in the mean logit "
        "of another class over a class's images, which is what the authors' notebook draws.",
    )
    if not drawn:
        return Measured(columns, values, notes=notes)
    plot = make_subplots(cols=len(drawn), subplot_titles=[name for name, _ in drawn])
    for i, (_, difference) in enumerate(drawn, 1):
        plot.add_heatmap(z=difference.tolist(), coloraxis="coloraxis", row=1, col=i)
        plot.update_yaxes(autorange="reversed", row=1, col=i)
    plot.update_layout(
        height=480,
        margin=_MARGIN,
        coloraxis={"colorscale": "Viridis", "cmin": 0, "colorbar": {"title": "|Δ|"}},
    )
    told = "; ".join(f"{key[1]}: mean {a}" for key, (a, _) in values.items())
    text = f"Absolute difference of student's and teacher's correlation matrices, class by class. {told}"
    return Measured(columns, values, (Picture("figure4", plot, text),), notes)


def check_transfer(cells: Sequence[Cell], folders: Sequence[Path]) -> None:
    """Raise ConfigError unless `transfer` has other data; only the digits stand for themselves."""
    if not folders and cells[0].config.data.kind != "digits":
        raise ConfigError(
            "transfer: needs the folder of at least one other data set, such as STL-10 or Tiny-ImageNet"
        )


def transfer(material: Material) -> Measured:
    """A linear classifier on the student's frozen features of other data."""
    check_transfer(material.cells, material.transfer)
    size = material.splits.image_size
    own = Dataset("digits", material.splits.train, material.splits.test)
    others = [open_dataset(folder, size) for folder in material.transfer] or [own]
    values = {}
    for cell, folders in material.finished():
        models = [material.model(cell.config.student, folder) for folder in folders]
        prepare = material.augment(cell.config).eval()
        texts = []
        for data in others:
            found = [probe(model, data, prepare, material.device) for model in models]
            known = PUBLISHED.get((data.name, cell.setting))
            texts += [_mean(found, 2), "" if known is None else f"{known:.1f} (unchecked)"]
        values[cell.pair, cell.setting] = tuple(texts)
    columns = [text for data in others for text in (f"{data.name}, %", f"{data.name} published, %")]
    sizes = "; ".join(f"{data.name}: {len(data.train):,} and {len(data.test):,} images" for data in others)
    note = f"Logistic regression on the frozen, standardised pooled features at {size} pixels. {sizes}."
    return Measured(tuple(columns), values, notes=(note,))


def gap(material: Material) -> Measured:
    """The teacher's logit gap on augmented training images, and the β that follows from it."""
    values: dict[tuple[str, str], tuple[str, ...]] = {}
    known: dict[str, tuple[float, float, float]] = {}
    for cell in material.cells:
        if cell.teacher is None:
            continue
        key = cell.teacher.key
        if key not in known:
            known[key] = teacher_gap(
                material.teacher(cell), material.splits, material.augment(cell.config), material.device
            )
        confidence, mean, middle = known[key]
        method = cell.config.method
        assert isinstance(method, DKDConfig)
        used = {"auto": f"{mean:.2f}", "auto-sample": "each sample's gap"}.get(
            str(method.beta), f"{method.beta}"
        )
        values[cell.pair, cell.setting] = (used, f"{confidence:.3f}", f"{mean:.2f}", f"{middle:.2f}")
    note = (
        f"Of the teacher, on {TAUGHT:,} augmented training images: p_t, its probability of the label; the "
        "gap, the label's logit less the best other one, 0 where that is ahead. `DKD` has the authors' β."
    )
    return Measured(("β", "teacher's p_t", "mean gap", "median gap"), values, notes=(note,))


@torch.no_grad()
def teacher_gap(
    teacher: nn.Module, splits: Splits, augment: Augment, device: torch.device
) -> tuple[float, float, float]:
    """Mean p_t, mean and median logit gap (at least 0 for each image) on augmented training images."""
    images = splits.train
    if isinstance(images, ImageSet):
        images = images.select(_evenly(len(images), TAUGHT))
    generator = torch.Generator(device).manual_seed(0)
    confidence: list[Tensor] = []
    gaps: list[Tensor] = []
    for raw in make_loader(images, BATCH, device=device, shuffle=False).epoch(0):
        batch = augment(raw, generator)
        logits = teacher(batch.image)
        confidence.append(logits.softmax(1).gather(1, batch.label[:, None]))
        gaps.append(logit_gap(logits, batch.label).clamp(min=0))
        if sum(map(len, gaps)) >= TAUGHT:
            break
    found = torch.cat(gaps)
    return torch.cat(confidence).mean().item(), found.mean().item(), found.median().item()


MEASURES: dict[str, Callable[[Material], Measured]] = {
    "cost": cost,
    "features": features,
    "correlation": correlation,
    "transfer": transfer,
    "gap": gap,
}
"""By the name of an experiment's `extra`."""


def _mean(values: Sequence[float], digits: int) -> str:
    found = figure(values)
    text = f"{found.mean:.{digits}f}"
    return text if found.std is None else f"{text} ± {found.std:.{digits}f}"


def _named(cell: Cell) -> str:
    return f"{cell.setting}: {' → '.join(models_of(cell.pair))}"


def _evenly(n: int, count: int) -> Tensor:
    """Indices over the whole set, which may be sorted by class."""
    return torch.linspace(0, n - 1, min(n, count)).round().long()


def _off_diagonal(matrix: Tensor) -> float:
    """Mean of all but the diagonal, of what is defined."""
    apart = ~torch.eye(len(matrix), dtype=torch.bool)
    return matrix[apart].nanmean().item()
