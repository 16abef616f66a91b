"""The runs' students and teachers, shown the same test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from mdistiller.analysis.features import Collected, collect
from mdistiller.analysis.report.markup import Section, paragraph
from mdistiller.analysis.runs import READING, Run, alone
from mdistiller.config import SELF
from mdistiller.data import Augment, AugmentConfig, DataConfig, ImageSet, Splits, load_data, make_loader
from mdistiller.errors import ConfigError, DataError, MDistillerError
from mdistiller.models import ModelConfig
from mdistiller.runs.folder import CONFIG
from mdistiller.settings import explain
from mdistiller.tasks.classification.models import build_model
from mdistiller.training.distributed import pick_device

BATCH = 250

Part = TypeVar("Part", bound=BaseModel)


@dataclass
class Seen:
    """What the students made of the test images; empty where they, or the data, could not be had.

    Args:
        splits: the data; its test set holds the images.
        students: outputs by row, one for each seed.
        teachers: outputs of the rows' teachers.
        baselines: by row, the row that it is compared with.
        failures: why something is missing, in sentences.
    """

    splits: Splits | None = None
    students: dict[str, list[Collected]] = field(default_factory=dict)
    teachers: dict[str, Collected] = field(default_factory=dict)
    baselines: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def images(self) -> int:
        """How many there are."""
        return 0 if self.splits is None else len(self.splits.test)

    def image(self, index: int) -> Tensor:
        """Image number `index`, uint8 [H, W, 3] on the CPU."""
        assert self.splits is not None
        test = self.splits.test
        return test.images[index] if isinstance(test, ImageSet) else test.read(index, 0)

    def note(self) -> list[Section]:
        """What could not be shown, and why."""
        if not self.failures:
            return []
        body = "".join(paragraph(text) for text in dict.fromkeys(self.failures))
        return [Section("missing", "What could not be shown", body)]


def look(groups: Mapping[str, Sequence[Run]], images: int, device: str = "auto") -> Seen:
    """Show the rows' students, of every seed, and their teachers at most `images` test images.

    The images are those of the first row; runs with another test set are left out, and so are those whose
    data or weights are not there any more. Nothing is fetched over the network, and no plug-in is loaded.

    Raises:
        ConfigError: no such device.
    """
    seen, where = Seen(), pick_device(device)
    first = next(iter(groups.values()))[0]
    try:
        config = _test_images(first, images)
        splits = seen.splits = load_data(config)
    except (MDistillerError, OSError) as error:
        seen.failures.append(f"The students could not be shown the test images: {error}")
        return seen
    prepare = Augment(AugmentConfig(), splits.mean, splits.std, splits.num_classes).to(where).eval()
    loader = make_loader(splits.test, BATCH, device=where, shuffle=False, workers=config.workers)
    known: dict[str, Collected] = {}

    def outputs(model: ModelConfig) -> Collected:
        key = model.model_dump_json()
        if key not in known:
            module = build_model(model, splits.num_classes).to(where)
            known[key] = collect(module, loader.epoch(0), prepare)
        return known[key]

    for label, runs in groups.items():
        for run in runs:
            try:
                if _read(_test_images(run, images)) != _read(config):
                    raise DataError("its test images are others than those of the first run")
                student = outputs(_model(run, "student").model_copy(update={"checkpoint": run.path}))
                seen.students.setdefault(label, []).append(student)
            except (MDistillerError, OSError) as error:
                seen.failures.append(f"The student of {run.path} could not be shown the images: {error}")
        teacher = runs[0].config["teacher"]
        if label not in seen.students or teacher is None or teacher["name"] == SELF:
            continue
        try:
            if runs[0].config.get("more_teachers"):
                raise ConfigError("there are several, and one is drawn")
            model = _model(runs[0], "teacher")
            if model.checkpoint is None:
                raise ConfigError("it has no checkpoint file")
            seen.teachers[label] = outputs(model)
        except (MDistillerError, OSError) as error:
            seen.failures.append(f"The teacher of {label} could not be shown the images: {error}")
    seen.baselines = _baselines({label: groups[label] for label in seen.students})
    return seen


def _baselines(groups: Mapping[str, Sequence[Run]]) -> dict[str, str]:
    """By row with a teacher (without any, by row): that of the student alone, else the first."""
    taught = {label for label, runs in groups.items() if runs[0].config["teacher"] is not None}
    found = {
        label: alone(groups[label][0], groups) or next(iter(groups))
        for label in groups
        if label in taught or not taught
    }
    return {label: other for label, other in found.items() if label != other}


def _test_images(run: Run, images: int) -> DataConfig:
    """Of the training images no more than has to be, and at most so many test images."""
    data = part_of(run, "data", DataConfig)
    limit = min(images, data.test_limit or images)
    return data.model_copy(
        update={"train_limit": 1, "label_noise": 0.0, "test_limit": limit, "download": False}
    )


def _read(data: DataConfig) -> dict[str, Any]:
    return data.model_dump(exclude=set(READING))


def _model(run: Run, name: Literal["student", "teacher"]) -> ModelConfig:
    return part_of(run, name, ModelConfig)


def part_of(run: Run, name: str, kind: type[Part]) -> Part:
    """One part of a run's config. The whole is not read: that would run the code of its plug-ins."""
    try:
        return kind.model_validate(run.config[name])
    except ValidationError as error:
        raise explain(error, str(run.path / CONFIG), prefix=f"{name}.") from error


def classes_of(outputs: Collected) -> Tensor:
    """The class that each image is taken for, int64 [N]."""
    return outputs.logits.argmax(1)


def per_class(outputs: Sequence[Collected], classes: int) -> Tensor:
    """Accuracy in % of each class, the mean over seeds, float64 [C]; NaN for a class without images."""
    found = []
    for one in outputs:
        hit = (classes_of(one) == one.label).double()
        sums = torch.zeros(classes, dtype=torch.float64).index_add_(0, one.label, hit)
        found.append(100 * sums / one.label.bincount(minlength=classes))
    return torch.stack(found).mean(0)
