"""`mdistiller predict EXPORT_OR_RUN IMAGE…`."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mdistiller.cli.options import CommonFlags, parse_command
from mdistiller.deploy.predict import Predictor, load_predictor
from mdistiller.errors import ConfigError


@dataclass(frozen=True)
class PredictCommand(CommonFlags):
    """Print the likeliest classes of images, a detector's boxes, or the shares of a segmentation's classes.

    One unreadable image fails them all.
    """

    source: tyro.conf.Positional[Path]
    """A folder that `mdistiller export` wrote, a run folder, or a student's file in one. A torch-export file
    may hold code: trust its source."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files."""
    top: int = 5
    """Classes, or boxes, to print for each image."""
    out: Path | None = None
    """Segmentation: folder for a mask of each image, NAME.png, a palette image of class ids in the image's
    size."""
    device: str = "auto"
    """auto (a GPU if there is one; ONNX: the CPU), cpu, cuda, cuda:N or mps."""


def command(args: Sequence[str]) -> None:
    """Runs `mdistiller predict`."""
    c = parse_command(PredictCommand, args, prog="mdistiller predict")
    if not c.images:
        raise ConfigError("predict needs at least one image; see mdistiller predict --help")
    predictor = load_predictor(c.source, c.device)
    deployment = predictor.deployment
    if c.out is None:
        predictions = predictor.predict(c.images, c.top)
    else:
        predictions = _draw(predictor, c.images, c.out, c.top)
    found = list(zip(c.images, predictions, strict=True))
    if c.json:
        name = deployment.predictions
        print(json.dumps([{"image": str(path), name: [p._asdict() for p in each]} for path, each in found]))
        return
    for path, each in found:
        print(path)
        for prediction in each:
            print(f"  {deployment.format_prediction(prediction)}")


def _draw(predictor: Predictor, images: Sequence[Path], out: Path, top: int) -> list[list[Any]]:
    """Writes the prediction for each image as an image, and returns it in words."""
    twice = [stem for stem, count in Counter(path.stem for path in images).items() if count > 1]
    if twice:
        raise ConfigError(f"--out: two images have the name {twice[0]}; allowed are names that differ")
    predictions = []
    for path in images:
        drawn, found = predictor.draw(path, top)
        out.mkdir(parents=True, exist_ok=True)
        drawn.save(out / f"{path.stem}.png")
        predictions.append(found)
    return predictions
