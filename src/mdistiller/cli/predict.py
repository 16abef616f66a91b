"""`mdistiller predict EXPORT_OR_RUN IMAGE…`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from mdistiller.cli.options import CommonFlags, parse_command
from mdistiller.deploy.predict import load_predictor
from mdistiller.errors import ConfigError


@dataclass(frozen=True)
class PredictCommand(CommonFlags):
    """Print the likeliest classes of images, or a detector's boxes. One unreadable image fails them all."""

    source: tyro.conf.Positional[Path]
    """A folder that `mdistiller export` wrote, a run folder, or a student's file in one. A torch-export file
    may hold code: trust its source."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files."""
    top: int = 5
    """Classes, or boxes, to print for each image."""
    device: str = "auto"
    """auto (a GPU if there is one; ONNX: the CPU), cpu, cuda, cuda:N or mps."""


def command(args: Sequence[str]) -> None:
    """Runs `mdistiller predict`."""
    c = parse_command(PredictCommand, args, prog="mdistiller predict")
    if not c.images:
        raise ConfigError("predict needs at least one image; see mdistiller predict --help")
    predictor = load_predictor(c.source, c.device)
    deployment = predictor.deployment
    found = list(zip(c.images, predictor.predict(c.images, c.top), strict=True))
    if c.json:
        name = deployment.predictions
        print(json.dumps([{"image": str(path), name: [p._asdict() for p in each]} for path, each in found]))
        return
    for path, predictions in found:
        print(path)
        for prediction in predictions:
            print(f"  {deployment.format_prediction(prediction)}")
