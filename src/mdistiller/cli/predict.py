"""`mdistiller predict EXPORT_OR_RUN IMAGE…`."""

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from mdistiller.cli.flags import Positional
from mdistiller.cli.options import Command
from mdistiller.data.encoded import ENDINGS
from mdistiller.data.folder import images_below
from mdistiller.deploy.predict import Predictor, load_predictor
from mdistiller.errors import ConfigError, DataError
from mdistiller.stored import write_outputs
from mdistiller.training.deployment import Predictions


class PredictCommand(Command):
    """Print the likeliest classes of images, a detector's boxes, a segmentation's shares; save outputs."""

    source: Positional[Path]
    """A folder that `mdistiller export` wrote, a run folder, or a student's file in one. A torch-export file
    may hold code: trust its source."""
    images: Positional[tuple[Path, ...]] = ()
    """Image files, and folders of them."""
    top: int = 5
    """Classes, or boxes, for each image."""
    min_score: float = 0.0
    """Lowest score of these, from 0 to 1."""
    draw: Path | None = None
    """New or empty folder for an image of each prediction, NAME.png: a copy with a detector's boxes drawn on
    it, or a mask of class ids in a palette."""
    out: Path | None = None
    """File for embeddings, or for a classifier's logits, one row an image: FILE.npy, float32 [N, D] in the
    order that is printed, or FILE.parquet with the columns path and output."""
    on_error: Literal["raise", "skip"] = "raise"
    """Unreadable images: stop, or leave them out and warn."""
    device: str = "auto"
    """auto (a GPU if there is one; ONNX: the CPU), cpu, cuda, cuda:N or mps."""

    def execute(self) -> None:
        if not self.images:
            raise ConfigError("predict needs at least one image; see mdistiller predict --help")
        folders = {path for path in self.images if path.is_dir()}
        predictor = load_predictor(self.source, self.device)
        channels = predictor.card.channels
        paths = [p for path in self.images for p in (_files(path, channels) if path in folders else [path])]
        read: list[Path] = []
        images = _read(predictor, paths, read, skip=self.on_error == "skip")
        deployment = predictor.deployment
        if self.out is not None:
            rows = predictor.outputs(images)
            _write(self.out, read, rows, predictor.card.classes)
            print(json.dumps([str(p) for p in read]) if self.as_json else "\n".join(map(str, read)))
            return
        predictions: list[Predictions]
        if self.draw is None:
            found = predictor.predict(images, self.top)
            predictions = [[p for p in each if p[1] >= self.min_score] for each in found]
        else:
            predictions = _draw(predictor, images, read, self.draw, self.top, self.min_score)
        pairs = list(zip(read, predictions, strict=True))
        if self.as_json:
            name = deployment.predictions
            print(
                json.dumps([{"image": str(path), name: [p._asdict() for p in each]} for path, each in pairs])
            )
            return
        for path, each in pairs:
            print(path)
            for prediction in each:
                print(f"  {deployment.format_prediction(prediction)}")


def _write(file: Path, paths: Sequence[Path], rows: Tensor, classes: Sequence[str] | None) -> None:
    """Writes a row of numbers for each image; `classes`: names of a classifier's columns."""
    if file.suffix == ".npy":
        np.save(file, rows.numpy())
    elif file.suffix == ".parquet":
        outputs = {"path": [str(path) for path in paths], "output": rows.numpy()}
        write_outputs(file, outputs | ({"classes": classes} if classes else {}))
    else:
        raise ConfigError(f"out: got {file}; allowed: FILE.npy, FILE.parquet")


def _files(path: Path, channels: int) -> list[Path]:
    """Returns the image files in a folder and those below it, sorted; DataError if there are none."""
    found = sorted(images_below(path, channels))
    if not found:
        raise DataError(f"{path} has no images, which end in {ENDINGS}")
    return found


def _read(predictor: Predictor, paths: Sequence[Path], read: list[Path], *, skip: bool) -> Iterator[Any]:
    """Yields images and adds their paths to `read`; with `skip`, warns about those that cannot be read.

    Raises:
        DataError: an image cannot be read, or with `skip` none.
    """
    errors = []
    for path in paths:
        try:
            image = predictor.open(path)
        except DataError as error:
            errors.append(error)
            if not skip:
                break
        else:
            read.append(path)
            yield image
    if errors and not (skip and read):
        raise errors[0]
    if errors:
        warnings.warn(f"left out {len(errors)} of {len(paths)} images: {errors[0]}", stacklevel=2)


def _draw(
    predictor: Predictor,
    images: Iterable[Image.Image],
    read: list[Path],
    folder: Path,
    top: int,
    min_score: float,
) -> list[Predictions]:
    """Writes a PNG of each prediction, and returns them; images of one name get numbers."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"draw: {folder} is not empty; allowed: a new or empty folder")
    names: Counter[str] = Counter()
    predictions: list[Predictions] = []
    for image in images:
        path = read[-1]
        drawn, found = predictor.draw(image, top, min_score)
        predictions.append(found)
        folder.mkdir(parents=True, exist_ok=True)
        names[path.stem] += 1
        number = f"-{names[path.stem]}" if names[path.stem] > 1 else ""
        drawn.save(folder / f"{path.stem}{number}.png")
    return predictions
