"""Colored predictions of the runs' segmentation models on a few test images."""

from collections.abc import Sequence
from html import escape

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mdistiller.errors import MDistillerError
from mdistiller.models import ModelConfig
from mdistiller.report.markup import Section, figure, panel, panels, paragraph, picture
from mdistiller.report.page_rows import PageRows
from mdistiller.report.runs import RunRecord
from mdistiller.report.sections import (
    RunOutputs,
    TaskSections,
    check_same_images,
    missing_parts,
    of_first_runs,
    part_of,
    register_sections,
)
from mdistiller.tasks.segmentation.config import SegmentationAugmentConfig, SegmentationDataConfig
from mdistiller.tasks.segmentation.data import IGNORE, Mask, load_split, palette
from mdistiller.tasks.segmentation.deployment import SegmenterDeployment
from mdistiller.tasks.segmentation.segmenter import build_segmenter
from mdistiller.training.deployment import ModelInput
from mdistiller.training.distributed import pick_device

MOST = 6  # images
_LONG_SIDE = 320  # pixels of a picture on the page
_STRENGTH = 0.65  # of a class's color over the photograph
_UNUSED = ("train_annotations", "train_images", "train_limit", "train_split")


def masks(rows: PageRows, images: int, device: str, found: RunOutputs | None = None) -> list[Section]:
    """Returns the true and the predicted masks of each row's first student on at most `images` test images.

    Raises:
        ConfigError: no such device.
    """
    target = pick_device(device)
    try:
        data = _test_images(next(iter(rows.groups.values()))[0], images)
        shown = load_split(data, "test")
        pairs = [shown.read(i) for i in range(len(shown))]
    except (MDistillerError, OSError) as error:
        return missing_parts([f"The test images cannot be read: {error}"])
    names = [path.name for path in shown.images]
    drawings = [
        [panel("Photograph", _picture(image, None, name)), panel("True", _picture(image, mask, name))]
        for name, (image, mask) in zip(names, pairs, strict=True)
    ]
    seen = {int(i) for _, mask in pairs for i in np.unique(mask)}

    def predict(run: RunRecord) -> list[Mask]:
        check_same_images(_test_images(run, images), data, *_UNUSED)
        return _predict(run, [image for image, _ in pairs], shown.classes, target)

    results, failures = of_first_runs({label: rows.groups[label] for label in rows.pictured}, predict)
    for label, own in results.items():
        for k, predicted in enumerate(own):
            seen |= {int(i) for i in np.unique(predicted)}
            alt = f"{names[k]}, {label}"
            drawings[k].append(panel(label, _picture(pairs[k][0], predicted, alt)))
    key = _legend([(shown.classes[i], i) for i in sorted(seen - {IGNORE})])
    caption = "Predictions of each row's first seed; ignored pixels are left as they are."
    body = figure(key, *map(panels, drawings), caption=caption) + "".join(map(paragraph, failures))
    return [Section("masks", "Masks of test images", body)]


def _test_images(run: RunRecord, images: int) -> SegmentationDataConfig:
    data = part_of(run, "data", SegmentationDataConfig)
    return data.replace(test_limit=min(images, MOST, data.test_limit or MOST))


@torch.no_grad()
def _predict(
    run: RunRecord, images: Sequence[Image.Image], classes: Sequence[str], device: torch.device
) -> list[Mask]:
    """Predicts the class of each pixel of some images."""
    exports, data = SegmenterDeployment(), part_of(run, "data", SegmentationDataConfig)
    short_side = part_of(run, "augment", SegmentationAugmentConfig).short_side
    fields = ModelInput(classes=classes, resize=short_side, mean=data.mean, std=data.std)
    student = build_segmenter(ModelConfig(name=run.student, checkpoint=run.path), len(classes))
    model = exports.as_model(student.to(device).eval())
    drawn = [exports.draw(lambda x: model(x.to(device)), fields, image, 0, 1.0)[0] for image in images]
    return [np.array(image) for image in drawn]


def _picture(image: Image.Image, mask: Mask | None, alt: str) -> str:
    pixels: Tensor = torch.from_numpy(np.array(image)).float()
    if mask is not None:
        colors = torch.from_numpy(palette(256)[mask]).float()
        colored = torch.from_numpy(mask != IGNORE)[..., None]
        pixels = torch.where(colored, (1 - _STRENGTH) * pixels + _STRENGTH * colors, pixels)
    return picture(pixels, _LONG_SIDE, alt)


def _legend(classes: Sequence[tuple[str, int]]) -> str:
    """Returns the names of classes beside their colors."""
    parts = []
    for name, i in classes:
        red, green, blue = palette(256)[i].tolist()
        box = f'<span style="background:rgb({red},{green},{blue});border:1px solid;padding:0 .5em"></span>'
        parts.append(f'<span style="white-space:nowrap">{box} {escape(name)}</span>')
    return f"<p>{' &ensp; '.join(parts)}</p>"


register_sections("segmentation", TaskSections("masks of test images", masks))
