"""`mdistiller predict EXPORT_OR_RUN IMAGE…`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from mdistiller.deploy.predict import load_predictor
from mdistiller.errors import ConfigError
from mdistiller.methods import load_plugin


@dataclass(frozen=True)
class PredictCommand:
    """Print the likeliest classes of images, or a detector's boxes. One unreadable image fails them all."""

    source: tyro.conf.Positional[Path]
    """A folder that `mdistiller export` wrote, a run folder, or a student's file in one. A torch-export file
    may hold code: trust its source."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files."""
    top: int = 5
    """Classes, or boxes, to print for each image."""
    device: str = "auto"
    """auto (a GPU if there is one; ONNX: the CPU), cpu, cuda or cuda:N."""
    plugin: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Python file that registers methods, models and data sets (code: it is run). May be given again."""
    json: bool = False
    """Print the predictions as JSON on stdout."""


def command(args: Sequence[str]) -> None:
    """Runs `mdistiller predict`."""
    c = tyro.cli(PredictCommand, args=args, prog="mdistiller predict")
    if not c.images:
        raise ConfigError("predict needs at least one image; see mdistiller predict --help")
    for path in c.plugin:
        load_plugin(path)
    predictor = load_predictor(c.source, c.device)
    found = predictor.predict(c.images, c.top)
    deployment = predictor.deployment
    if c.json:
        rows = [
            {"image": str(path), deployment.predictions: [p._asdict() for p in predictions]}
            for path, predictions in zip(c.images, found, strict=True)
        ]
        print(json.dumps(rows))
        return
    for path, predictions in zip(c.images, found, strict=True):
        print(path)
        for prediction in predictions:
            print(f"  {deployment.format_prediction(prediction)}")
