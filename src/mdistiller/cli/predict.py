"""`mdistiller predict EXPORT_OR_RUN IMAGE…`."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mdistiller.cli.options import CommonFlags, parse_command
from mdistiller.data.decoder import read_image
from mdistiller.data.encoded import IMAGE_SUFFIXES
from mdistiller.deploy.predict import Predictor, load_predictor
from mdistiller.errors import ConfigError, DataError


@dataclass(frozen=True)
class PredictCommand(CommonFlags):
    """Print the likeliest classes of images, or a detector's boxes. One unreadable image fails them all."""

    source: tyro.conf.Positional[Path]
    """A folder that `mdistiller export` wrote, a run folder, or a student's file in one. A torch-export file
    may hold code: trust its source."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, and folders of them."""
    top: int = 5
    """Classes, or boxes, for each image."""
    min_score: float = 0.0
    """Lowest score of these, from 0 to 1."""
    draw: Path | None = None
    """Folder for copies of the images with a detector's boxes drawn on them, new or empty."""
    device: str = "auto"
    """auto (a GPU if there is one; ONNX: the CPU), cpu, cuda, cuda:N or mps."""


def _files(path: Path) -> list[Path]:
    """Returns the image files in a folder and those below it, sorted, or a file itself."""
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not found:
        raise DataError(f"{path} has no images, which end in {', '.join(IMAGE_SUFFIXES)}")
    return found


def _draw(predictor: Predictor, found: Sequence[tuple[Path, Sequence[Any]]], folder: Path) -> None:
    """Writes a PNG of each image; images of one name get numbers."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"draw: {folder} is not empty; allowed: a new or empty folder")
    names: Counter[str] = Counter()
    for path, predictions in found:
        drawn = predictor.deployment.draw(predictor.card, read_image(path), predictions)
        folder.mkdir(parents=True, exist_ok=True)
        names[path.stem] += 1
        number = f"-{names[path.stem]}" if names[path.stem] > 1 else ""
        drawn.save(folder / f"{path.stem}{number}.png")


def command(args: Sequence[str]) -> None:
    """Runs `mdistiller predict`."""
    c = parse_command(PredictCommand, args, prog="mdistiller predict")
    if not c.images:
        raise ConfigError("predict needs at least one image; see mdistiller predict --help")
    paths = [path for given in c.images for path in _files(given)]
    predictor = load_predictor(c.source, c.device)
    deployment = predictor.deployment
    found = [
        (path, [prediction for prediction in each if prediction[1] >= c.min_score])
        for path, each in zip(paths, predictor.predict(paths, c.top), strict=True)
    ]
    if c.draw is not None:
        _draw(predictor, found, c.draw)
    if c.json:
        name = deployment.predictions
        print(json.dumps([{"image": str(path), name: [p._asdict() for p in each]} for path, each in found]))
        return
    for path, predictions in found:
        print(path)
        for prediction in predictions:
            print(f"  {deployment.format_prediction(prediction)}")
